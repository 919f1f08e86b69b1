"""Which states of a prompt are worth a slot, and for how long.

One state of the 80B model weighs as much as 3,100 tokens of KV, so snapshots are few. A snapshot's
score is the time of its last use plus its worth, both counted in requests; the lowest score goes
first, and a snapshot still to be written only displaces scores below its own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

WORTH = 64.0
"""A place where a conversation can go on (end of prompt, answer or turn) or is known to branch."""

NEAREST = 32
"""Distance of the first back-off snapshot from the end of the prompt."""

_TURNS = 2
"""Turn ends kept at either end of a prompt: the system prompt, and the latest turns."""


def wanted_snapshots(
    turn_ends: Iterable[int],
    start: int,
    stop: int,
    *,
    block_size: int,
    branch: int,
    interval: int | None,
) -> list[tuple[int, float]]:
    """Positions at which a prompt's state should be saved.

    Args:
        turn_ends: positions after the turn-end tokens of the prompt, ascending.
        start: tokens that are cached already.
        stop: length of the prompt.
        block_size: back-off and grid positions are multiples of it.
        branch: where known blocks stop matching: another prompt went elsewhere from here.
        interval: a fixed grid besides, in tokens.

    Returns:
        (position, worth) with start < position <= stop, ascending.
    """
    found: dict[int, float] = {}
    if interval is not None:
        step = max(1, round(interval / block_size)) * block_size
        found |= dict.fromkeys(range(step, stop, step), 0.0)
    # 32, 64, 128, ... tokens before the end: whatever suffix differs next time, the part that is
    # read again is at most about twice as long. The nearer ones save more.
    distance, worth = NEAREST, 4.0
    while stop - distance > 0:
        position = (stop - distance) // block_size * block_size
        found[position] = max(worth, found.get(position, 0.0))
        distance, worth = 2 * distance, worth * 0.75
    ends = [position for position in turn_ends if position > start]
    for position in (*ends[:_TURNS], *ends[-_TURNS:], branch, stop):
        found[position] = WORTH
    return sorted((p, worth) for p, worth in found.items() if start < p <= stop)


def turn_ends(tokens: Iterable[int], ids: Collection[int]) -> list[int]:
    """Positions just after the tokens ``ids``, ascending."""
    return [place + 1 for place, token in enumerate(tokens) if token in ids] if ids else []
