"""Host memory and disk below the device: round trips, bounds, damage, restarts."""

from __future__ import annotations

import json
import os
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from fake_cache import World

from qnext.engine.cache import DiskTier, HostTier
from qnext.errors import ConfigError

LONG = list(range(100, 123))
NAMES = [f"{n:064x}" for n in range(40)]


def entry(n, size=16):
    return {
        "a": torch.arange(n, n + size, dtype=torch.float32),
        "b": torch.full((2, 3), n, dtype=torch.bfloat16),
    }


def same(found, wanted):
    assert found is not None
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8))


def disk(folder, max_bytes=1 << 20, **options):
    return DiskTier(folder, max_bytes, fingerprint=b"weights", **{"min_tokens": 1, **options})


def files(folder: Path):
    return sorted(folder.glob("*.safetensors"))


# ---------------------------------------------------------------- one tier by itself


def test_host_keeps_what_was_used_last_within_its_bytes():
    tier = HostTier(3 * 76)
    for n in range(3):
        assert tier.put(NAMES[n], entry(n)) == []
    same(tier.get(NAMES[0]), entry(0))
    [(name, tensors)] = tier.put(NAMES[3], entry(3))
    assert name == NAMES[1]
    same(tensors, entry(1))
    assert [tier.contains(n) for n in NAMES[:4]] == [True, False, True, True]
    assert tier.get(NAMES[1]) is None
    assert tier.stats.nbytes == 3 * 76
    [(name, _)] = tier.put(NAMES[4], entry(4, size=1000))
    assert name == NAMES[4], "what is larger than the tier goes straight through"
    assert tier.stats.entries == 3


@pytest.mark.parametrize("make", [lambda _: HostTier(1 << 20), disk], ids=["host", "disk"])
def test_states_are_found_by_their_block(make, tmp_path):
    tier = make(tmp_path)
    state = f"{NAMES[1]}-3-{NAMES[2]}"
    tier.put(NAMES[1], entry(1))
    tier.put(state, entry(2))
    assert list(tier.states_of(NAMES[1])) == [state]
    assert list(tier.states_of(NAMES[2])) == []
    tier.remove(state)
    assert list(tier.states_of(NAMES[1])) == []
    assert tier.get(state) is None
    assert tier.get(NAMES[1]) is not None


def test_disk_survives_a_restart(tmp_path):
    tier = disk(tmp_path)
    for n in range(4):
        tier.put(NAMES[n], entry(n))
        same(tier.get(NAMES[n]), entry(n))  # written or not
    tier.close()
    again = disk(tmp_path)
    for n in range(4):
        same(again.get(NAMES[n]), entry(n))
    assert again.stats.hits == 4
    assert again.stats.damaged == 0
    again.close()


def test_disk_deletes_the_least_recently_used_files(tmp_path):
    tier = disk(tmp_path)
    tier.put(NAMES[0], entry(0))
    tier.flush()
    [path] = files(tmp_path)
    size = path.stat().st_size
    tier.close()
    tier = disk(tmp_path, max_bytes=3 * size + size // 2)
    for n in range(1, 5):
        tier.put(NAMES[n], entry(n))
        tier.flush()
        if n == 2:
            assert tier.get(NAMES[0]) is not None
    assert [tier.contains(n) for n in NAMES[:5]] == [True, False, False, True, True]
    assert [path.stem for path in files(tmp_path)] == [NAMES[0], NAMES[3], NAMES[4]]
    assert tier.stats.evicted == 2
    tier.close()
    smaller = disk(tmp_path, max_bytes=size + size // 2)
    assert smaller.stats.entries == len(files(tmp_path)) == 1
    smaller.close()


def truncate(path):
    path.write_bytes(path.read_bytes()[:-5])


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-7] ^= 1
    path.write_bytes(bytes(data))


def empty(path):
    path.write_bytes(b"")


def rubbish(path):
    path.write_bytes(os.urandom(300))


def enormous_header(path):
    path.write_bytes((1 << 62).to_bytes(8, "little") + path.read_bytes()[8:])


def no_metadata(path):
    header = json.dumps({"a": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)


def other_weights(path):
    other = DiskTier(path.parent / "other", 1 << 20, fingerprint=b"other weights")
    other.put(path.stem, entry(1))
    other.close()
    os.replace(path.parent / "other" / path.name, path)


def another_entry(path):
    path.write_bytes((path.parent / f"{NAMES[2]}.safetensors").read_bytes())


def a_folder(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        flip_a_bit,
        empty,
        rubbish,
        enormous_header,
        no_metadata,
        other_weights,
        another_entry,
        a_folder,
    ],
)
def test_a_damaged_file_is_a_miss_and_deleted_and_counted(tmp_path, damage):
    tier = disk(tmp_path)
    tier.put(NAMES[1], entry(1))
    tier.put(NAMES[2], entry(2))
    tier.close()
    path = tmp_path / f"{NAMES[1]}.safetensors"
    damage(path)
    tier = disk(tmp_path)
    assert tier.get(NAMES[1]) is None
    assert tier.stats.damaged == 1
    assert not tier.contains(NAMES[1])
    assert not path.is_file()
    same(tier.get(NAMES[2]), entry(2))
    tier.close()


def test_a_file_that_another_process_deleted_is_a_miss(tmp_path):
    tier = disk(tmp_path)
    tier.put(NAMES[1], entry(1))
    tier.flush()
    files(tmp_path)[0].unlink()
    assert tier.get(NAMES[1]) is None
    assert tier.stats.damaged == 0
    assert tier.stats.entries == 0
    tier.close()


def test_what_others_wrote_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr("qnext.engine.cache.disk_tier._REFRESH_SECONDS", 0.0)
    one, other = disk(tmp_path), disk(tmp_path)
    one.put(NAMES[1], entry(1))
    one.flush()
    assert other.get(NAMES[1]) is None
    other.refresh()
    same(other.get(NAMES[1]), entry(1))
    one.close()
    other.close()


def test_foreign_files_stay_and_old_half_written_ones_go(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "model.safetensors").write_text("mine too")
    old, new = tmp_path / ".abc-1-0.part", tmp_path / ".abc-1-1.part"
    for path in (old, new):
        path.write_text("half")
    os.utime(old, (0, 0))
    tier = disk(tmp_path)
    assert tier.stats.entries == 0
    tier.close()
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [".abc-1-1.part", "README.md", "model.safetensors"]


def test_a_full_disk_or_queue_costs_the_entry_only(tmp_path, monkeypatch):
    tier = disk(tmp_path)

    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    tier.put(NAMES[1], entry(1))
    tier.flush()
    monkeypatch.undo()
    assert tier.get(NAMES[1]) is None
    tier.put(NAMES[2], entry(2))
    tier.flush()
    same(tier.get(NAMES[2]), entry(2))
    assert (tier.stats.stored, tier.stats.refused) == (1, 1)
    tier.close()

    tier = disk(tmp_path / "slow", queue_bytes=100)
    monkeypatch.setattr(tier, "_store", lambda name, tensors: time.sleep(0.2) or 1)
    for n in range(3):
        tier.put(NAMES[n], entry(n))
    assert tier.stats.refused == 2
    tier.put(NAMES[3], entry(3), wait=True)
    assert tier.contains(NAMES[3])
    tier.close()


def test_bad_bounds_and_folders_are_refused(tmp_path):
    for bad in (HostTier, lambda size: disk(tmp_path, size)):
        with pytest.raises(ConfigError, match="holds nothing"):
            bad(0)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        disk(tmp_path / "file" / "cache")


def test_several_tiers_share_a_folder(tmp_path):
    """Each with a thread and a bound of its own, as processes would be."""
    wrong = []

    def work(seed):
        tier = disk(tmp_path, max_bytes=6000)
        for n in range(60):
            name, asked = (seed * 7 + n * 3) % 20, (n * 5) % 20
            tier.put(NAMES[name], entry(name))
            found = tier.get(NAMES[asked])
            if found is not None and not torch.equal(found["a"], entry(asked)["a"]):
                wrong.append(asked)
            tier.refresh()
        tier.close()
        wrong.extend([seed] * tier.stats.damaged)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    tier = disk(tmp_path)
    assert files(tmp_path)
    for path in files(tmp_path):
        same(tier.get(path.stem), entry(int(path.stem, 16)))
    tier.close()


# ---------------------------------------------------------------- below a cache


def crowd(w, count=6):
    """Push everything else out of a small device."""
    for n in range(count):
        w.serve([1000 + n] * 20)


@pytest.mark.parametrize("needs_state", [True, False])
def test_what_was_evicted_comes_back(needs_state):
    tier = HostTier(1 << 20)
    w = World(num_blocks=8, num_slots=3, needs_state=needs_state, tiers=[tier])
    w.serve(LONG, answer=[1, 2])
    crowd(w)
    wanted = len(LONG) if needs_state else 20
    assert w.serve([*LONG, 9, 9]) == wanted
    assert w.cache.stats.tier_hits == 1
    assert w.cache.stats.tier_tokens_hit == wanted
    assert w.serve([*LONG, 9, 9]) >= wanted


def test_a_state_comes_from_the_tier_and_blocks_from_the_device():
    tier = HostTier(1 << 20)
    w = World(num_blocks=64, num_slots=2, tiers=[tier])
    w.serve(LONG)
    for n in range(4):
        w.serve([1000 + n] * 3)
    reads = tier.stats.hits
    assert w.serve(LONG) == len(LONG)
    assert tier.stats.hits == reads + 1, "its blocks were never evicted"


def test_the_host_overflows_to_the_disk_and_a_restart_finds_it(tmp_path):
    w = World(num_blocks=8, num_slots=3, tiers=[HostTier(3000), disk(tmp_path)])
    w.serve([1, 2, 3])
    w.serve(LONG, answer=[1, 2])
    crowd(w)
    w.cache.close()
    assert files(tmp_path)
    again = World(num_blocks=8, num_slots=3, tiers=[HostTier(3000), disk(tmp_path)])
    assert again.serve([*LONG, 1, 2, 3]) == len(LONG) + 2
    assert again.serve([1003] * 20) == 20
    assert again.serve([1, 2, 3]) == 3
    again.cache.close()
    for options in ({"fingerprint": b"new weights"}, {"block_size": 8}):
        other = World(**options, tiers=[disk(tmp_path)])
        assert other.serve([*LONG, 1, 2, 3]) == 0
        assert other.serve([1, 2, 3]) == 0
        other.cache.close()


def test_damage_below_a_cache_is_a_shorter_hit(tmp_path):
    w = World(num_blocks=16, num_slots=8, tiers=[disk(tmp_path)])
    w.serve(LONG[:12])
    w.serve(LONG)
    w.cache.close()
    by_length = Counter(len(path.stem) for path in files(tmp_path))
    assert by_length[64] == 5
    tier = disk(tmp_path)
    for path in files(tmp_path):
        if path.stem.split("-")[1:2] == ["3"]:
            flip_a_bit(path)  # the state after all 23 tokens
    again = World(num_blocks=16, num_slots=8, tiers=[tier])
    assert again.serve(LONG) == 12
    assert tier.stats.damaged == 1
    again.cache.close()


def test_a_gain_below_the_tiers_minimum_is_not_fetched():
    tier = HostTier(1 << 20, min_tokens=24)
    w = World(num_blocks=8, num_slots=3, tiers=[tier])
    w.serve(LONG)
    crowd(w)
    assert w.serve([*LONG, 5]) == 0
    assert tier.stats.hits == 0


def test_back_off_states_that_nobody_used_are_not_spilled():
    tier = HostTier(1 << 20)
    w = World(num_blocks=256, num_slots=6, tiers=[tier])
    w.serve(range(150))
    for n in range(1, 12):
        w.serve([1000 + n] * 3)
    assert w.cache.stats.evicted_snapshots > 6
    assert [name.split("-")[1] for name in tier._entries if "-" in name].count("2") == 1
    assert {t for name in tier._entries for t in name.split("-")[1:2]} == {"2", "3"}


def test_poison_is_not_kept_below():
    tier = HostTier(1 << 20)
    w = World(num_blocks=40, num_slots=4, tiers=[tier])
    seq, _ = w.add(LONG)
    w.poison(seq)
    assert w.piece(seq, len(LONG))
    crowd(w, 5)
    assert any(b"nan" in bytes(t.tolist()) for e in tier._entries.values() for t in e.values())
    w.discard(seq, poisoned=True)
    assert all(b"nan" not in bytes(t.tolist()) for e in tier._entries.values() for t in e.values())
    assert w.serve(LONG) == 0
