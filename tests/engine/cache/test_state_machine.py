"""Random lives of a small cache against the plainest oracle: what every row and state should be.

``World`` checks all that a sequence reads, ``cache.check`` the books after every step, and the
expected hit is found by looking at every snapshot there is.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import hypothesis.strategies as st
from fake_cache import NAN, World
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from qnext.engine.cache import DiskTier, HostTier
from qnext.engine.cache.entries import Snapshot

TURN = 0
tokens = st.lists(st.integers(0, 3), min_size=1, max_size=14)
salts = st.sampled_from([b"", b"", b"adapter"])


def subset(data, choices):
    return data.draw(st.sampled_from(sorted(choices)))


class Lives(RuleBasedStateMachine):
    needs_state = True
    enabled = True
    tiered = False

    @initialize(
        capacity=st.sampled_from([16, 20, 24, 32, 96]),
        size=st.sampled_from([1, 2, 4, 8]),
        slots=st.integers(1, 8),
        interval=st.sampled_from([None, None, 6]),
    )
    def start(self, capacity, size, slots, interval):
        self.options = {
            "num_blocks": capacity // size,
            "block_size": size,
            "num_slots": slots,
            "needs_state": self.needs_state,
            "enable_prefix_caching": self.enabled,
            "snapshot_interval": interval,
            "turn_end_ids": frozenset({TURN}),
        }
        self.folder = Path(tempfile.mkdtemp()) if self.tiered else None
        self.open_world()
        self.history = [[1, 2, 3], [0, 1, 0, 2, 1, 1, 1, 3, 2]]
        self.goal: dict[int, int] = {}
        self.swapped: list[tuple[list[int], bytes, int, object]] = []
        self.serial = 10

    def open_world(self):
        self.tiers = []
        if self.folder is not None:
            host = HostTier(1_500)
            below = DiskTier(self.folder, 20_000, fingerprint=b"weights", min_tokens=1)
            self.tiers = [host, below]
        self.world = World(**self.options, tiers=self.tiers)

    # ------------------------------------------------------------ rules

    @rule(data=st.data(), suffix=tokens, salt=salts, kind=st.sampled_from(["cut", "whole", "long"]))
    def add(self, data, suffix, salt, kind):
        old = data.draw(st.sampled_from(self.history))
        cut = len(old) if kind == "whole" else data.draw(st.integers(0, len(old)))
        more = {"cut": suffix, "whole": [], "long": [*suffix, *[1] * 16, *suffix]}[kind]
        prompt = [*old[:cut], *more]
        self.begin(prompt, salt, data.draw(st.sampled_from([None, None, len(prompt) - 1])))

    def begin(self, prompt, salt, limit):
        cache = self.world.cache
        if not cache.can_ever_fit(len(prompt) + 6):
            return
        expected = self.best_hit(prompt, salt, len(prompt) if limit is None else limit)
        roomy = bool(cache.blocks.free)
        found = self.world.add(prompt, salt=salt, max_cached=limit)
        if found is None:
            assert not cache.states.num_available
            return
        seq, cached = found
        if not self.world.poisoned:
            right = (cached >= expected) if self.tiered else (cached == expected)
            assert right or not roomy
            assert cached <= expected or self.tiered
        self.goal[seq] = len(prompt)
        self.history.append(list(prompt))

    def best_hit(self, prompt, salt, limit):
        cache, tensors = self.world.cache, self.world.tensors
        if not self.enabled:
            return 0
        whole = (salt, *prompt)
        if self.needs_state:
            there = [s for s, o in enumerate(cache.states.owners) if isinstance(o, Snapshot)]
            known = [tensors.states[slot] for slot in there]
        else:
            limit = min(limit, len(prompt) - 1)
            known = [tensors.rows[block][-1] for block in cache.index.node_of]
        fits = [len(k) - 1 for k in known if k == whole[: len(k)] and len(k) - 1 <= limit]
        return max(fits, default=0)

    def prefilling(self):
        return [s for s in self.goal if self.world.cache.position(s) < self.goal[s]]

    def decoding(self):
        return [s for s in self.goal if self.world.cache.position(s) >= self.goal[s]]

    @precondition(lambda self: self.prefilling())
    @rule(data=st.data(), size=st.sampled_from([1, 3, 8, 99]))
    def piece(self, data, size):
        seq = subset(data, self.prefilling())
        stop = min(self.goal[seq], self.world.cache.position(seq) + size)
        before = list(self.world.cache.block_table(seq))
        if not self.world.piece(seq, stop):
            assert self.world.cache.block_table(seq) == before

    @precondition(lambda self: self.prefilling())
    @rule(data=st.data(), size=st.integers(1, 12))
    def piece_that_fails(self, data, size):
        seq = subset(data, self.prefilling())
        world, cache = self.world, self.world.cache
        start = cache.position(seq)
        stop = min(self.goal[seq], start + size)
        if not cache.reserve(seq, stop) or seq in world.poisoned:
            return
        slots = [cache.slot(seq), *(slot for _, slot in cache.plan_saves(seq, start, stop))]
        cache.check()
        world.write(seq, start, stop, value=("half",))
        for slot in slots:
            world.tensors.states[slot] = ("half",)
        self.again(seq)

    @precondition(lambda self: self.decoding())
    @rule(data=st.data(), drafts=st.integers(0, 3), token=st.integers(0, 3))
    def decode(self, data, drafts, token):
        seq = subset(data, self.decoding())
        if self.world.cache.can_ever_fit(len(self.world.tokens[seq]) + 1 + drafts):
            accepted = data.draw(st.integers(0, drafts))
            self.world.decode(seq, token, drafts, accepted)

    @precondition(lambda self: self.goal)
    @rule(data=st.data(), left=st.integers(0, 4))
    def grab(self, data, left):
        seq, cache = subset(data, self.goal), self.world.cache
        blocks = len(cache.block_table(seq)) + cache.blocks.num_available - left
        assert cache.reserve(seq, blocks * cache.block_size)

    @precondition(lambda self: self.goal)
    @rule(data=st.data())
    def finish(self, data):
        seq = subset(data, self.goal)
        if seq in self.world.poisoned:
            return
        self.history.append(list(self.world.tokens[seq]))
        self.world.finish(seq)
        del self.goal[seq]

    @precondition(lambda self: self.goal)
    @rule(data=st.data())
    def abort(self, data):
        seq = subset(data, self.goal)
        if seq not in self.world.poisoned:
            self.world.discard(seq)
            del self.goal[seq]

    @precondition(lambda self: self.goal)
    @rule(data=st.data())
    def preempt(self, data):
        seq = subset(data, self.goal)
        if seq not in self.world.poisoned:
            self.again(seq)

    def again(self, seq):
        prompt, salt = self.world.tokens[seq], self.world.salts[seq]
        self.world.discard(seq)
        del self.goal[seq]
        self.begin(prompt, salt, None)

    @precondition(lambda self: self.goal)
    @rule(data=st.data())
    def poison(self, data):
        self.world.poison(subset(data, self.goal))

    @precondition(lambda self: self.world.poisoned)
    @rule()
    def fail_the_poisoned(self):
        # The guard finds every sequence with such values in the step that made them.
        for seq in sorted(self.world.poisoned):
            self.world.discard(seq, poisoned=True)
            del self.goal[seq]
        tensors, index = self.world.tensors, self.world.cache.index
        assert NAN not in tensors.states
        assert not any(NAN in tensors.rows[block] for block in index.node_of)
        for block, snapshots in index.tails.items():
            for snapshot in snapshots:
                assert NAN not in tensors.rows[block][: len(snapshot.tail)]

    @precondition(lambda self: self.goal)
    @rule(data=st.data())
    def swap_out(self, data):
        seq = subset(data, self.goal)
        if seq not in self.world.poisoned:
            state = self.world.cache.swap_out(seq)
            world, goal = self.world, self.goal.pop(seq)
            self.swapped.append((world.tokens[seq], world.salts[seq], goal, state))
            world.forget(seq)

    @precondition(lambda self: self.swapped)
    @rule(data=st.data())
    def swap_in(self, data):
        place = data.draw(st.integers(0, len(self.swapped) - 1))
        ids, salt, goal, state = self.swapped[place]
        self.serial += 1
        seq = 1000 + self.serial
        if self.world.cache.swap_in(seq, state):
            del self.swapped[place]
            self.world.tokens[seq], self.world.salts[seq] = ids, salt
            self.goal[seq] = goal

    @precondition(lambda self: self.goal)
    @rule(data=st.data(), more=tokens)
    def fork(self, data, more):
        parent = subset(data, self.goal)
        world, cache = self.world, self.world.cache
        if parent in world.poisoned:
            return
        self.serial += 1
        child = 1000 + self.serial
        ids = world.tokens[parent][: cache.position(parent)]
        if cache.fork(parent, child, ids):
            world.tokens[child], world.salts[child] = ids, world.salts[parent]
            self.goal[child] = len(ids)
            if cache.can_ever_fit(len(ids) + 1):
                world.decode(child, more[0])

    @precondition(lambda self: self.tiered and not self.swapped)
    @rule(crash=st.booleans())
    def restart(self, crash):
        for seq in list(self.goal):
            self.world.discard(seq, poisoned=seq in self.world.poisoned)
        self.goal.clear()
        if crash:
            self.tiers[1].close()
        else:
            self.world.cache.close()
        first = self.world.next_id
        self.open_world()
        self.world.next_id = first

    # ------------------------------------------------------------ what always holds

    @invariant()
    def the_books_are_right(self):
        cache = self.world.cache
        cache.check({seq: cache.position(seq) for seq in self.goal})
        for seq in self.goal:
            self.world.look(seq)
        if self.tiered:
            self.tiers[1].flush()  # so that a failure can be repeated
            assert self.tiers[0].stats.nbytes <= self.tiers[0].max_bytes
            assert self.tiers[1].stats.nbytes <= self.tiers[1].max_bytes
            assert self.tiers[1].stats.damaged == 0

    def teardown(self):
        if not hasattr(self, "world"):
            return
        for seq in list(self.goal):
            self.world.discard(seq, poisoned=seq in self.world.poisoned)
        self.world.cache.check({})
        stats = self.world.cache.stats
        assert stats.blocks_used == stats.slots_used == 0
        assert stats.blocks_cached + stats.blocks_free == self.options["num_blocks"]
        if self.folder is not None:
            self.tiers[1].close()
            shutil.rmtree(self.folder)


class DenseLives(Lives):
    needs_state = False


class PlainLives(Lives):
    enabled = False


class TieredLives(Lives):
    tiered = True


class TieredDenseLives(Lives):
    needs_state = False
    tiered = True


TestHybrid = Lives.TestCase
TestHybrid.settings = settings(max_examples=100, stateful_step_count=50)
TestDense = DenseLives.TestCase
TestDense.settings = settings(max_examples=40, stateful_step_count=50)
TestTiers = TieredLives.TestCase
TestTiers.settings = settings(max_examples=40, stateful_step_count=50)
TestDenseTiers = TieredDenseLives.TestCase
TestDenseTiers.settings = settings(max_examples=20, stateful_step_count=50)
TestWithoutCache = PlainLives.TestCase
TestWithoutCache.settings = settings(max_examples=20, stateful_step_count=40)
