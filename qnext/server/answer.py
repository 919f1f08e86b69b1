"""One choice of a chat answer: deltas of the engine in, OpenAI's deltas out."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

from qnext.engine.outputs import LogprobsAtStep, StreamDelta
from qnext.server.forced import ForcedCalls
from qnext.server.service import Loaded, best, finite
from qnext.text import ContentDelta, ReasoningDelta
from qnext.text.parse import END_THINK, THINK, Event

if TYPE_CHECKING:
    from qnext.server.chat import Plan


class Answer:
    """The state of one choice.

    Args:
        index: which of the ``n``.
        loaded: whose tokenizer and format.
        plan: the request.
    """

    def __init__(self, index: int, loaded: Loaded, plan: Plan) -> None:
        self.index, self.plan, self.tokenizer = index, plan, loaded.tokenizer
        self.parser = loaded.format.start(plan.prompt, None if plan.forced else plan.tools)
        self.forced = ForcedCalls() if plan.forced else None
        self.num_tokens = self.num_reasoning = self.num_calls = 0
        self.ended = False
        self._think = loaded.tokenizer.token_to_id(THINK)
        self._end_think = loaded.tokenizer.token_to_id(END_THINK)
        self._thinking = plan.prompt.rstrip().endswith(THINK)

    def opening(self) -> dict[str, Any]:
        """The first piece: who speaks."""
        return self._piece({"role": "assistant", "content": ""})

    def push(self, delta: StreamDelta) -> list[dict[str, Any]]:
        """Pieces that are certain after ``delta``; the last one of all has a finish reason."""
        self._count(delta.token_ids)
        events = self._events(delta)
        pieces = [self._piece(found) for event in events if (found := self._delta(event))]
        logprobs = self._logprobs(delta)
        enough = self.num_calls > 0 and not self.plan.parallel
        if delta.finish_reason is not None or enough:
            self.ended = True
            last = self._piece({})
            last["finish_reason"] = self._reason(delta.finish_reason)
            if delta.stop_reason is not None:
                last["stop_reason"] = delta.stop_reason
            pieces.append(last)
        elif logprobs and not pieces:
            pieces.append(self._piece({}))
        if logprobs:
            pieces[0]["logprobs"] = {"content": logprobs, "refusal": None}
        return pieces

    def _reason(self, reason: str | None) -> str:
        if self.num_calls and reason != "length":
            return "stop" if self.plan.named else "tool_calls"
        return reason or "stop"

    def _events(self, delta: StreamDelta) -> list[Event]:
        events = self.parser.push(delta.text)
        if delta.finish_reason is not None:
            events += self.parser.finish()
        if self.forced is None:
            return events
        found: list[Event] = []
        for event in events:
            if isinstance(event, ContentDelta):
                found += self.forced.push(event.text)
            else:
                found.append(event)
        if delta.finish_reason is not None:
            found += self.forced.finish()
        return found

    def _delta(self, event: Event) -> dict[str, Any] | None:
        if self.num_calls and not self.plan.parallel:
            return None
        if isinstance(event, ReasoningDelta):
            return {"reasoning_content": event.text}
        if isinstance(event, ContentDelta):
            return {"content": event.text}
        self.num_calls += 1
        call = {
            "index": event.index,
            "id": f"call_{uuid.uuid4().hex[:24]}",
            "type": "function",
            "function": {"name": event.name, "arguments": event.arguments},
        }
        return {"tool_calls": [call]}

    def _piece(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"index": self.index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _count(self, ids: list[int]) -> None:
        self.num_tokens += len(ids)
        for token in ids:
            if token in (self._think, self._end_think):
                self._thinking = token == self._think
            else:
                self.num_reasoning += self._thinking

    def _logprobs(self, delta: StreamDelta) -> list[dict[str, Any]]:
        top = self.plan.top_logprobs
        if top is None:
            return []
        return [
            {
                **self._token(token, step),
                "top_logprobs": [self._token(other, step) for other, _ in best(step, top)],
            }
            for token, step in zip(delta.token_ids, delta.logprobs or (), strict=True)
        ]

    def _token(self, token: int, step: LogprobsAtStep) -> dict[str, Any]:
        raw = self.tokenizer.token_bytes(token)
        return {
            "token": raw.decode("utf-8", errors="replace"),
            "logprob": finite(step[token].logprob),
            "bytes": list(raw),
        }
