"""``/v1/completions``: plain prompts, several at once, with echo and logprobs."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, aclosing
from typing import Any, cast

from qnext.engine.outputs import LogprobsAtStep, StreamDelta
from qnext.engine.prompts import Prompt
from qnext.server.errors import Refusal
from qnext.server.schema import CompletionBody
from qnext.server.service import Loaded, Service, best, finite, usage
from qnext.server.streaming import steps
from qnext.text import Tokenizer

DEFAULT_MAX_TOKENS = 16
"""OpenAI's, for this endpoint."""


async def completion_chunks(
    service: Service, loaded: Loaded, body: CompletionBody, key: str
) -> AsyncGenerator[dict[str, Any], None]:
    """The chunks of an answer; the last one has its usage."""
    prompts = _prompts(body.prompt)
    if len(prompts) > service.options.max_prompts:
        raise Refusal(f"at most {service.options.max_prompts} prompts", param="prompt")
    service.check_logprobs(body.logprobs)
    echo_only = body.max_tokens == 0
    if echo_only and not body.echo:
        raise Refusal("max_tokens: must be at least 1 without echo", param="max_tokens")
    wanted = DEFAULT_MAX_TOKENS if body.max_tokens is None else max(1, body.max_tokens)
    more = {"prompt_logprobs": body.logprobs} if body.echo else {}
    params = service.sampling(loaded, body, max_tokens=wanted, logprobs=body.logprobs, **more)
    head = {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": loaded.name,
    }
    n = params.n
    with service.count(loaded, key, n * len(prompts)) as priority:
        async with AsyncExitStack() as stack:
            streams = [
                await stack.enter_async_context(
                    loaded.engine.open(prompt, params, priority=priority)
                )
                for prompt in prompts
            ]
            choices = [
                [_Choice(place * n + i, loaded.tokenizer, body.logprobs) for i in range(n)]
                for place in range(len(prompts))
            ]
            reasons: list[list[str]] = [[] for _ in streams]
            completion = 0
            yield {**head, "choices": []}
            async with aclosing(steps(streams, service.options.max_seconds)) as news:
                async for place, deltas in news:
                    made = []
                    request = streams[place].request
                    for delta in deltas:
                        choice = choices[place][delta.index]
                        if body.echo and not choice.began:
                            ids = request.prompt_token_ids
                            made.append(choice.echo(request.prompt, ids, request.prompt_logprobs))
                        completion += 0 if echo_only else len(delta.token_ids)
                        if delta.finish_reason is not None:
                            reasons[place].append(delta.finish_reason)
                        made.append(choice.chunk(delta, silent=echo_only))
                    yield {**head, "choices": made}
                    if not streams[place].num_open:
                        service.metrics.finished(request.metrics, reasons[place])
            requests = [stream.request for stream in streams]
            total = sum(len(request.prompt_token_ids) for request in requests)
            counts = usage(total, completion, [request.metrics for request in requests])
            yield {**head, "choices": [], "usage": counts}


async def whole_completion(chunks: AsyncGenerator[dict[str, Any], None]) -> dict[str, Any]:
    """All chunks added up to one answer."""
    answer: dict[str, Any] = {}
    found: dict[int, dict[str, Any]] = {}
    async with aclosing(chunks) as each:
        async for chunk in each:
            answer = {**chunk, "choices": []}
            for piece in chunk["choices"]:
                choice = found.setdefault(piece["index"], {**piece, "text": "", "logprobs": None})
                choice["text"] += piece["text"]
                choice["finish_reason"] = piece["finish_reason"]
                if "stop_reason" in piece:
                    choice["stop_reason"] = piece["stop_reason"]
                if piece["logprobs"] is not None:
                    if choice["logprobs"] is None:
                        choice["logprobs"] = {name: [] for name in piece["logprobs"]}
                    for name, values in piece["logprobs"].items():
                        choice["logprobs"][name] += values
    answer["choices"] = [choice for _, choice in sorted(found.items())]
    return answer


class _Choice:
    """One completion as it grows."""

    def __init__(self, index: int, tokenizer: Tokenizer, logprobs: int | None) -> None:
        self.index, self.tokenizer, self.count = index, tokenizer, logprobs
        self.began = False
        self.offset = 0

    def echo(
        self,
        text: str | None,
        ids: Sequence[int],
        logprobs: Sequence[LogprobsAtStep | None] | None,
    ) -> dict[str, Any]:
        """The prompt as a first piece."""
        self.began = True
        if text is None:
            text = self.tokenizer.decode(ids, skip_special_tokens=False)
        return self._piece(text, ids, logprobs)

    def chunk(self, delta: StreamDelta, *, silent: bool) -> dict[str, Any]:
        """The next piece; a ``silent`` one only says why the answer ended."""
        if silent:
            piece = self._piece("", (), () if self.count is not None else None)
        else:
            piece = self._piece(delta.text, delta.token_ids, delta.logprobs)
        piece["finish_reason"] = delta.finish_reason
        if delta.stop_reason is not None:
            piece["stop_reason"] = delta.stop_reason
        return piece

    def _piece(
        self,
        text: str,
        ids: Sequence[int],
        logprobs: Sequence[LogprobsAtStep | None] | None,
    ) -> dict[str, Any]:
        found = None
        if self.count is not None and logprobs is not None:
            tokens = [self.tokenizer.decode([i], skip_special_tokens=False) for i in ids]
            offsets = []
            for token in tokens:
                offsets.append(self.offset)
                self.offset += len(token)
            found = {
                "tokens": tokens,
                "token_logprobs": [
                    finite(step[i].logprob) if step else None
                    for i, step in zip(ids, logprobs, strict=True)
                ],
                "top_logprobs": [self._best(step) for step in logprobs],
                "text_offset": offsets,
            }
        return {"index": self.index, "text": text, "logprobs": found, "finish_reason": None}

    def _best(self, step: LogprobsAtStep | None) -> dict[str, float] | None:
        if step is None:
            return None
        decode = self.tokenizer.decode
        # Different tokens may read the same (pieces of a character): the likeliest counts.
        found: dict[str, float] = {}
        for token, one in best(step, self.count or 0):
            found.setdefault(decode([token], skip_special_tokens=False), finite(one.logprob))
        return found


def _prompts(given: str | list[str] | list[int] | list[list[int]]) -> list[Prompt]:
    """One entry per prompt."""
    if isinstance(given, str):
        return [given]
    if not given:
        raise Refusal("prompt: an empty list", param="prompt")
    if isinstance(given[0], int):
        return [cast("list[int]", given)]
    return list(cast("list[str] | list[list[int]]", given))
