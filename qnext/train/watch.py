"""Whether a run is still healthy: losses that are not numbers, and losses that jump."""

from __future__ import annotations

import math
from typing import Any

from qnext.train.config import StabilityConfig


class Watch:
    """Judges the losses that are read, in their order.

    Args:
        config: what counts as a jump, and how often a run may be rolled back.
        patience: skipped updates in a row after which a run with a non-finite loss is lost.
    """

    def __init__(self, config: StabilityConfig, patience: int) -> None:
        self.config, self.patience = config, patience
        self.mean, self.seen, self.skipped, self.rollbacks = 0.0, 0, 0.0, 0

    def judge(self, loss: float, skipped: float) -> tuple[bool, str | None, int]:
        """One reading.

        Args:
            loss: of the last step.
            skipped: updates skipped since the run began.

        Returns:
            ``(fine, bad, new)``: whether a checkpoint may be written now; why the run cannot go on
            from here, or None; updates skipped since the last reading.
        """
        new, self.skipped = int(skipped - self.skipped), skipped
        if not math.isfinite(loss):
            lost = new >= self.patience
            why = f"the last {new} updates were skipped; the loss is {loss}" if lost else None
            return False, why, new
        limit = self.config.loss_factor * self.mean
        if self.config.loss_factor and self.seen >= self.config.loss_warmup and loss > limit:
            return False, f"the loss is {loss:.4g}, its mean was {self.mean:.4g}", new
        self.mean = 0.9 * self.mean + 0.1 * loss if self.seen else loss
        self.seen += 1
        return True, None, new

    def state_dict(self) -> dict[str, Any]:
        """What a continuation must know."""
        return {"mean": self.mean, "seen": self.seen, "rollbacks": self.rollbacks}

    def load_state_dict(self, state: dict[str, Any], skipped: float) -> None:
        """Go on from ``state_dict``; rollbacks never become fewer."""
        self.mean, self.seen, self.skipped = state["mean"], state["seen"], skipped
        self.rollbacks = max(self.rollbacks, state["rollbacks"])
