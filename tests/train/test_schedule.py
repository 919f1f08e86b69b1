"""Warm-up, stable, decay."""

from __future__ import annotations

from itertools import pairwise

import pytest

from qnext.train.config import OptimizerConfig
from qnext.train.schedule import learning_rate

CONFIG = OptimizerConfig(lr=1.0, warmup_steps=10, decay_fraction=0.25, final_lr_ratio=0.1)


def test_the_rate_rises_stays_and_falls() -> None:
    rates = [learning_rate(s, s / 100, CONFIG) for s in range(101)]
    assert rates[:10] == pytest.approx([(s + 1) / 10 for s in range(10)])
    assert rates[10:76] == [1.0] * 66
    falls = [b - a for a, b in pairwise(rates[75:])]
    assert falls == pytest.approx([-0.9 / 25] * 25)
    assert rates[100] == pytest.approx(0.1)


def test_the_clock_decides_the_decay_when_it_is_further() -> None:
    assert learning_rate(50, 0.875, CONFIG) == pytest.approx(0.55)
    assert learning_rate(50, 1.2, CONFIG) == pytest.approx(0.1)


def test_without_decay_or_warm_up_the_rate_is_flat() -> None:
    flat = OptimizerConfig(lr=2.0, warmup_steps=0, decay_fraction=0.0)
    assert [learning_rate(s, s / 9, flat) for s in range(10)] == [2.0] * 10


@pytest.mark.parametrize("decay", ["linear", "cosine", "sqrt"])
def test_every_decay_falls_from_the_peak_to_the_end(decay: str) -> None:
    config = OptimizerConfig(lr=1.0, warmup_steps=0, decay_fraction=0.5, decay=decay)  # type: ignore[arg-type]
    rates = [learning_rate(1, p, config) for p in (0.2, 0.5, 0.6, 0.75, 0.9, 1.0)]
    assert rates[:2] == [1.0, 1.0]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(config.final_lr_ratio)
    middle = {"linear": 0.5, "cosine": 0.5, "sqrt": 1 - 0.5**0.5}[decay]
    assert rates[3] == pytest.approx(0.02 + 0.98 * middle)
