"""Responses that can be gone on from: in memory, bounded, each for the key that made it."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

from qnext.server.errors import Refusal, to_json


class Kept(NamedTuple):
    """One response."""

    key: str
    messages: list[dict[str, Any]]
    response: dict[str, Any]
    size: int


class Memory:
    """The most recently used responses.

    Args:
        max_bytes: most of all together, as JSON; the least recently used ones go first.
    """

    def __init__(self, max_bytes: int = 256 << 20) -> None:
        self.max_bytes, self.num_bytes = max_bytes, 0
        self._kept: OrderedDict[str, Kept] = OrderedDict()

    def keep(
        self, name: str, key: str, messages: list[dict[str, Any]], response: dict[str, Any]
    ) -> None:
        """Remember a response and the conversation up to its end."""
        size = len(to_json([messages, response]))
        self._kept[name] = Kept(key, messages, response, size)
        self.num_bytes += size
        while self.num_bytes > self.max_bytes:
            _, old = self._kept.popitem(last=False)
            self.num_bytes -= old.size

    def recall(self, name: str, key: str) -> list[dict[str, Any]]:
        """The conversation up to the end of a response.

        Raises:
            Refusal: 404, there is none of that name for this key.
        """
        return self._find(name, key).messages

    def response(self, name: str, key: str) -> dict[str, Any]:
        """A response as it was given.

        Raises:
            Refusal: 404, there is none of that name for this key.
        """
        return self._find(name, key).response

    def forget(self, name: str, key: str) -> None:
        """Drop a response.

        Raises:
            Refusal: 404, there is none of that name for this key.
        """
        self.num_bytes -= self._find(name, key).size
        del self._kept[name]

    def _find(self, name: str, key: str) -> Kept:
        kept = self._kept.get(name)
        if kept is None or kept.key != key:
            raise Refusal(
                f"the response {name!r} does not exist, or is no longer remembered",
                404,
                param="previous_response_id",
                code="response_not_found",
            )
        self._kept.move_to_end(name)
        return kept
