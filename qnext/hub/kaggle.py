"""Kaggle models through `kagglehub`: numbered versions, resume by range, MD5 checked by it.

The client fetches whole bundles or single files and lists nothing itself, so files are listed with
its SDK and fetched one by one: that keeps archives, pickles and code out.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qnext.errors import HubError
from qnext.hub.failures import import_client
from qnext.hub.files import Listing, RemoteFile, local_files
from qnext.hub.names import ModelRef
from qnext.hub.progress import Meter, bar_class, replaced

verifies = True
_WORKERS = 4
_PAGE = 100


def listing(ref: ModelRef) -> Listing:
    """Files of the version (the newest one if none is pinned)."""
    clients = import_client("kagglehub.clients", ref)
    calls = import_client("kagglehub.exceptions", ref)
    types = import_client("kagglesdk.models.types.model_api_service", ref)
    handle = _handle(ref)
    with clients.build_kaggle_client() as client:
        api = client.models.model_api_client
        version = handle.version
        if version is None:
            ask = types.ApiGetModelInstanceRequest()
            _address(ask, handle)
            version = calls.handle_call(lambda: api.get_model_instance(ask), handle).version_number
        files: list[RemoteFile] = []
        page = ""
        while True:
            ask_files = types.ApiListModelInstanceVersionFilesRequest()
            _address(ask_files, handle)
            ask_files.version_number, ask_files.page_size = version, _PAGE
            if page:
                ask_files.page_token = page
            answer = calls.handle_call(
                lambda r=ask_files: api.list_model_instance_version_files(r), handle
            )
            files += [RemoteFile(file.name, file.size or None) for file in answer.files]
            page = answer.next_page_token
            if not page:
                return Listing(str(version), tuple(files))


def _handle(ref: ModelRef) -> Any:
    parse = import_client("kagglehub.handle", ref).parse_model_handle
    return parse(f"{ref.name}/{ref.revision}" if ref.revision else ref.name)


def _address(request: Any, handle: Any) -> None:
    request.owner_slug, request.model_slug = handle.owner, handle.model
    request.framework, request.instance_slug = handle.framework_enum(), handle.variation


def cached(ref: ModelRef, local_dir: Path | None) -> tuple[Path, str | None]:
    """Folder and version of a copy on this machine; the client has no offline mode of its own."""
    cache = import_client("kagglehub.cache", ref)
    handle = _handle(ref)
    if handle.version is None:
        # Versions are folders of the cache; in a folder of the user's, of the client's notes there.
        if local_dir is None:
            versions = Path(cache.get_cached_path(handle.with_version(1))).parent
        else:
            versions = local_dir.joinpath(
                cache.FILE_COMPLETION_MARKER_FOLDER, "models", *ref.name.split("/")
            )
        numbers = [int(p.name) for p in versions.glob("*") if p.is_dir() and p.name.isdigit()]
        handle = handle.with_version(max(numbers, default=1))
    folder = local_dir or Path(cache.get_cached_path(handle))
    its = cache.Cache(override_dir=None if local_dir is None else str(local_dir))
    names = [file.name for file in local_files(folder)] if folder.is_dir() else []
    if not names:
        raise FileNotFoundError(f"no files of {ref}")
    # A file that is still coming lies under its final name already.
    parts = (
        []
        if its.load_from_cache(handle)
        else [n for n in names if not its.load_from_cache(handle, n)]
    )
    if parts:
        raise HubError(
            f"The local copy of {ref} in {folder} is incomplete: "
            f"{parts[0]} was not fetched to its end.",
            hint="pull it once with network access; finished files are kept",
        )
    return folder, str(handle.version)


def stored(ref: ModelRef, file: RemoteFile, local_dir: Path | None) -> bool:
    """No: the client shares nothing between revisions."""
    return False


def store(local_dir: Path | None) -> Path:
    """Where the bytes will lie, to see whether there is room."""
    from kagglehub.config import get_cache_folder

    return local_dir or Path(get_cache_folder())


def download(
    ref: ModelRef, found: Listing, names: list[str], local_dir: Path | None, meter: Meter, have: int
) -> Path:
    """Fetch ``names`` of the listed version; bytes go to ``meter`` on top of ``have``."""
    from filelock import FileLock

    kagglehub = import_client("kagglehub", ref)
    handle = _handle(ModelRef(ref.hub, ref.name, found.revision))
    folder = local_dir or Path(import_client("kagglehub.cache", ref).get_cached_path(handle))
    folder.parent.mkdir(parents=True, exist_ok=True)

    def fetch(name: str) -> None:
        where = {} if local_dir is None else {"output_dir": str(local_dir)}
        try:
            kagglehub.model_download(str(handle), name, **where)
        except FileExistsError:
            # It resumes in its cache only; in a folder of the user's a part is fetched anew.
            kagglehub.model_download(str(handle), name, force_download=True, **where)

    with (
        # The client takes no lock of its own and writes under the final name.
        FileLock(folder.parent / f".qnext-{folder.name}.lock"),
        meter.stage(have, overlapping=False),
        replaced("kagglehub.clients", "tqdm", bar_class(meter)),
        _quiet(),
        ThreadPoolExecutor(_WORKERS) as pool,
    ):
        for _ in pool.map(fetch, names):
            pass
    return folder


def finish(ref: ModelRef, found: Listing, local_dir: Path | None) -> None:
    """Nothing to note: the client marks each finished file."""


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the client's notes off standard output, where `--json` writes."""
    its = logging.getLogger("kagglehub")
    level = its.level
    its.setLevel(logging.WARNING)
    try:
        yield
    finally:
        its.setLevel(level)
