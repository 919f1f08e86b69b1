"""One sentence and a hint for whatever a client raises; clients are imported on use only."""

from __future__ import annotations

import subprocess
import sys

import pytest

from qnext.errors import ConfigError, HubError
from qnext.hub.failures import explain, hub_errors, is_unreachable
from qnext.hub.names import ModelRef

REF = ModelRef("hf", "org/name", "v1")


def named(name: str, message: str = "x", **attributes: object) -> Exception:
    error = type(name, (Exception,), {})(message)
    error.__dict__.update(attributes)
    return error


class Response:
    def __init__(self, status_code):
        self.status_code = status_code


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(28, "No space left on device"), "disk is full"),
        (PermissionError(13, "Permission denied", "/cache"), "cannot be written"),
        (named("GatedRepoError", response=Response(401)), "is gated"),
        (named("RepositoryNotFoundError", response=Response(401)), "no model org/name"),
        (named("RevisionNotFoundError", response=Response(404)), "no revision 'v1'"),
        (named("HfHubHTTPError", response=Response(401)), "refused the credentials"),
        (named("HfHubHTTPError", response=Response(429)), "limits the rate"),
        (named("HfHubHTTPError", response=Response(502)), "fault of its own"),
        (named("ReadTimeout"), "did not answer in time"),
        (TimeoutError("slow"), "did not answer in time"),
        (ConnectionRefusedError(111, "refused"), "cannot be reached"),
        (named("ProxyError"), "cannot be reached"),
        (named("LocalEntryNotFoundError"), "not on this machine"),
        (OSError("Consistency check failed: file should be of size 3"), "arrived damaged"),
        (named("DataCorruptionError"), "arrived damaged"),
        (named("FileDownloadError", failed_files={"a": OSError(28, "full")}), "disk is full"),
        (named("Surprise", "first line\nsecond"), "Surprise: first line"),
    ],
)
def test_every_failure_has_a_sentence_and_a_hint(error, words):
    result = explain(error, REF)
    assert words in str(result)
    assert "\n" not in str(result)
    assert result.hint


def test_the_cause_tells_more_than_what_it_caused():
    error = named("LocalEntryNotFoundError")
    error.__cause__ = named("ConnectError")
    assert "cannot be reached" in str(explain(error, REF))
    assert is_unreachable(error)
    assert not is_unreachable(named("RepositoryNotFoundError", response=Response(404)))


def test_own_errors_pass_and_foreign_ones_are_chained():
    with pytest.raises(ConfigError), hub_errors(REF):
        raise ConfigError("own")
    foreign = ValueError("theirs")
    with pytest.raises(HubError) as caught, hub_errors(REF):
        raise foreign
    assert caught.value.__cause__ is foreign
    with pytest.raises(KeyboardInterrupt), hub_errors(REF):
        raise KeyboardInterrupt


def test_import_is_light():
    code = (
        "import sys; import qnext.hub;"
        "heavy = {'huggingface_hub', 'modelscope', 'kagglehub', 'torch', 'rich', 'tqdm'};"
        "sys.exit(' '.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
