"""Turns what the hub clients raise into one `HubError` with a hint.

Classes are told apart by name, so that no client is imported and its versions may differ.
"""

from __future__ import annotations

import errno
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from qnext.errors import HubError, QnextError
from qnext.hub.names import ModelRef

_TOKEN = {
    "hf": "set HF_TOKEN or run `hf auth login`",
    "modelscope": "set MODELSCOPE_API_TOKEN",
    "kaggle": "set KAGGLE_API_TOKEN or put kaggle.json into ~/.kaggle",
}
_PAGE = {
    "hf": "https://huggingface.co/{}",
    "modelscope": "https://modelscope.cn/models/{}",
    "kaggle": "https://www.kaggle.com/models/{}",
}
_KEPT = "run the same command again: finished files are kept"
_UNREACHABLE = {
    "ConnectError", "ConnectionError", "NetworkError", "ProxyError", "RemoteProtocolError",
    "ReadError", "ChunkedEncodingError", "IncompleteRead", "SSLError",
}  # fmt: skip
_DAMAGED = {"FileIntegrityError", "FileSizeMismatchError", "DataCorruptionError"}
_NOT_CACHED = {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "CacheNotFound"}


def import_client(module: str, ref: ModelRef) -> ModuleType:
    """Import an optional client.

    Raises:
        HubError: it is not installed.
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise HubError(
            f"Pulling {ref} needs the package {package}, which cannot be imported ({error}).",
            hint=f"pip install {package}",
        ) from error


@contextmanager
def hub_errors(ref: ModelRef) -> Iterator[None]:
    """Raise `HubError` for whatever a client raises in this block."""
    try:
        yield
    except QnextError:
        raise
    except Exception as error:
        raise explain(error, ref) from error


def is_unreachable(error: BaseException) -> bool:
    """Whether the hub did not answer (or answered with a server error), so a cached copy may do."""
    chain = _chain(error)
    return _status(chain) >= 500 or any(
        _is(e, _UNREACHABLE | {"OfflineModeIsEnabled"}) or _timed_out(e) for e in chain
    )


def explain(error: BaseException, ref: ModelRef) -> HubError:
    """The `HubError` for what a client raised while it worked on ``ref``."""
    chain = _chain(error)
    status = _status(chain)
    hub, page = ref.title, _PAGE[ref.hub].format(ref.name)

    def has(*names: str) -> bool:
        return any(_is(e, set(names)) for e in chain)

    code = next((e.errno for e in chain if isinstance(e, OSError) and e.errno), None)
    if code in (errno.ENOSPC, errno.EDQUOT):
        return HubError(
            f"The disk is full while pulling {ref}.", hint=f"free some space, then {_KEPT}"
        )
    if code in (errno.EACCES, errno.EPERM, errno.EROFS):
        return HubError(
            f"{ref} cannot be written: {_line(error)}",
            hint="use local_dir, or another cache folder",
        )
    if any(_is(e, _DAMAGED) for e in chain) or "Consistency check failed" in str(error):
        return HubError(f"A file of {ref} arrived damaged: {_line(error)}", hint=_KEPT)
    if has("GatedRepoError") or (status == 403 and ref.hub != "modelscope"):
        return HubError(
            f"{ref} is gated on {hub}, and access is not granted to you.",
            hint=f"accept its terms at {page}, then {_TOKEN[ref.hub]}",
        )
    if has("RevisionNotFoundError"):
        return HubError(
            f"{ref.name} has no revision {ref.revision!r} on {hub}.",
            hint=f"see the branches and tags at {page}",
        )
    if has("RepositoryNotFoundError", "NotExistError") or status == 404:
        at = f" at revision {ref.revision!r}" if ref.revision else ""
        return HubError(
            f"There is no model {ref.name}{at} on {hub} that you may see.",
            hint=f"check the spelling at {page}; if it is private, {_TOKEN[ref.hub]}",
        )
    if status in (401, 403) or has("UnauthenticatedError", "AuthenticationError"):
        return HubError(
            f"{hub} refused the credentials for {ref} (HTTP {status or 401}).", hint=_TOKEN[ref.hub]
        )
    if status == 429:
        return HubError(
            f"{hub} limits the rate of requests for {ref} (HTTP 429).", hint=f"wait, then {_KEPT}"
        )
    if status >= 500:
        return HubError(
            f"{hub} has a fault of its own on {ref} (HTTP {status}).", hint=f"wait, then {_KEPT}"
        )
    if any(_is(e, _UNREACHABLE) for e in chain):
        return HubError(
            f"{hub} cannot be reached for {ref}.", hint=f"check the network, then {_KEPT}"
        )
    if any(_timed_out(e) for e in chain):
        return HubError(
            f"{hub} did not answer in time for {ref}.", hint=f"check the network, then {_KEPT}"
        )
    if any(_is(e, _NOT_CACHED) or (type(e) is FileNotFoundError and not e.errno) for e in chain):
        return HubError(
            f"{ref} is not on this machine, and offline mode is on.",
            hint=f"run `qnext pull {ref}` once with network access",
        )
    return HubError(f"Pulling {ref} failed: {type(error).__name__}: {_line(error)}", hint=_KEPT)


def _chain(error: BaseException | None) -> list[BaseException]:
    """The error with its causes and, from ModelScope, the errors of its files."""
    chain: list[BaseException] = []
    queue = [error]
    while queue:
        item = queue.pop(0)
        if item is None or item in chain:
            continue
        chain.append(item)
        queue += [item.__cause__, item.__context__, *getattr(item, "failed_files", {}).values()]
    return chain


def _is(error: BaseException, names: set[str]) -> bool:
    return any(kind.__name__ in names for kind in type(error).__mro__)


def _timed_out(error: BaseException) -> bool:
    return any(
        "Timeout" in kind.__name__ or "Deadline" in kind.__name__ for kind in type(error).__mro__
    )


def _status(chain: list[BaseException]) -> int:
    for error in chain:
        for holder in (error, getattr(error, "response", None)):
            code = getattr(holder, "status_code", None)
            if isinstance(code, int):
                return code
    return 0


def _line(error: BaseException) -> str:
    """The first line of the message, for one sentence."""
    return next(
        (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
    )
