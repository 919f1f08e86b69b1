"""Prometheus metrics under vLLM's names, and our own beside them.

What the engine counts is read when Prometheus asks; times of requests are observed as they end.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

if TYPE_CHECKING:
    from qnext.engine.llm import LLM
    from qnext.engine.outputs import RequestMetrics

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20)
_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1)
_WHOLE = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)

_PATHS = (
    "/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/messages", "/v1/responses",
    "/tokenize", "/detokenize", "/metrics", "/health", "/ready",
)  # fmt: skip


class Metrics:
    """The registry of one server."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.name = ""
        self._requests = Counter(
            "qnext:http_requests", "Requests by path and status.", ["path", "status"],
            registry=registry,
        )  # fmt: skip
        self._success = Counter(
            "vllm:request_success", "Finished sequences by reason.",
            ["model_name", "finished_reason"], registry=registry,
        )  # fmt: skip

        def times(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, ["model_name"], registry=registry, buckets=buckets)

        self._first = times("vllm:time_to_first_token_seconds", "Arrival to first token.", _FIRST)
        self._token = times(
            "vllm:request_time_per_output_token_seconds", "Mean of a request.", _TOKEN
        )
        self._whole = times("vllm:e2e_request_latency_seconds", "Arrival to the end.", _WHOLE)
        self._queue = times("vllm:request_queue_time_seconds", "Arrival to being seated.", _WHOLE)

    def watch(self, llm: LLM, name: str) -> None:
        """Report this engine's counters too."""
        self.name = name
        self.registry.register(_EngineCollector(llm, name))

    def http(self, path: str, status: int, seconds: float) -> None:
        """Count one request; unknown paths share a label, or a scanner could fill the memory."""
        del seconds
        self._requests.labels(path if path in _PATHS else "other", str(status)).inc()

    def finished(self, metrics: RequestMetrics, reasons: list[str]) -> None:
        """Take over the times of a request that ended."""
        for reason in reasons:
            self._success.labels(self.name, reason).inc()
        whole = None
        if metrics.finished_time is not None:
            whole = metrics.finished_time - metrics.arrival_time
        for histogram, value in (
            (self._first, metrics.time_to_first_token),
            (self._token, metrics.time_per_output_token),
            (self._queue, metrics.queue_time),
            (self._whole, whole),
        ):
            if value is not None:
                histogram.labels(self.name).observe(value)

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)


class _EngineCollector:
    """The engine's own totals, read at the moment of the scrape."""

    def __init__(self, llm: LLM, name: str) -> None:
        self.llm, self.labels = llm, [name]

    def describe(self) -> list[Metric]:
        """Nothing in advance: registering must not touch the engine."""
        return []

    def collect(self) -> Iterator[Metric]:
        """One family per figure."""
        stats, cache = self.llm.stats, self.llm.engine.cache.stats
        blocks = cache.blocks_used + cache.blocks_cached + cache.blocks_free
        for name, text, value in (
            ("vllm:num_requests_running", "Sequences that run.", stats.num_running),
            ("vllm:num_requests_waiting", "Sequences that wait.", stats.num_waiting),
            (
                "vllm:kv_cache_usage_perc",
                "Share (0..1) of the KV blocks that sequences use.",
                cache.blocks_used / blocks if blocks else 0.0,
            ),
            ("qnext:kv_blocks_cached", "KV blocks kept for later prompts.", cache.blocks_cached),
            ("qnext:state_slots_used", "State slots of running sequences.", cache.slots_used),
            ("qnext:state_slots_cached", "State slots kept for later.", cache.slots_cached),
        ):
            yield self._gauge(name, text, value)
        for name, text, value in (
            ("vllm:prompt_tokens", "Prompt tokens.", stats.num_prompt_tokens),
            ("vllm:generation_tokens", "Generated tokens.", stats.num_generated_tokens),
            ("vllm:num_preemptions", "Sequences that gave way.", stats.num_preempted),
            ("vllm:prefix_cache_queries", "Prompt tokens looked up.", stats.num_prompt_tokens),
            ("vllm:prefix_cache_hits", "Prompt tokens found.", stats.num_cached_tokens),
            ("vllm:spec_decode_num_draft_tokens", "Drafts.", sum(stats.num_drafted)),
            ("vllm:spec_decode_num_accepted_tokens", "Kept drafts.", sum(stats.num_accepted)),
            ("vllm:spec_decode_num_drafts", "Verifications.", sum(stats.num_drafted[:1])),
            ("qnext:requests_aborted", "Requests whose client left.", stats.num_aborted),
            ("qnext:requests_failed", "Requests that failed.", stats.num_failed),
        ):
            yield self._counter(name, text, value)
        places = CounterMetricFamily(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Kept drafts by position.",
            labels=["model_name", "position"],
        )
        for place, count in enumerate(list(stats.num_accepted)):
            places.add_metric([*self.labels, str(place)], count)
        yield places

    def _gauge(self, name: str, text: str, value: float) -> Any:
        family = GaugeMetricFamily(name, text, labels=["model_name"])
        family.add_metric(self.labels, value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Any:
        family = CounterMetricFamily(name, text, labels=["model_name"])
        family.add_metric(self.labels, value)
        return family
