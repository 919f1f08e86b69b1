"""Ids to text piece by piece: whole UTF-8 characters only, and stop strings across token borders.

A token is bytes (tokenizer.py), so the work per token is constant: no window is decoded twice.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

from qnext.errors import TextError
from qnext.text.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """Stream of ids to stream of text; all pieces together equal ``tokenizer.decode(all ids)``.

    A character whose last bytes are still to come is held back. Bytes that can no longer become a
    character are U+FFFD at once; an unfinished character is U+FFFD only in `flush`.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Iterable[int]) -> str:
        """New text that is certain after these ids, perhaps empty."""
        token_bytes = self._tokenizer.token_bytes
        return self._utf8.decode(b"".join(token_bytes(i) for i in ids if i not in self._skipped))

    def flush(self) -> str:
        """The rest at the end of the stream: U+FFFD for an unfinished character, else nothing."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest


class StopChecker:
    """Ends a stream of text at the first stop string, wherever the pieces are cut.

    Of several stop strings the one that is complete first wins, then the longest. Text is held back
    only as long as it could be the beginning of a stop string.

    Args:
        stop: stop strings, none empty.
        include_stop_str_in_output: keep the stop string at the end of the text.

    Raises:
        TextError: a stop string is empty.
    """

    def __init__(self, stop: Sequence[str], include_stop_str_in_output: bool = False) -> None:
        if isinstance(stop, str) or any(not isinstance(s, str) or not s for s in stop):
            raise TextError(f"stop is {stop!r}; it takes a list of non-empty strings")
        self._stop = tuple(dict.fromkeys(stop))
        self._include = include_stop_str_in_output
        self._held = ""
        self.stopped: str | None = None
        """The stop string that ended the text, None while it runs."""

    def push(self, text: str) -> str:
        """Text that may be shown now; nothing once `stopped`."""
        if self.stopped is not None:
            return ""
        text = self._held + text
        found = [(at + len(s), at, s) for s in self._stop if (at := text.find(s)) >= 0]
        if found:
            end, at, self.stopped = min(found)
            self._held = ""
            return text[: end if self._include else at]
        keep = max((held_prefix(text, s) for s in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back when the stream ends for another reason."""
        rest, self._held = self._held, ""
        return rest


def held_prefix(text: str, tag: str) -> int:
    """Length of the longest end of ``text`` that is a proper beginning of ``tag``."""
    for size in range(min(len(text), len(tag) - 1), 0, -1):
        if text.endswith(tag[:size]):
            return size
    return 0
