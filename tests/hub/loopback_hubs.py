"""Loopback servers that speak the three hubs' protocols as their official clients need them.

`HubServer` speaks Hugging Face's, `ModelScopeServer` and `KaggleServer` the others'. Every request
is kept in ``requests``; faults are set per file name.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass
class Request:
    """What a client sent."""

    method: str
    path: str
    range: str | None
    token: str | None


@dataclass
class Faults:
    """What goes wrong, by file name."""

    cut: dict[str, list[int]] = field(default_factory=dict)  # bytes sent before each cut
    body: dict[str, bytes] = field(default_factory=dict)  # other bytes than the listed ones
    status: int = 0  # answers everything so


class _Server:
    """A threaded HTTP server on a free loopback port; use as a context manager."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.faults = Faults()
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                outer.note(self)
                outer.answer(self)

            do_HEAD = do_POST = do_GET

        class Http(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *args: object) -> None:
                pass  # a client that hangs up

        self._http = Http(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)

    def __enter__(self) -> _Server:
        self._thread.start()
        return self

    def __exit__(self, *args: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def note(self, handler: BaseHTTPRequestHandler) -> None:
        token = handler.headers.get("Authorization", "").removeprefix("Bearer ") or None
        with self.lock:
            self.requests.append(
                Request(handler.command, handler.path, handler.headers.get("Range"), token)
            )

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        raise NotImplementedError

    def fetched(self) -> list[str]:
        """Names of the files whose bytes were asked for."""
        return [name for r in self.requests if (name := self.file_of(r))]

    def file_of(self, request: Request) -> str | None:
        raise NotImplementedError

    def reply(self, handler, status=200, body=b"", headers=None, kind="application/json") -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        handler.send_response(status)
        handler.send_header("Content-Type", kind)
        handler.send_header("Content-Length", str(len(data)))
        for key, value in (headers or {}).items():
            handler.send_header(key, value)
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(data)

    def send_file(self, handler, name: str, content: bytes, headers: dict[str, str]) -> None:
        """The bytes of a file, ranged if asked, cut or altered if a fault says so."""
        content = self.faults.body.get(name, content)
        start, total = 0, len(content)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", handler.headers.get("Range") or "")
        if asked:
            start = int(asked[1])
            headers = {**headers, "Content-Range": f"bytes {start}-{total - 1}/{total}"}
        body = content[start:]
        headers = {"Accept-Ranges": "bytes", **headers}
        with self.lock:
            cuts = self.faults.cut.get(name)
            cut = cuts.pop(0) if cuts else None
        if cut is None:
            self.reply(handler, 206 if asked else 200, body, headers, "application/octet-stream")
            return
        handler.send_response(206 if asked else 200)
        handler.send_header("Content-Length", str(len(body)))
        for key, value in headers.items():
            handler.send_header(key, value)
        handler.end_headers()
        handler.wfile.write(body[:cut])
        handler.wfile.flush()
        handler.close_connection = True
        handler.connection.shutdown(socket.SHUT_RDWR)


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class HubServer(_Server):
    """Hugging Face: model info, tree, HEAD and GET of resolve, gated and private repositories."""

    def __init__(self) -> None:
        super().__init__()
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self.refs: dict[str, dict[str, str]] = {}
        self.gated: dict[str, str] = {}  # repository -> the token that opens it
        self.refused: set[str] = set()  # tokens that are not valid

    def commit(self, repo: str, files: dict[str, bytes], ref: str = "main") -> str:
        sha = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits.setdefault(repo, {})[sha] = dict(files)
        self.refs.setdefault(repo, {})[ref] = sha
        return sha

    def file_of(self, request: Request) -> str | None:
        found = re.fullmatch(r"/[^/]+/[^/]+/resolve/[^/]+/(.+)", unquote(request.path))
        return found[1] if found and request.method == "GET" else None

    def answer(self, handler) -> None:
        path = unquote(urlsplit(handler.path).path)
        token = self.requests[-1].token
        if self.faults.status:
            return self.reply(handler, self.faults.status)
        if token in self.refused:
            why = {"X-Error-Message": "Invalid credentials in Authorization header"}
            return self.reply(handler, 401, headers=why)
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path)
        resolve = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        repo = (api or resolve)[1]
        if repo not in self.commits:
            return self.reply(handler, 404, headers={"X-Error-Code": "RepoNotFound"})
        revision = (api[3] if api else resolve[2]) or "main"
        sha = self.refs[repo].get(revision, revision)
        files = self.commits[repo].get(sha)
        if files is None:
            return self.reply(handler, 404, headers={"X-Error-Code": "RevisionNotFound"})
        if api:
            return self._api(handler, repo, sha, files, tree=api[2] == "tree")
        if repo in self.gated and token != self.gated[repo]:
            status = 403 if token else 401
            return self.reply(handler, status, headers={"X-Error-Code": "GatedRepo"})
        self._resolve(handler, sha, resolve[3], files)

    def _api(self, handler, repo, sha, files, *, tree) -> None:
        entries = []
        for name, content in files.items():
            entry = {"oid": git_sha1(content), "size": len(content)}
            if name.endswith((".safetensors", ".bin")):
                sha256 = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {
                    "oid": sha256,
                    "sha256": sha256,
                    "size": len(content),
                    "pointerSize": 130,
                }
            entries.append((name, entry))
        if tree:
            body = [{"type": "file", "path": name, **entry} for name, entry in entries]
        else:
            siblings = [
                {"rfilename": name, "blobId": entry["oid"], **entry} for name, entry in entries
            ]
            body = {"id": repo, "sha": sha, "gated": repo in self.gated, "siblings": siblings}
        self.reply(handler, body=body)

    def _resolve(self, handler, sha, name, files) -> None:
        if name not in files:
            return self.reply(handler, 404, headers={"X-Error-Code": "EntryNotFound"})
        content = files[name]
        lfs = name.endswith((".safetensors", ".bin"))
        etag = hashlib.sha256(content).hexdigest() if lfs else git_sha1(content)
        headers = {"X-Repo-Commit": sha, "ETag": f'"{etag}"'}
        if lfs:
            headers |= {"X-Linked-Size": str(len(content)), "X-Linked-ETag": f'"{etag}"'}
        if handler.command == "HEAD":
            handler.send_response(200)
            for key, value in {**headers, "Content-Length": str(len(content))}.items():
                handler.send_header(key, value)
            return handler.end_headers()
        self.send_file(handler, name, content, headers)


class ModelScopeServer(_Server):
    """ModelScope: file listing and download of one repository by revision."""

    def __init__(self) -> None:
        super().__init__()
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}

    def file_of(self, request: Request) -> str | None:
        parts = urlsplit(request.path)
        name = parse_qs(parts.query).get("FilePath")
        return name[0] if name and parts.path.endswith("/repo") else None

    def answer(self, handler) -> None:
        parts = urlsplit(handler.path)
        query = {key: value[0] for key, value in parse_qs(parts.query).items()}
        found = re.fullmatch(r"/api/v1/models/([^/]+/[^/]+)/repo(/files)?", parts.path)
        if self.faults.status:
            return self.reply(handler, self.faults.status, {"Message": "fault"})
        files = found and self.repos.get(found[1], {}).get(query.get("Revision", "master"))
        if files is None:
            return self.reply(handler, 404, {"Code": 404, "Message": "not found"})
        if found[2]:
            entries = [
                {
                    "Path": name,
                    "Name": name,
                    "Type": "blob",
                    "Size": len(content),
                    "Sha256": hashlib.sha256(content).hexdigest(),
                }
                for name, content in files.items()
            ]
            return self.reply(handler, body={"Code": 200, "Data": {"Files": entries}})
        self.send_file(handler, query["FilePath"], files[query["FilePath"]], {})


class KaggleServer(_Server):
    """Kaggle: version, paged file listing and redirected download of model versions."""

    page = 3

    def __init__(self) -> None:
        super().__init__()
        self.models: dict[str, dict[int, dict[str, bytes]]] = {}
        self.gated: set[str] = set()

    def file_of(self, request: Request) -> str | None:
        found = re.fullmatch(r"/blob/(.+)/v(\d+)/(.+)", request.path)
        return found[3] if found else None

    def answer(self, handler) -> None:
        if self.faults.status:
            return self.reply(
                handler, self.faults.status, {"code": self.faults.status, "message": "x"}
            )
        blob = re.fullmatch(r"/blob/(.+)/v(\d+)/(.+)", handler.path)
        if blob:
            content = self.models[blob[1]][int(blob[2])][blob[3]]
            md5 = base64.b64encode(hashlib.md5(content).digest()).decode()
            return self.send_file(handler, blob[3], content, {"X-Goog-Hash": f"md5={md5}"})
        ask = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        model = "/".join((ask["ownerSlug"], ask["modelSlug"], ask["instanceSlug"]))
        if model in self.gated:
            return self.reply(handler, 403, {"code": 403, "message": "consent"})
        versions = self.models.get(model)
        if versions is None or ask.get("versionNumber", max(versions)) not in versions:
            return self.reply(handler, 404, {"code": 404, "message": "not found"})
        call = handler.path.rpartition("/")[2]
        if call == "GetModelInstance":
            return self.reply(handler, body={"versionNumber": max(versions)})
        number = ask["versionNumber"]
        if call == "DownloadModelInstanceVersion":
            there = {"Location": f"{self.url}/blob/{model}/v{number}/{ask['path']}"}
            return self.reply(handler, 302, headers=there)
        names, start = list(versions[number]), int(ask.get("pageToken") or 0)
        files = [
            {"name": name, "size": len(versions[number][name])}
            for name in names[start : start + self.page]
        ]
        more = str(start + self.page) if start + self.page < len(names) else ""
        self.reply(handler, body={"files": files, "nextPageToken": more})
