"""Pulls from Hugging Face: the official client against a server that speaks its protocol."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from qnext.errors import HubError
from qnext.hub import Progress, pull, resolve_model

REPO = "org/model"
BIG = "model-00001-of-00002.safetensors"
MTP = "model-00002-of-00002.safetensors"


class Recorder(Progress):
    """Keeps what it is told."""

    def __init__(self):
        self.started, self.seen, self.finished = [], [], 0

    def start(self, title, files, total):
        self.started.append((title, files, total))

    def update(self, done):
        self.seen.append(done)

    def finish(self):
        self.finished += 1


def get(model=REPO, **options):
    return pull(model, **{"progress": False, **options})


def read(folder: Path) -> dict[str, bytes]:
    """The files of a folder, without the client's own book-keeping."""
    found = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        if path.is_file() and name.parts[0] != ".cache":
            found[name.as_posix()] = path.read_bytes()
    return found


def test_pull_fetches_the_allowed_files_and_nothing_else(hub, files, fetched):
    sha = hub.commit(REPO, files)
    result = get()
    assert read(result.path) == {name: files[name] for name in fetched}
    assert set(hub.fetched()) == fetched
    assert result.revision == sha
    assert set(result.files) == fetched
    assert result.bytes == sum(len(files[name]) for name in fetched)


def test_hf_prefix_and_second_pull_fetch_nothing_again(hub, files):
    hub.commit(REPO, files)
    first = get()
    hub.requests.clear()
    assert resolve_model(f"hf:{REPO}", progress=False) == first.path
    assert hub.fetched() == []


def test_allow_patterns_narrow_but_never_widen(hub, files):
    hub.commit(REPO, files)
    assert set(get(allow_patterns=["*.json", "*.py", "*.bin"]).files) == {
        "config.json",
        "model.safetensors.index.json",
        "tokenizer.json",
        "vocab.json",
    }


def test_pinned_commit_stays_while_main_moves(hub, files):
    old = hub.commit(REPO, files)
    new = hub.commit(REPO, {**files, "config.json": b'{"new": 1}'})
    pinned, newest = get(f"{REPO}@{old}"), get()
    assert (pinned.revision, newest.revision) == (old, new)
    assert (pinned.path / "config.json").read_bytes() == files["config.json"]
    assert (newest.path / "config.json").read_bytes() == b'{"new": 1}'
    assert get(revision=old).path == pinned.path


def test_branch_with_a_slash_pins(hub, files):
    hub.commit(REPO, files)
    sha = hub.commit(REPO, {**files, "config.json": b"{}"}, ref="refs/pr/1")
    assert get(f"{REPO}@refs/pr/1").revision == sha
    hub.requests.clear()
    assert get(f"{REPO}@refs/pr/1", offline=True).revision == sha
    assert hub.requests == []


def test_main_that_moves_during_the_pull_mixes_nothing(hub, files, monkeypatch):
    from qnext.hub import huggingface

    sha = hub.commit(REPO, files)
    fetch = huggingface.download

    def moving(*args):
        hub.commit(REPO, {**files, BIG: b"other"})
        return fetch(*args)

    monkeypatch.setattr(huggingface, "download", moving)
    result = get()
    assert result.revision == sha
    assert (result.path / BIG).read_bytes() == files[BIG]
    assert get(offline=True).revision == sha


def test_resumes_with_a_range_after_a_cut(hub, files, monkeypatch):
    from huggingface_hub import constants

    # The client keeps whole chunks; its own are 10 MB.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 65536)
    hub.commit(REPO, files)
    hub.faults.cut[BIG] = [300_000]
    result = get()
    assert (result.path / BIG).read_bytes() == files[BIG]
    ranges = [r.range for r in hub.requests if hub.file_of(r) == BIG]
    assert ranges[0] is None
    start = int(ranges[1].removeprefix("bytes=").removesuffix("-"))
    assert 0 < start <= 300_000


def test_a_later_pull_keeps_the_finished_files(hub, files, fetched, monkeypatch):
    import time

    hub.commit(REPO, files)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    hub.faults.cut[MTP] = [0] * 50
    with pytest.raises(HubError, match="cannot be reached") as caught:
        get()
    assert "again" in caught.value.hint
    with pytest.raises(HubError, match=r"not on this machine|incomplete"):
        get(offline=True)
    hub.faults.cut.clear()
    hub.requests.clear()
    assert set(get().files) == fetched
    assert MTP in hub.fetched()
    assert "config.json" not in hub.fetched()


def test_offline_uses_the_copy_and_asks_nobody(hub, files):
    hub.commit(REPO, files)
    online = get()
    hub.requests.clear()
    offline = get(offline=True)
    assert (offline.path, offline.revision) == (online.path, online.revision)
    assert set(offline.files) == set(online.files)
    assert hub.requests == []


def test_offline_without_a_copy(hub, files):
    hub.commit(REPO, files)
    with pytest.raises(HubError, match="not on this machine") as caught:
        get(offline=True)
    assert caught.value.hint == f"run `qnext pull {REPO}` once with network access"
    assert hub.requests == []


def test_offline_with_a_part_of_the_shards(hub, files):
    hub.commit(REPO, files)
    get(mtp_only=True)
    with pytest.raises(HubError, match=f"lacks {BIG}"):
        get(offline=True)


def test_offline_variable_of_the_client_counts(hub, files, monkeypatch):
    from huggingface_hub import constants

    hub.commit(REPO, files)
    online = get()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert get().path == online.path
    assert hub.requests == []


def test_server_down_uses_the_copy_and_says_so(hub, files, caplog):
    hub.commit(REPO, files)
    online = get()
    hub.faults.status = 503
    assert get().path == online.path
    assert "no answer" in caplog.text


def test_server_down_without_a_copy(hub, files):
    hub.commit(REPO, files)
    hub.faults.status = 503
    with pytest.raises(HubError, match="HTTP 503"):
        get()


def test_nobody_listens(hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match="Hugging Face cannot be reached for org/model"):
        get()


def test_no_such_repository(hub):
    with pytest.raises(HubError, match="There is no model org/model on Hugging Face") as caught:
        get()
    assert "HF_TOKEN" in caught.value.hint


def test_no_such_revision(hub, files):
    hub.commit(REPO, files)
    with pytest.raises(HubError, match="org/model has no revision 'v9'"):
        get(f"{REPO}@v9")


def test_gated_without_and_with_the_token(hub, files, monkeypatch):
    hub.commit(REPO, files)
    hub.gated[REPO] = "secret"
    with pytest.raises(HubError, match="gated") as caught:
        get()
    assert "https://huggingface.co/org/model" in caught.value.hint
    monkeypatch.setenv("HF_TOKEN", "other")
    with pytest.raises(HubError, match="gated"):
        get()
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert get().path.is_dir()
    assert {r.token for r in hub.requests[-3:]} == {"secret"}


def test_refused_token(hub, files, monkeypatch):
    hub.commit(REPO, files)
    hub.refused.add("stale")
    monkeypatch.setenv("HF_TOKEN", "stale")
    with pytest.raises(HubError, match=r"refused the credentials .* \(HTTP 401\)"):
        get()


@pytest.mark.parametrize("name", [BIG, "config.json"])
def test_altered_bytes_are_found_and_removed(hub, files, name):
    hub.commit(REPO, files)
    content = files[name]
    hub.faults.body[name] = bytes([content[0] ^ 1]) + content[1:]
    with pytest.raises(HubError, match=f"damaged: {name} .wrong SHA-"):
        get()
    hub.faults.body.clear()
    assert (get().path / name).read_bytes() == content


def test_wrong_size_is_damage(hub, files):
    hub.commit(REPO, files)
    hub.faults.body[BIG] = files[BIG] + b"more"
    with pytest.raises(HubError, match="damaged"):
        get()


def test_a_truncated_copy_in_the_cache_is_found(hub, files):
    hub.commit(REPO, files)
    path = get().path / BIG
    path.resolve().write_bytes(files[BIG][:1000])
    with pytest.raises(HubError, match="1000 bytes instead of 768000"):
        get()
    assert (get().path / BIG).read_bytes() == files[BIG]


def test_progress_gets_all_bytes(hub, files, fetched):
    hub.commit(REPO, files)
    total = sum(len(files[name]) for name in fetched)
    seen = Recorder()
    get(progress=seen)
    assert seen.started[-1] == (REPO, len(fetched), total)
    assert seen.seen == sorted(seen.seen)
    assert seen.seen[0] == 0
    assert seen.seen[-1] == total
    assert len(set(seen.seen)) > 4
    assert seen.finished == 1


def test_progress_counts_what_is_here_already(hub, files, fetched):
    hub.commit(REPO, files)
    get(mtp_only=True)
    seen = Recorder()
    get(progress=seen)
    assert seen.seen[0] == sum(len(files[name]) for name in fetched if name != BIG)


def test_progress_ends_on_an_error_too(hub, files):
    hub.commit(REPO, files)
    hub.faults.body[BIG] = b"short"
    seen = Recorder()
    with pytest.raises(HubError):
        get(progress=seen)
    assert seen.finished == 1


def test_two_pulls_at_once(hub, files, fetched):
    hub.commit(REPO, files)
    results, errors = [], []

    def run():
        try:
            results.append(get())
        except HubError as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert results[0].path == results[1].path
    assert read(results[0].path) == {name: files[name] for name in fetched}


def test_local_dir(hub, files, fetched, tmp_path):
    sha = hub.commit(REPO, files)
    folder = tmp_path / "here"
    result = get(local_dir=folder)
    assert result.path == folder
    assert result.revision == sha
    assert read(folder) == {name: files[name] for name in fetched}
    assert not any(path.is_symlink() for path in folder.rglob("*"))
    hub.requests.clear()
    offline = get(local_dir=folder, offline=True)
    assert (set(offline.files), offline.revision) == (fetched, sha)
    assert hub.requests == []
    with pytest.raises(HubError, match=f"holds commit {sha}"):
        get(f"{REPO}@{'0' * 40}", local_dir=folder, offline=True)
    with pytest.raises(HubError, match="not on this machine"):
        get(local_dir=tmp_path / "absent", offline=True)


def test_mtp_only_fetches_one_shard(hub, files):
    hub.commit(REPO, files)
    result = get(mtp_only=True)
    assert MTP in result.files
    assert BIG not in result.files
    assert BIG not in hub.fetched()
    assert get(mtp_only=True, offline=True).path == result.path


def test_mtp_only_of_a_model_without_mtp(hub, files):
    index = b'{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'
    hub.commit(REPO, {**files, "model.safetensors.index.json": index})
    with pytest.raises(HubError, match=r"lists no mtp\.\*"):
        get(mtp_only=True)
    assert not any(name.endswith(".safetensors") for name in hub.fetched())


def test_pickled_weights_only(hub):
    hub.commit(REPO, {"config.json": b"{}", "pytorch_model.bin": b"x"})
    with pytest.raises(
        HubError, match=r"no safetensors files .it holds config\.json, pytorch_model"
    ):
        get()
    assert hub.fetched() == []


def test_a_name_that_climbs_is_refused(hub, files):
    hub.commit(REPO, {**files, "../evil.json": b"{}"})
    with pytest.raises(HubError, match="unsafe file name"):
        get()
    assert hub.fetched() == []


def test_no_room(hub, files, monkeypatch):
    import shutil

    hub.commit(REPO, files)
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(HubError, match=r"needs 1\.3 MB more, and .* has 1\.0 kB free"):
        get()
    assert hub.fetched() == []


def test_what_another_revision_brought_needs_no_room(hub, files, monkeypatch):
    import shutil

    hub.commit(REPO, files)
    get()
    hub.commit(REPO, {**files, "README.md": b"new"})
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    hub.requests.clear()
    assert (get().path / "README.md").read_bytes() == b"new"
    assert hub.fetched() == ["README.md"]


def test_disk_full_midway(hub, files, monkeypatch):
    import huggingface_hub

    hub.commit(REPO, files)

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(HubError, match="disk is full"):
        get()


def test_real_environment_variables_in_a_fresh_process(hub, files, fetched, tmp_path):
    hub.commit(REPO, files)
    hub.gated[REPO] = "secret"
    code = (
        "import sys; from qnext.hub import pull; assert 'huggingface_hub' not in sys.modules;"
        f"r = pull({REPO!r}); sys.stdout.write(f'{{len(r.files)}} {{r.path}}')"
    )
    env = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": "secret",
    }
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    count, path = done.stdout.split()
    assert int(count) == len(fetched)
    assert path.startswith(str(tmp_path / "home"))
