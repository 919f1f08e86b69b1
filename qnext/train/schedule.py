"""Warm-up, stable, decay."""

from __future__ import annotations

import math

from qnext.train.config import OptimizerConfig


def learning_rate(step: int, progress: float, config: OptimizerConfig) -> float:
    """Linear warm-up, flat, decay to the final ratio.

    Args:
        step: counted from 0.
        progress: share of the run that lies behind, 0 to 1; by steps or by the clock.
        config: peak rate, length of warm-up and decay.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    left = max(1.0 - progress, 0.0)
    if left >= config.decay_fraction:
        return config.lr
    share = left / config.decay_fraction
    if config.decay == "cosine":
        share = 0.5 - 0.5 * math.cos(math.pi * share)
    elif config.decay == "sqrt":
        share = 1 - math.sqrt(1 - share)
    return config.lr * (config.final_lr_ratio + (1 - config.final_lr_ratio) * share)
