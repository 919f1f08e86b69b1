"""Random lives of a small cache against the plainest oracle: what every row and state should be.

``World`` checks all that a sequence reads, ``cache.check`` the books after every step, and the
expected hit is found by looking at every snapshot there is.
"""

from __future__ import annotations

import random
from collections import Counter

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from lives import OPERATIONS, Chooser, Life

KINDS = {
    "hybrid": {},
    "attention": {"needs_state": False},
    "no cache": {"enabled": False},
    "tiers": {"tiered": True},
    "attention with tiers": {"needs_state": False, "tiered": True},
}


class Draw(Chooser):
    def pick(self, choices):
        return self.source.draw(st.sampled_from(list(choices)))

    def number(self, low, high):
        return self.source.draw(st.integers(low, high))


class Lives(RuleBasedStateMachine):
    kind = "hybrid"
    life: Life | None = None

    @initialize(data=st.data())
    def start(self, data):
        self.life = Life(Draw(data), **KINDS[self.kind])

    @rule(data=st.data(), operation=st.sampled_from(OPERATIONS))
    def do(self, data, operation):
        operation(self.life, Draw(data))

    @invariant()
    def the_books_are_right(self):
        if self.life is not None:
            self.life.check()

    def teardown(self):
        if self.life is not None:
            self.life.close()


class TieredLives(Lives):
    kind = "tiers"


TestHybrid = Lives.TestCase
TestHybrid.settings = settings(max_examples=60, stateful_step_count=30)
TestTiers = TieredLives.TestCase
TestTiers.settings = settings(max_examples=20, stateful_step_count=30)


def walk(kind, seed, steps):
    """One long life; its statistics."""
    choose = Chooser(random.Random(seed))
    life = Life(choose, **KINDS[kind])
    total: Counter[str] = Counter()
    for _ in range(steps):
        before = life.cache
        operation = choose.pick(
            [*OPERATIONS, *[Life.serve] * 4, Life.piece, Life.decode, Life.finish, Life.finish]
        )
        if operation in (Life.restart, Life.poison) and choose.number(0, 9):
            continue
        operation(life, choose)
        life.check()
        if life.cache is not before:
            count(total, before)
    count(total, life.cache)
    life.close()
    return total


def count(total, cache):
    for name in ("queries", "hits", "tier_hits", "evicted_blocks", "evicted_snapshots"):
        total[name] += getattr(cache.stats, name)


@pytest.mark.parametrize("kind", KINDS)
def test_long_walks(kind):
    total: Counter[str] = Counter()
    seeds, steps = (4, 250) if "tiers" in kind else (12, 400)
    for seed in range(seeds):
        total += walk(kind, seed, steps)
    if kind != "no cache":
        assert total["queries"] > 100
        assert total["hits"] > total["queries"] / 15
        assert total["evicted_blocks"] > 500
    if "tiers" in kind:
        assert total["tier_hits"] > 10
