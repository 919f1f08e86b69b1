"""``/tokenize`` and ``/detokenize``, in vLLM's words."""

from __future__ import annotations

from typing import Any

from qnext.engine.validation import check_token_ids
from qnext.server.chat import render
from qnext.server.schema import DetokenizeBody, TokenizeBody
from qnext.server.service import Loaded


def tokenize(loaded: Loaded, body: TokenizeBody) -> dict[str, Any]:
    """Ids of a text or of a rendered conversation.

    Raises:
        RequestError: messages that the template refuses, or a base model.
    """
    text = body.prompt
    if text is None:
        text = render(
            loaded,
            body.messages or [],
            body.tools,
            body.chat_template_kwargs or {},
            add_generation_prompt=body.add_generation_prompt,
        )
    ids = loaded.tokenizer.encode(text)
    found: dict[str, Any] = {
        "count": len(ids),
        "max_model_len": loaded.engine.llm.max_model_len,
        "tokens": ids,
    }
    if body.return_token_strs:
        raw = [loaded.tokenizer.token_bytes(i) for i in ids]
        found["token_strs"] = [one.decode("utf-8", errors="replace") for one in raw]
    return found


def detokenize(loaded: Loaded, body: DetokenizeBody) -> dict[str, Any]:
    """Text of ids, special tokens included.

    Raises:
        RequestError: an id outside the vocabulary.
    """
    check_token_ids("tokens", body.tokens, loaded.tokenizer.vocab_size)
    return {"prompt": loaded.tokenizer.decode(body.tokens, skip_special_tokens=False)}
