"""Service: one loaded model and what all requests share. Absent parts say when to come back."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from qnext.engine.async_llm import AsyncLLM
from qnext.engine.outputs import Logprob, RequestMetrics
from qnext.engine.sampling_params import SamplingParams
from qnext.errors import TextError
from qnext.server.admission import Admission
from qnext.server.errors import Refusal
from qnext.server.metrics import Metrics
from qnext.server.options import ServerOptions
from qnext.server.schema import Sampling
from qnext.text import ChatTemplate, ParserFormat, Tokenizer, parser_for

Phase = Literal["starting", "loading", "warming up", "ready", "draining", "failed"]

LOWEST = -9999.0
"""Log-probability in place of minus infinity, which JSON cannot say; vLLM's number."""

_PLAIN = (
    "n", "temperature", "top_p", "seed", "presence_penalty", "frequency_penalty", "top_k", "min_p",
    "repetition_penalty", "min_tokens", "stop_token_ids", "include_stop_str_in_output",
    "ignore_eos", "skip_special_tokens", "bad_words", "allowed_token_ids",
    "truncate_prompt_tokens", "max_thinking_tokens",
)  # fmt: skip
"""Fields that SamplingParams knows by the same name."""

MAX_STOPS, MAX_STOP_CHARS = 16, 1024


@dataclass(frozen=True)
class Loaded:
    """What exists once a model is loaded.

    Attributes:
        engine: runs requests.
        name: of the model, for clients.
        tokenizer: of the checkpoint.
        template: chat template, None for a base model.
        format: how answers to the template are written.
        admission: how many requests at once.
        created: Unix time of loading.
    """

    engine: AsyncLLM
    name: str
    tokenizer: Tokenizer
    template: ChatTemplate | None
    format: ParserFormat
    admission: Admission
    created: int


@dataclass
class Service:
    """The state of one server.

    Attributes:
        options: the operator's.
        metrics: counters of this server.
        phase: where it stands.
        loaded: the model, None before it is there.
    """

    options: ServerOptions
    metrics: Metrics = field(default_factory=Metrics)
    phase: Phase = "starting"
    loaded: Loaded | None = None

    def attach(self, engine: AsyncLLM) -> Loaded:
        """Serve this engine from now on; ``phase`` stays as it is.

        Raises:
            TextError: the chat template cannot be used.
        """
        llm, options = engine.llm, self.options
        if llm.tokenizer is None:
            raise TextError("a server needs a tokenizer")
        template = _template(llm.tokenizer, llm.model_path, options.chat_template)
        found = ParserFormat() if template is None else parser_for(llm.tokenizer, template)
        running = llm.engine.options.max_num_seqs
        self.loaded = Loaded(
            engine=engine,
            name=options.model_name or llm.model_path.name,
            tokenizer=llm.tokenizer,
            template=template,
            format=found,
            admission=Admission(running, options.max_queue),
            created=int(time.time()),
        )
        self.metrics.watch(llm, self.loaded.name)
        return self.loaded

    def ready(self, model: str | None = None) -> Loaded:
        """The loaded model, if it is the one that is asked for.

        Raises:
            Refusal: 503, not ready; 404, another model.
        """
        loaded = self.loaded
        if loaded is None or self.phase != "ready":
            raise Refusal(f"the server is {self.phase}", 503, code="not_ready", retry_after=5)
        if not loaded.engine.is_alive:
            raise Refusal("the engine has stopped", 503, code="engine_error", retry_after=60)
        if model is not None and model != loaded.name:
            raise Refusal(
                f"the model {model!r} does not exist; this server has {loaded.name!r}",
                404,
                param="model",
                code="model_not_found",
            )
        return loaded

    @contextmanager
    def count(self, loaded: Loaded, key: str, sequences: int) -> Iterator[int]:
        """Room in the queue; gives the priority."""
        started = time.monotonic()
        with loaded.admission.enter(key, sequences) as priority:
            yield priority
        loaded.admission.took(time.monotonic() - started)

    def sampling(self, loaded: Loaded, body: Sampling, **more: Any) -> SamplingParams:
        """A body's parameters over those that the checkpoint recommends.

        Raises:
            RequestError: outside of what the engine or this server allows.
        """
        options = self.options
        given = {name: value for name in _PLAIN if (value := getattr(body, name)) is not None}
        stop = [body.stop] if isinstance(body.stop, str) else list(body.stop or ())
        if len(stop) > MAX_STOPS or any(len(text) > MAX_STOP_CHARS for text in stop):
            raise Refusal(
                f"stop: at most {MAX_STOPS} texts of {MAX_STOP_CHARS} characters", param="stop"
            )
        if (body.n or 1) > options.max_n:
            raise Refusal(f"n: at most {options.max_n}", param="n")
        if body.logit_bias:
            given["logit_bias"] = {_token_id(k): v for k, v in body.logit_bias.items()}
        if body.structured_outputs is not None:
            form = body.structured_outputs.model_dump(by_alias=True, exclude_none=True)
            given["structured_outputs"] = form
        given |= {"stop": stop, **more}
        most = options.max_output_tokens
        wanted = given.get("max_tokens")
        if most is not None:
            if wanted is not None and wanted > most:
                raise Refusal(f"at most {most} tokens per answer", param="max_tokens")
            given["max_tokens"] = wanted or most
        return loaded.engine.llm.get_default_sampling_params().replace(**given)

    def check_logprobs(self, count: int | None) -> None:
        """Refuse too many alternatives per token.

        Raises:
            Refusal: more than the server's limit.
        """
        if count is not None and count > self.options.max_logprobs:
            raise Refusal(f"at most {self.options.max_logprobs} logprobs per token")


def usage(prompt: int, completion: int, metrics: Sequence[RequestMetrics]) -> dict[str, Any]:
    """OpenAI's usage of one request."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(m.num_cached_tokens or 0 for m in metrics)},
    }


def best(found: dict[int, Logprob], count: int) -> list[tuple[int, Logprob]]:
    """The ``count`` likeliest tokens of one step, likeliest first."""
    ranked = sorted(found.items(), key=lambda item: item[1].rank)
    return [item for item in ranked if item[1].rank <= count][:count]


def finite(logprob: float) -> float:
    """A log-probability that JSON can say."""
    return max(logprob, LOWEST)


def _token_id(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise Refusal("logit_bias: keys are token ids", param="logit_bias")
    return int(text)


def _template(tokenizer: Tokenizer, folder: Any, source: str | None) -> ChatTemplate | None:
    if source is not None:
        return ChatTemplate(source, special_tokens=tokenizer.special_tokens)
    try:
        return ChatTemplate.from_pretrained(folder)
    except TextError as error:
        if str(error).startswith("no chat template"):
            return None
        raise
