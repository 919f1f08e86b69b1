"""Warm-up, stable, decay."""

from __future__ import annotations

from qnext.train.config import OptimizerConfig


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """Rate of a step counted from 0: linear warm-up, flat, linear decay to the final ratio."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    begin = steps - int(steps * config.decay_fraction)
    if step < begin:
        return config.lr
    left = (steps - step) / max(steps - begin, 1)
    return config.lr * (config.final_lr_ratio + (1 - config.final_lr_ratio) * left)
