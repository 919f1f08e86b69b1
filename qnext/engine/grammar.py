"""Schemas, regular expressions, choices and EBNF to grammars over a tokenizer's tokens.

llguidance does the work: its automata grow as far as a text needs them, and every part of it
counts its steps, so a grammar that would explode ends in an error, not in a stalled engine.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qnext.engine.structured_outputs import GrammarSource, StructuredOutputsParams
from qnext.errors import RequestError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from qnext.text import Tokenizer

Words = NDArray[np.uint32]
"""One bit per token id, the lowest first."""

_CACHED = 256
_LATE = 2
"""Compilations beyond the time limit that may run on at the same time."""

_BLANKS = r" |\r?\n[ \t]{0,60}"
"""Between the parts of JSON: one blank, or a line break with its indent; never blanks for ever."""

_PROBED = 8
"""Tokens that a new grammar is walked before it is accepted."""


def num_words(vocab_size: int) -> int:
    """Words of 32 bits for ``vocab_size`` ids."""
    return (vocab_size + 31) // 32


def bits_of(ids: Iterable[int], vocab_size: int) -> Words:
    """The words with the bits of ``ids`` set."""
    words = np.zeros(num_words(vocab_size), np.uint32)
    for token in ids:
        words[token >> 5] |= np.uint32(1 << (token & 31))
    return words


class Grammar:
    """The grammar of one sequence: which tokens may come next.

    The answers are pure functions of the tokens pushed and not popped.

    Args:
        matcher: of llguidance.
        end_bits: ids that llguidance takes for end tokens; they are left to the caller.
    """

    def __init__(self, matcher: LLMatcher, end_bits: Words) -> None:
        self._matcher, self._not_end = matcher, ~end_bits

    def copy(self) -> Grammar:
        """Another sequence at the same place; microseconds."""
        return Grammar(self._matcher.deep_copy(), ~self._not_end)

    def reset(self) -> None:
        """Back to the beginning."""
        self._matcher.reset()

    def push(self, ids: list[int]) -> int:
        """Go on by ``ids``; how many of them the grammar allows, the rest is not pushed."""
        return int(self._matcher.try_consume_tokens(ids))

    def pop(self, count: int) -> None:
        """Take back the last ``count`` tokens."""
        if count:
            self._matcher.rollback(count)

    def allowed(self) -> Words:
        """The bits of the tokens that may come next, end tokens apart."""
        from llguidance.numpy import fill_next_token_bitmask

        words = np.empty((1, len(self._not_end)), np.int32)
        fill_next_token_bitmask(self._matcher, words)
        return words[0].view(np.uint32) & self._not_end

    @property
    def may_end(self) -> bool:
        """Whether the text so far is complete."""
        return bool(self._matcher.is_accepting()) and not self.error

    @property
    def error(self) -> str | None:
        """Why the grammar gave up, None as a rule; it then allows nothing."""
        if not self._matcher.is_error():
            return None
        return _first_line(self._matcher.get_error())


class GrammarCompiler:
    """Grammars over one tokenizer, each compiled once; for several threads.

    Args:
        tokenizer: its bytes are what grammars speak of.
        vocab_size: V of the masks.
        eos_token_ids: end tokens, never part of a text.
        time_limit: seconds after which a grammar is refused.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        eos_token_ids: Iterable[int] = (),
        *,
        time_limit: float = 2.0,
    ) -> None:
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self.eos_token_ids = sorted({*eos_token_ids, *tokenizer.eos_token_ids})
        self._backend: LLTokenizer | None = None
        self._end_bits = bits_of((i for i in self.eos_token_ids if i < vocab_size), vocab_size)
        self._cache: OrderedDict[GrammarSource, Grammar] = OrderedDict()
        self._lock = threading.Lock()
        self._time_limit = time_limit
        self._late: list[threading.Thread] = []

    def compile(self, params: StructuredOutputsParams) -> Grammar:
        """A grammar at its beginning.

        Raises:
            RequestError: it cannot be compiled, would explode, takes too long or allows no text;
                or llguidance is not installed.
        """
        source = params.source
        with self._lock:
            self._tokens()
            found = self._cache.get(source)
        if found is None:
            found = self._in_time(source)
        with self._lock:
            self._cache[source] = found
            self._cache.move_to_end(source)
            if len(self._cache) > _CACHED:
                self._cache.popitem(last=False)
            return found.copy()

    def _in_time(self, source: GrammarSource) -> Grammar:
        """Compile in a thread of its own, which does not hold Python's lock, up to the limit.

        The library cannot be interrupted: a thread that is late runs on to its end, and only a
        few may, so that nobody can fill the machine with them.
        """
        self._late = [thread for thread in self._late if thread.is_alive()]
        if len(self._late) >= _LATE:
            raise _refused(source, "others that take too long are still being compiled")
        result: list[Grammar | Exception] = []

        def work() -> None:
            try:
                result.append(self._compile(source))
            except Exception as error:
                result.append(error)

        thread = threading.Thread(target=work, name="qnext-grammar", daemon=True)
        thread.start()
        thread.join(self._time_limit)
        if not result:
            self._late.append(thread)
            raise _refused(source, f"it takes longer than {self._time_limit:g} s to compile")
        if isinstance(result[0], Exception):
            raise result[0]
        return result[0]

    def _compile(self, source: GrammarSource) -> Grammar:
        backend = self._tokens()
        from llguidance import LLMatcher

        try:
            text = _grammar_text(source)
        except Exception as error:  # the converters raise whatever they meet
            raise _refused(source, _first_line(str(error))) from error
        grammar = Grammar(LLMatcher(backend, text, log_level=0), self._end_bits)
        probe = grammar.copy()
        for step in range(_PROBED):
            if grammar.error or probe.error:
                raise _refused(source, grammar.error or probe.error or "")
            allowed = probe.allowed()
            if not allowed.any():
                if not step and not probe.may_end:
                    raise _refused(source, probe.error or "it allows no text")
                break
            word = int(allowed.nonzero()[0][-1])
            probe.push([32 * word + int(allowed[word]).bit_length() - 1])
        return grammar

    def _tokens(self) -> LLTokenizer:
        if self._backend is None:
            try:
                from llguidance import LLTokenizer, TokenizerWrapper
            except ImportError as error:
                raise RequestError(
                    "structured_outputs needs the package llguidance, which is not installed",
                    hint="pip install 'qnext[structured]'",
                ) from error
            words = _Words(self.tokenizer, self.vocab_size, self.eos_token_ids[:1])
            self._backend = LLTokenizer(
                TokenizerWrapper(words), n_vocab=self.vocab_size, eos_token=self.eos_token_ids
            )
        return self._backend


class _Words:
    """A tokenizer as llguidance reads it. Added tokens are control tokens, never text."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos: list[int]) -> None:
        if not eos:
            raise RequestError(
                "structured_outputs needs an end token, and this tokenizer names none"
            )
        self.eos_token_id = eos[0]
        self.tokens = [tokenizer.token_bytes(token) for token in range(vocab_size)]
        self.special_token_ids = sorted(tokenizer.added_tokens)
        self._encode: Callable[[str], list[int]] = tokenizer.encode

    def __call__(self, text: str | bytes) -> list[int]:
        return self._encode(text if isinstance(text, str) else text.decode("utf-8", "replace"))


def _grammar_text(source: GrammarSource) -> str:
    """The text that llguidance compiles."""
    from llguidance import LLMatcher, grammar_from

    if source.kind == "json":
        options: Any = {"whitespace_flexible": False}
        if source.flexible_whitespace:
            options = {"whitespace_pattern": source.whitespace_pattern or _BLANKS}
        return str(LLMatcher.grammar_from_json_schema(source.text, overrides=options))
    if source.kind == "choice":
        choices = map(_literal, json.loads(source.text))
        return str(LLMatcher.grammar_from_lark("start: " + " | ".join(choices)))
    return str(grammar_from(source.kind, source.text))


def _literal(text: str) -> str:
    """A text in Lark, which quotes as JSON does but knows control characters in regexes only."""
    if all(char >= " " or char in "\n\t\r" for char in text):
        return json.dumps(text, ensure_ascii=False)
    return "/" + "".join(c if c.isalnum() else f"\\x{{{ord(c):x}}}" for c in text) + "/"


def _refused(source: GrammarSource, why: str) -> RequestError:
    return RequestError(f"structured_outputs: the {source.kind} cannot be used: {why}")


def _first_line(text: str) -> str:
    """The sentence of an error, without the state that llguidance prints after it."""
    kept = text.split("<state>")[0].split("<grammar>")[0].strip().splitlines()
    line = " ".join(part.strip() for part in kept if part.strip())
    return line if len(line) <= 300 else f"{line[:300]}..."
