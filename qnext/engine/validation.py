"""Whether a request can be served at all: checked before any state is touched."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from qnext.engine.sampling_params import SamplingParams
from qnext.errors import RequestError


def check_request(
    prompt_token_ids: Sequence[int],
    params: SamplingParams,
    vocab_size: int,
    max_model_len: int,
    *,
    can_think: bool = False,
    has_grammar: bool = False,
) -> None:
    """Refuse what can never be served.

    Args:
        prompt_token_ids: the prompt.
        params: its parameters.
        vocab_size: ids 0..vocab_size-1 exist.
        max_model_len: most tokens, prompt and at least one generated.
        can_think: whether the ids around think blocks are known.
        has_grammar: whether the structured output is compiled.

    Raises:
        RequestError: empty or too long prompt, an id outside the vocabulary, or an option that
            needs a tokenizer without one.
    """
    if not prompt_token_ids:
        raise RequestError(
            "the prompt is empty: no token to start from",
            hint="give at least one token, for a text model its beginning-of-text token",
        )
    check_token_ids("prompt", prompt_token_ids, vocab_size)
    if len(prompt_token_ids) >= max_model_len:
        raise RequestError(
            f"the prompt has {len(prompt_token_ids)} tokens, and with one generated token more"
            f" than max_model_len={max_model_len} do not fit",
            hint="shorten the prompt or raise max_model_len",
        )
    if params.max_thinking_tokens is not None and not can_think:
        raise RequestError(
            "max_thinking_tokens needs a tokenizer in which <think> and </think> are tokens",
            hint="leave max_thinking_tokens out, or load the tokenizer of a thinking model",
        )
    if params.structured_outputs is not None and not has_grammar:
        raise RequestError(
            "structured_outputs needs a tokenizer",
            hint="load with skip_tokenizer_init=False and call LLM.generate",
        )
    for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
        check_token_ids(name, getattr(params, name) or (), vocab_size)


def truncated(prompt_token_ids: list[int], params: SamplingParams, max_model_len: int) -> list[int]:
    """The end of the prompt that ``truncate_prompt_tokens`` keeps."""
    keep = params.truncate_prompt_tokens
    if keep is None:
        return prompt_token_ids
    if keep == -1:
        keep = max(1, max_model_len - (params.max_tokens or 1))
    return prompt_token_ids[-keep:]


def check_token_ids(name: str, ids: Iterable[int], vocab_size: int) -> None:
    """Refuse ids that are no integers or lie outside the vocabulary.

    Raises:
        RequestError: naming the first such id.
    """
    for token in ids:
        if type(token) is not int or not 0 <= token < vocab_size:
            raise RequestError(
                f"{name} holds {token!r}; token ids are integers from 0 to {vocab_size - 1}"
            )
