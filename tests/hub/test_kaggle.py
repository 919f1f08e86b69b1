"""Pulls from Kaggle: the official client against a server that speaks its protocol."""

from __future__ import annotations

import sys
import threading

import pytest

from qnext.errors import HubError
from qnext.hub import Progress, pull

MODEL = "org/model/transformers/small"
NAME = f"kaggle:{MODEL}"
BIG = "model-00001-of-00002.safetensors"


def get(model=NAME, **options):
    return pull(model, **{"progress": False, **options})


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch):
    """The client keeps whole chunks of 1 MiB, and pulls pause before they resume."""
    monkeypatch.setattr("kagglehub.clients.CHUNK_SIZE", 65536)
    monkeypatch.setattr("qnext.hub.job._PAUSE_SECONDS", 0)


@pytest.fixture
def served(kaggle, files):
    kaggle.models["org/model/small"] = {1: {**files, "config.json": b'{"v": 1}'}, 2: files}
    return kaggle


def test_pull_fetches_the_allowed_files_and_nothing_else(served, files, fetched, capfd):
    result = get()
    there = {p.relative_to(result.path).as_posix() for p in result.path.rglob("*") if p.is_file()}
    assert there == fetched
    assert set(served.fetched()) == set(result.files) == fetched
    assert all((result.path / name).read_bytes() == files[name] for name in fetched)
    assert result.revision == "2"
    assert capfd.readouterr() == ("", "")


def test_second_pull_fetches_nothing_again(served):
    path = get().path
    served.requests.clear()
    assert get().path == path
    assert served.fetched() == []


@pytest.mark.parametrize("model", [f"{NAME}/1", f"{NAME}@1"])
def test_pinned_version(served, model):
    result = get(model)
    assert result.revision == "1"
    assert (result.path / "config.json").read_bytes() == b'{"v": 1}'


def test_resumes_with_a_range_after_a_cut(served, files):
    served.faults.cut[BIG] = [300_000]
    assert (get().path / BIG).read_bytes() == files[BIG]
    starts = [r.range for r in served.requests if served.file_of(r) == BIG]
    assert 0 < int(starts[-1].removeprefix("bytes=").removesuffix("-")) <= 300_000


def test_gives_up_when_nothing_comes(served):
    served.faults.cut[BIG] = [0] * 20
    with pytest.raises(HubError, match="cannot be reached"):
        get()
    assert len(served.faults.cut[BIG]) > 15


def test_a_later_pull_resumes_with_a_range(served, files):
    served.faults.cut[BIG] = [300_000] + [0] * 20
    with pytest.raises(HubError, match="cannot be reached") as caught:
        get()
    assert "again" in caught.value.hint
    with pytest.raises(HubError, match="incomplete"):
        get(offline=True)
    served.faults.cut.clear()
    served.requests.clear()
    assert (get().path / BIG).read_bytes() == files[BIG]
    starts = [r.range for r in served.requests if served.file_of(r) == BIG]
    assert 0 < int(starts[-1].removeprefix("bytes=").removesuffix("-")) <= 300_000


def test_offline(served, fetched):
    with pytest.raises(HubError, match="not on this machine"):
        get(offline=True)
    assert served.requests == []
    online = get()
    served.requests.clear()
    assert set(get(offline=True).files) == fetched
    assert (get(offline=True).path, get(offline=True).revision) == (online.path, "2")
    with pytest.raises(HubError, match="not on this machine"):
        get(f"{NAME}/1", offline=True)
    assert served.requests == []


def test_altered_bytes(served, files):
    served.faults.body[BIG] = b"x" + files[BIG][1:]
    with pytest.raises(HubError, match="damaged"):
        get()
    served.faults.body.clear()
    assert (get().path / BIG).read_bytes() == files[BIG]


def test_no_such_model_version_or_framework(served):
    with pytest.raises(HubError, match="There is no model org/other/transformers/small on Kaggle"):
        get("kaggle:org/other/transformers/small")
    with pytest.raises(HubError, match="at revision '9'"):
        get(f"{NAME}/9")
    with pytest.raises(HubError, match="'abacus' is not a valid ModelFramework"):
        get("kaggle:org/model/abacus/small")


def test_gated(served):
    served.gated.add("org/model/small")
    with pytest.raises(HubError, match="gated on Kaggle") as caught:
        get()
    assert "KAGGLE_API_TOKEN" in caught.value.hint


def test_token_is_sent(served, monkeypatch):
    monkeypatch.setenv("KAGGLE_API_TOKEN", "secret")
    get()
    assert served.requests[0].token == "secret"


def test_server_down_uses_the_copy(served, caplog):
    online = get()
    served.faults.status = 503
    assert get().path == online.path
    assert "no answer" in caplog.text


def test_local_dir_and_progress(served, files, fetched, tmp_path):
    seen = []

    class Recorder(Progress):
        def update(self, done):
            seen.append(done)

    served.faults.cut[BIG] = [300_000] + [0] * 20
    with pytest.raises(HubError):
        get(local_dir=tmp_path / "here")
    served.faults.cut.clear()
    with pytest.raises(HubError, match="incomplete"):
        get(local_dir=tmp_path / "here", offline=True)
    result = get(local_dir=tmp_path / "here", progress=Recorder())
    assert result.path == tmp_path / "here"
    assert {p.name for p in result.path.iterdir() if p.is_file()} == fetched
    assert (result.path / BIG).read_bytes() == files[BIG]
    assert seen[-1] == result.bytes == sum(len(files[name]) for name in fetched)
    assert len(set(seen)) > 4
    assert get(local_dir=tmp_path / "here", offline=True).revision == "2"


def test_mtp_only(served):
    get(mtp_only=True)
    assert BIG not in served.fetched()


def test_two_pulls_at_once(served, files, fetched):
    results = []
    threads = [threading.Thread(target=lambda: results.append(get())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [set(r.files) for r in results] == [fetched, fetched]
    assert sorted(served.fetched()) == sorted(fetched)


def test_client_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "kagglehub.clients", None)
    with pytest.raises(HubError, match="needs the package kagglehub") as caught:
        get()
    assert "pip install" in caught.value.hint
