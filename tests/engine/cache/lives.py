"""The life of a small cache: everything an engine may do to it, in any order, checked as it goes.

What to do with is drawn from a ``Chooser``, so that the same operations serve hypothesis, which
shrinks, and long random walks, which get further.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from fake_cache import NAN, World

from qnext.engine.cache import DiskTier, HostTier
from qnext.engine.cache.entries import Snapshot

TURN = 0


class Chooser:
    """Draws from a ``random.Random``; the state machine has one that asks hypothesis."""

    def __init__(self, source):
        self.source = source

    def pick(self, choices):
        return self.source.choice(list(choices))

    def number(self, low, high):
        return self.source.randint(low, high)

    def tokens(self, most):
        return [self.number(0, 3) for _ in range(self.number(1, most))]


class Life:
    """One cache and what became of it.

    Args:
        choose: draws the sizes.
        needs_state: hybrid or attention only.
        enabled: prefix caching.
        tiered: with tiers in host memory and on disk.
    """

    def __init__(self, choose, *, needs_state=True, enabled=True, tiered=False):
        size = choose.pick([1, 2, 4, 8])
        self.needs_state, self.enabled = needs_state, enabled
        self.options = {
            "num_blocks": choose.pick([16, 20, 24, 32, 96]) // size,
            "block_size": size,
            "num_slots": choose.pick([1, 2, 3, 4, 6, 12]),
            "needs_state": needs_state,
            "enable_prefix_caching": enabled,
            "snapshot_interval": choose.pick([None, None, 6]),
            "turn_end_ids": frozenset({TURN}),
        }
        self.folder = Path(tempfile.mkdtemp()) if tiered else None
        self.open_world()
        self.history = [[1, 2, 3], [0, 1, 0, 2, 1, 1, 1, 3, 2]]
        self.goal: dict[int, int] = {}
        self.swapped: list[tuple[list[int], bytes, int, object]] = []

    def open_world(self):
        self.tiers = []
        if self.folder is not None:
            host = HostTier(1_500)
            below = DiskTier(self.folder, 30_000, fingerprint=b"weights", min_tokens=1)
            self.tiers = [host, below]
        self.world = World(**self.options, tiers=self.tiers)
        self.cache = self.world.cache

    # ------------------------------------------------------------ who there is

    @property
    def healthy(self):
        return [s for s in self.goal if s not in self.world.poisoned]

    @property
    def prefilling(self):
        return [s for s in self.goal if self.cache.position(s) < self.goal[s]]

    @property
    def decoding(self):
        return [s for s in self.goal if self.cache.position(s) >= self.goal[s]]

    # ------------------------------------------------------------ operations

    def add(self, choose):
        old = choose.pick(self.history)
        kind = choose.pick(["cut", "whole", "long"])
        cut = len(old) if kind == "whole" else choose.number(0, len(old))
        suffix = choose.tokens(12) if kind != "whole" else []
        more = [*suffix, *[1] * 16, *suffix] if kind == "long" else suffix
        prompt = [*old[:cut], *more]
        salt = choose.pick([b"", b"", b"adapter"])
        return self.begin(prompt, salt, choose.pick([None, None, None, len(prompt) - 1]))

    def begin(self, prompt, salt, limit):
        if not self.cache.can_ever_fit(len(prompt) + 6):
            return None
        expected = self.best_hit(prompt, salt, len(prompt) if limit is None else limit)
        roomy = bool(self.cache.memory.blocks.free)
        found = self.world.add(prompt, salt=salt, max_cached=limit)
        if found is None:
            assert not self.cache.memory.states.num_available
            return None
        seq, cached = found
        if not self.world.poisoned:
            if self.tiers:
                assert cached >= expected or not roomy
            else:
                assert cached == expected if roomy else cached <= expected
        self.goal[seq] = len(prompt)
        self.history = [*self.history[-20:], list(prompt)]
        return seq

    def best_hit(self, prompt, salt, limit):
        """The longest prefix there is on the device, by looking at all there is."""
        memory, tensors = self.cache.memory, self.world.tensors
        if not self.enabled:
            return 0
        whole = (salt, *prompt)
        if self.needs_state:
            there = [s for s, o in enumerate(memory.states.owners) if isinstance(o, Snapshot)]
            known = [tensors.states[slot] for slot in there]
        else:
            limit = min(limit, len(prompt) - 1)
            known = [tensors.rows[block][-1] for block in memory.index.node_of]
        fits = [len(k) - 1 for k in known if k == whole[: len(k)] and len(k) - 1 <= limit]
        return max(fits, default=0)

    def serve(self, choose):
        """A whole request without interruption, as far as there is room."""
        seq = self.add(choose)
        if seq is None:
            return
        while self.cache.position(seq) < self.goal[seq]:
            stop = min(self.goal[seq], self.cache.position(seq) + choose.pick([3, 8, 99]))
            if not self.world.piece(seq, stop):
                return
        for token in choose.tokens(6):
            if not self.cache.can_ever_fit(len(self.world.tokens[seq]) + 3):
                break
            if not self.world.decode(seq, token, 2, choose.number(0, 2)):
                break
        if seq not in self.world.poisoned:
            self.end(seq)

    def piece(self, choose):
        if self.prefilling:
            seq = choose.pick(self.prefilling)
            stop = min(self.goal[seq], self.cache.position(seq) + choose.pick([1, 3, 8, 99]))
            before = list(self.cache.block_table(seq))
            if not self.world.piece(seq, stop):
                assert self.cache.block_table(seq) == before

    def failing_piece(self, choose):
        """A step that raised: rows and slots are half written, and nothing is committed."""
        able = [s for s in self.prefilling if s in self.healthy]
        if not able:
            return
        seq = choose.pick(able)
        start = self.cache.position(seq)
        stop = min(self.goal[seq], start + choose.number(1, 12))
        if not self.cache.reserve(seq, stop):
            return
        slots = [slot for _, slot in self.cache.plan_saves(seq, start, stop)]
        self.cache.check()
        self.world.write(seq, start, stop, value=("half",))
        for slot in (self.cache.slot(seq), *slots):
            self.world.tensors.states[slot] = ("half",)
        self.again(seq)

    def decode(self, choose):
        if self.decoding:
            seq, drafts = choose.pick(self.decoding), choose.number(0, 3)
            if self.cache.can_ever_fit(len(self.world.tokens[seq]) + 1 + drafts):
                self.world.decode(seq, choose.number(0, 3), drafts, choose.number(0, drafts))

    def grab(self, choose):
        """Reserve nearly all there is."""
        if self.goal:
            seq = choose.pick(self.goal)
            left = min(choose.number(0, 4), self.cache.memory.blocks.num_available)
            blocks = self.cache.memory.blocks.num_available - left
            blocks += len(self.cache.block_table(seq))
            assert self.cache.reserve(seq, blocks * self.cache.block_size)

    def finish(self, choose):
        if self.healthy:
            self.end(choose.pick(self.healthy))

    def end(self, seq):
        self.history.append(list(self.world.tokens[seq]))
        self.world.finish(seq)
        del self.goal[seq]

    def abort(self, choose):
        if self.healthy:
            seq = choose.pick(self.healthy)
            self.world.discard(seq)
            del self.goal[seq]

    def preempt(self, choose):
        if self.healthy:
            self.again(choose.pick(self.healthy))

    def again(self, seq):
        prompt, salt = self.world.tokens[seq], self.world.salts[seq]
        self.world.discard(seq)
        del self.goal[seq]
        self.begin(prompt, salt, None)

    def poison(self, choose):
        if self.goal:
            self.world.poison(choose.pick(self.goal))

    def fail_the_poisoned(self, choose):
        """The guard finds every sequence with such values."""
        for seq in sorted(self.world.poisoned):
            self.world.discard(seq, poisoned=True)
            del self.goal[seq]
        tensors, index = self.world.tensors, self.cache.memory.index
        assert NAN not in tensors.states
        assert not any(NAN in tensors.rows[block] for block in index.node_of)
        for block, snapshots in index.tails.items():
            for snapshot in snapshots:
                assert NAN not in tensors.rows[block][: len(snapshot.tail)]

    def swap_out(self, choose):
        if self.healthy:
            seq = choose.pick(self.healthy)
            state = self.cache.swap_out(seq)
            world, goal = self.world, self.goal.pop(seq)
            self.swapped.append((world.tokens[seq], world.salts[seq], goal, state))
            world.forget(seq)

    def swap_in(self, choose):
        if self.swapped:
            place = choose.number(0, len(self.swapped) - 1)
            ids, salt, goal, state = self.swapped[place]
            seq = self.new_id()
            if self.cache.swap_in(seq, state):
                del self.swapped[place]
                self.world.tokens[seq], self.world.salts[seq] = ids, salt
                self.goal[seq] = goal

    def fork(self, choose):
        if not self.healthy:
            return
        parent, child = choose.pick(self.healthy), self.new_id()
        world = self.world
        ids = world.tokens[parent][: self.cache.position(parent)]
        if self.cache.fork(parent, child, ids):
            world.tokens[child], world.salts[child] = ids, world.salts[parent]
            self.goal[child] = len(ids)
            if self.cache.can_ever_fit(len(ids) + 1):
                world.decode(child, choose.number(0, 3))

    def new_id(self):
        self.world.next_id += 1
        return self.world.next_id - 1

    def restart(self, choose):
        """The process ends, in peace or not; only the disk remains."""
        if not self.tiers or self.swapped:
            return
        for seq in list(self.goal):
            self.world.discard(seq, poisoned=seq in self.world.poisoned)
        self.goal.clear()
        if choose.pick([True, False]):
            self.cache.close()
        else:
            self.tiers[1].close()
        self.open_world()

    # ------------------------------------------------------------ what always holds

    def check(self):
        self.cache.check({seq: self.cache.position(seq) for seq in self.goal})
        for seq in self.goal:
            self.world.look(seq)
        if self.tiers:
            self.tiers[1].flush()  # so that a failure can be repeated
            assert self.tiers[0].stats.nbytes <= self.tiers[0].max_bytes
            assert self.tiers[1].stats.nbytes <= self.tiers[1].max_bytes
            assert self.tiers[1].stats.damaged == 0

    def close(self):
        """At the end everything is free or cached."""
        for seq in list(self.goal):
            self.world.discard(seq, poisoned=seq in self.world.poisoned)
        self.cache.check({})
        stats = self.cache.stats
        assert stats.blocks_used == stats.slots_used == 0
        assert stats.blocks_cached + stats.blocks_free == self.options["num_blocks"]
        if self.folder is not None:
            self.tiers[1].close()
            shutil.rmtree(self.folder)


OPERATIONS = (
    Life.add,
    Life.serve,
    Life.piece,
    Life.failing_piece,
    Life.decode,
    Life.grab,
    Life.finish,
    Life.abort,
    Life.preempt,
    Life.poison,
    Life.fail_the_poisoned,
    Life.swap_out,
    Life.swap_in,
    Life.fork,
    Life.restart,
)
