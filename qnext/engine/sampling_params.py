"""What a user asks of one generation: vLLM's names, defaults and meanings, checked strictly.

A wrong value is refused here, before any model state exists; see sampler.py for the maths.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from qnext.engine.parameter_errors import nearest_hint, request_error
from qnext.engine.structured_outputs import StructuredOutputsParams

__all__ = ["GREEDY_EPS", "MAX_N", "LogitsProcessor", "SamplingParams", "nearest_hint"]

MAX_N = 16384
LogitsProcessor = Callable[..., Any]
"""Output ids and a row of logits (V,) fp32 to the row to go on with, of the same shape."""

GREEDY_EPS = 1e-5
"""Temperatures below this are greedy, as in vLLM."""


class SamplingParams(BaseModel):
    """Parameters of one request; immutable. ``replace`` gives a changed, re-checked copy.

    Attributes:
        n: completions per prompt.
        temperature: divides the logits; 0 is greedy.
        top_p: smallest set of tokens whose probability reaches it, 1 keeps all.
        top_k: the k most likely tokens, 0 or -1 keeps all.
        min_p: drop tokens less likely than ``min_p`` times the most likely one.
        presence_penalty: subtracted once from tokens already generated.
        frequency_penalty: subtracted per occurrence in the generated tokens.
        repetition_penalty: divides (positive) or multiplies (negative) the logits of tokens in
            the prompt or the output; 1 is off.
        stop: texts that end generation.
        stop_token_ids: token ids that end generation.
        include_stop_str_in_output: keep the stop text in ``.text``.
        bad_words: texts never generated.
        seed: makes this request's samples repeatable.
        max_tokens: most tokens to generate; None goes on to ``max_model_len``.
        min_tokens: no stop of any kind before this many tokens.
        ignore_eos: the model's own end tokens do not stop.
        logprobs: report this many most likely tokens at each step, -1 for all.
        prompt_logprobs: the same for the prompt's tokens.
        logit_bias: token id -> added to its logit, clamped to -100..100.
        allowed_token_ids: only these may be generated.
        skip_special_tokens: leave special tokens out of ``.text``.
        detokenize: False leaves ``.text`` empty.
        structured_outputs: the form the answer must have; docs/generation.md.
        max_thinking_tokens: the engine closes a think block that has this many tokens.
        truncate_prompt_tokens: keep only the last so many tokens of the prompt; -1 keeps as many
            as fit.
        logits_processors: functions of the output ids and the row of logits (V,) that give the
            row to go on with; they see masks and bias applied, penalties not yet.
        spaces_between_special_tokens: accepted for vLLM's sake; byte-level BPE has no such spaces.

    Raises:
        RequestError: an unknown name, or a value outside its range.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    n: int = Field(1, ge=1, le=MAX_N)
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1)
    min_p: float = Field(0.0, ge=0, le=1)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, gt=0)
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    bad_words: tuple[str, ...] = ()
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    max_tokens: int | None = Field(16, ge=1)
    min_tokens: int = Field(0, ge=0)
    ignore_eos: bool = False
    logprobs: int | None = Field(None, ge=-1)
    prompt_logprobs: int | None = Field(None, ge=-1)
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: tuple[int, ...] | None = None
    skip_special_tokens: bool = True
    detokenize: bool = True
    spaces_between_special_tokens: bool = True
    structured_outputs: StructuredOutputsParams | None = None
    max_thinking_tokens: int | None = Field(None, ge=0)
    truncate_prompt_tokens: int | None = Field(None, ge=-1)
    logits_processors: tuple[LogitsProcessor, ...] = ()

    def __init__(self, **values: Any) -> None:
        if "guided_decoding" in values:  # vLLM's older spelling
            values.setdefault("structured_outputs", values.pop("guided_decoding"))
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise request_error(error, SamplingParams) from error

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature < GREEDY_EPS

    def replace(self, **changes: Any) -> SamplingParams:
        """A copy with ``changes``, checked like a new one."""
        return SamplingParams(**{**self.model_dump(exclude_unset=True), **changes})

    @field_validator("*", mode="before")
    @classmethod
    def _plain_numbers(cls, value: Any) -> Any:
        """NumPy scalars become Python's."""
        foreign = type(value).__module__ == "numpy" and hasattr(value, "item")
        return value.item() if foreign else value

    @field_validator("stop", "bad_words", mode="before")
    @classmethod
    def _texts(cls, value: Any) -> Any:
        if value is None:
            return ()
        return (value,) if isinstance(value, str) else _as_tuple(value)

    @field_validator("stop_token_ids", "allowed_token_ids", mode="before")
    @classmethod
    def _ids(cls, value: Any, info: Any) -> Any:
        if value is None:
            return () if info.field_name == "stop_token_ids" else None
        return _as_tuple(value)

    @field_validator("structured_outputs", mode="before")
    @classmethod
    def _form(cls, value: Any) -> Any:
        return StructuredOutputsParams(**value) if isinstance(value, dict) else value

    @field_validator("logits_processors", mode="before")
    @classmethod
    def _functions(cls, value: Any) -> Any:
        return () if value is None else (value,) if callable(value) else _as_tuple(value)

    @field_validator("seed", mode="before")
    @classmethod
    def _no_seed(cls, value: Any) -> Any:
        return None if type(value) is int and value == -1 else value

    @field_validator("logprobs", "prompt_logprobs", mode="before")
    @classmethod
    def _switch(cls, value: Any) -> Any:
        """OpenAI and older vLLM write True for 1."""
        return (1 if value else None) if isinstance(value, bool) else value

    @field_validator("top_k", mode="after")
    @classmethod
    def _all_tokens(cls, value: int) -> int:
        return max(value, 0)

    @field_validator("logit_bias", mode="after")
    @classmethod
    def _clamped(cls, value: dict[int, float] | None) -> dict[int, float] | None:
        return value and {token: min(100.0, max(-100.0, bias)) for token, bias in value.items()}

    @model_validator(mode="after")
    def _consistent(self) -> SamplingParams:
        if any(not text for text in (*self.stop, *self.bad_words)):
            raise ValueError("stop and bad_words must not hold an empty string")
        if self.stop and not self.detokenize:
            raise ValueError("stop strings need detokenize=True")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens={self.min_tokens} must be at most max_tokens={self.max_tokens}"
            )
        if self.greedy and self.n > 1:
            raise ValueError(f"n={self.n} must be 1 with greedy sampling (temperature=0)")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise ValueError("allowed_token_ids must name at least one token")
        if self.structured_outputs is not None and self.ignore_eos and not self.stop_token_ids:
            raise ValueError("structured_outputs with ignore_eos=True could never end")
        if self.truncate_prompt_tokens == 0:
            raise ValueError("truncate_prompt_tokens=0 would leave no prompt; -1 keeps what fits")
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            low = min(getattr(self, name) or (0,))
            if low < 0:
                raise ValueError(f"{name} holds {low}; token ids must be at least 0")
        return self


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, set, frozenset, range)) else value
