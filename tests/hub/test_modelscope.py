"""Pulls from ModelScope: the official client against a server that speaks its protocol."""

from __future__ import annotations

import sys
import threading
import time

import pytest

from qnext.errors import HubError
from qnext.hub import Progress, pull

REPO = "org/model"
NAME = f"modelscope:{REPO}"
BIG = "model-00001-of-00002.safetensors"


def get(model=NAME, **options):
    return pull(model, **{"progress": False, **options})


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    """The client waits between tries."""
    monkeypatch.setattr("modelscope_hub._download._DownloadControl.sleep", lambda *args: None)


@pytest.fixture
def served(modelscope, files):
    modelscope.repos[REPO] = {"master": files, "v1": {**files, "config.json": b'{"v": 1}'}}
    return modelscope


def test_pull_fetches_the_allowed_files_and_nothing_else(served, files, fetched, capfd):
    result = get()
    there = {p.relative_to(result.path).as_posix() for p in result.path.rglob("*") if p.is_file()}
    assert there == fetched
    assert set(result.files) == fetched
    assert set(served.fetched()) == fetched
    assert all((result.path / name).read_bytes() == files[name] for name in fetched)
    assert result.revision == "master"
    assert "Downloading" not in capfd.readouterr().err


def test_second_pull_fetches_nothing_again(served):
    path = get().path
    served.requests.clear()
    assert get().path == path
    assert served.fetched() == []


def test_pinned_revision(served):
    newest, pinned = get(), get(f"{NAME}@v1")
    assert pinned.revision == "v1"
    assert (pinned.path / "config.json").read_bytes() == b'{"v": 1}'
    assert newest.path != pinned.path


def test_resumes_with_a_range_after_a_cut(served, files, monkeypatch):
    monkeypatch.setattr("modelscope_hub._download.DOWNLOAD_CHUNK_SIZE", 65536)
    served.faults.cut[BIG] = [300_000]
    assert (get().path / BIG).read_bytes() == files[BIG]
    starts = [r.range for r in served.requests if served.file_of(r) == BIG]
    assert starts[0] is None
    assert 0 < int(starts[1].removeprefix("bytes=").removesuffix("-")) <= 300_000


def test_a_later_pull_resumes_what_an_earlier_one_left(served, files, monkeypatch):
    monkeypatch.setattr("modelscope_hub._download.DOWNLOAD_CHUNK_SIZE", 65536)
    served.faults.cut[BIG] = [300_000] + [0] * 20
    with pytest.raises(HubError):
        get()
    served.faults.cut.clear()
    served.requests.clear()
    assert (get().path / BIG).read_bytes() == files[BIG]
    assert [r.range for r in served.requests if served.file_of(r) == BIG] != [None]


def test_offline(served, fetched):
    with pytest.raises(HubError, match="not on this machine"):
        get(offline=True)
    assert served.requests == []
    online = get()
    served.requests.clear()
    assert set(get(offline=True).files) == fetched
    assert get(offline=True).path == online.path
    assert served.requests == []


def test_offline_with_a_part(served):
    get(mtp_only=True)
    assert BIG not in served.fetched()
    with pytest.raises(HubError, match=f"lacks {BIG}"):
        get(offline=True)


def test_altered_bytes(served, files):
    served.faults.body[BIG] = b"x" + files[BIG][1:]
    with pytest.raises(HubError, match="damaged"):
        get()


def test_no_such_repository_and_revision(served):
    with pytest.raises(HubError, match="There is no model org/other on ModelScope"):
        get("modelscope:org/other")
    with pytest.raises(HubError, match="no model org/model at revision 'v9'"):
        get(f"{NAME}@v9")


@pytest.mark.parametrize("status", [401, 403])
def test_refused(served, status):
    served.faults.status = status
    with pytest.raises(HubError, match="refused the credentials") as caught:
        get()
    assert caught.value.hint == "set MODELSCOPE_API_TOKEN"


def test_nobody_listens(modelscope, monkeypatch):
    from modelscope_hub.config import set_default_config

    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:9")
    set_default_config(None)
    with pytest.raises(HubError, match="ModelScope cannot be reached"):
        get()


def test_local_dir_and_progress(served, files, fetched, tmp_path):
    seen = []

    class Recorder(Progress):
        def update(self, done):
            seen.append(done)

    result = get(local_dir=tmp_path / "here", progress=Recorder())
    assert result.path == tmp_path / "here"
    assert {p.name for p in result.path.iterdir() if p.is_file()} == fetched
    assert seen[0] == 0
    assert seen[-1] == result.bytes == sum(len(files[name]) for name in fetched)
    assert len(set(seen)) > 4
    assert set(get(local_dir=tmp_path / "here", offline=True).files) == fetched


def test_two_pulls_at_once(served, files, fetched):
    results = []
    threads = [threading.Thread(target=lambda: results.append(get())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [set(r.files) for r in results] == [fetched, fetched]
    assert (results[0].path / BIG).read_bytes() == files[BIG]


def test_client_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "modelscope.hub.api", None)
    with pytest.raises(HubError, match="needs the package modelscope") as caught:
        get()
    assert "pip install" in caught.value.hint
