"""Prometheus metrics of one worker; vLLM's names where the meaning is the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, get_args

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from tandem_worker.engine.core import EngineCounters
from tandem_worker.engine.drawn import FailureCode
from tandem_worker.engine.thread import EngineLoad

if TYPE_CHECKING:  # the transfer package imports torch, which is loaded later
    from tandem_worker.transfer import TransferStats

_LATENCY = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TOKEN_LATENCY = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class WorkerMetrics:
    """What the HTTP side counts; engine figures are read when scraped."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self.model_name = model_name

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            family = Histogram(name, text, ["model_name"], buckets=buckets, registry=self.registry)
            return family.labels(model_name)

        def counter(name: str, text: str) -> Counter:
            family = Counter(name, text, ["model_name"], registry=self.registry)
            return family.labels(model_name)

        self.ttft_s = histogram(
            "vllm:time_to_first_token_seconds", "Arrival to first token.", _LATENCY
        )
        self.itl_s = histogram(
            "vllm:inter_token_latency_seconds", "Time between tokens.", _TOKEN_LATENCY
        )
        self.e2e_s = histogram(
            "vllm:e2e_request_latency_seconds", "Arrival to last token.", _LATENCY
        )
        self.success = Counter(
            "vllm:request_success",
            "Finished choices by reason.",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        self.remote_prefill_s = histogram(
            "tandem_worker_remote_prefill_seconds",
            "Reservation to first token of a remote prefill.",
            _LATENCY,
        )
        self.remote_prefills = counter(
            "tandem_worker_remote_prefills", "Prompts filled by a prefill worker."
        )
        self.remote_failures = counter(
            "tandem_worker_remote_prefill_failures", "Remote prefill attempts that failed."
        )
        self.local_fallbacks = counter(
            "tandem_worker_local_prefill_fallbacks",
            "Prompts prefilled here after remote attempts failed.",
        )
        self.pushes = counter("tandem_worker_kv_pushes", "Prompts pushed to decode workers.")
        self.resumed = counter("tandem_worker_resumed_streams", "Streams taken over.")

    def watch(
        self, load: Callable[[], EngineLoad | None], counters: Callable[[], EngineCounters | None]
    ) -> None:
        """Read engine figures from these when scraped; None while the model loads."""
        self.registry.register(_EngineCollector(self.model_name, load, counters))

    def watch_transfer(self, stats: Callable[[], TransferStats | None]) -> None:
        """Read the KV receiver's figures from this when scraped; None where there is none."""
        self.registry.register(_TransferCollector(self.model_name, stats))

    def render(self) -> bytes:
        """Prometheus text."""
        return generate_latest(self.registry)


class _EngineCollector:
    def __init__(
        self,
        model: str,
        load: Callable[[], EngineLoad | None],
        counters: Callable[[], EngineCounters | None],
    ) -> None:
        self._model = model
        self._load = load
        self._counters = counters

    def describe(self) -> list[Metric]:
        """Nothing in advance: the figures exist once the engine does."""
        return []

    def collect(self) -> Iterator[Metric]:
        """One family per figure."""
        load, counters = self._load(), self._counters()
        if load is None or counters is None:
            return
        in_use = load.blocks_used / max(1, load.blocks_total)
        waiting = load.num_waiting + load.num_awaiting_kv
        gauges = [
            ("vllm:num_requests_running", "Sequences with blocks, computing.", load.num_running),
            ("vllm:num_requests_waiting", "Sequences waiting for blocks or KV.", waiting),
            ("vllm:kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", in_use),
            (
                "tandem_worker_pending_prefill_tokens",
                "Prompt tokens not yet computed.",
                load.pending_prefill_tokens,
            ),
            ("tandem_worker_step_seconds", "Smoothed time of a step.", counters.step_time_s),
        ]
        for name, text, value in gauges:
            gauge = GaugeMetricFamily(name, text, labels=["model_name"])
            gauge.add_metric([self._model], value)
            yield gauge
        blocks = GaugeMetricFamily(
            "tandem_worker_kv_blocks", "KV blocks by state.", labels=["model_name", "state"]
        )
        states = {"free": load.blocks_free, "cached": load.blocks_cached, "used": load.blocks_used}
        for state, count in states.items():
            blocks.add_metric([self._model, state], count)
        yield blocks
        failed = CounterMetricFamily(
            "tandem_worker_failed_requests",
            "Requests that no token could be drawn for, by reason.",
            labels=["model_name", "reason"],
        )
        for reason in get_args(FailureCode):
            failed.add_metric([self._model, reason], counters.failed.get(reason, 0))
        yield failed
        totals = [
            ("vllm:prompt_tokens", "Prompt tokens computed.", counters.num_prompt_tokens),
            ("vllm:generation_tokens", "Tokens generated.", counters.num_generated_tokens),
            ("vllm:num_preemptions", "Sequences preempted.", counters.num_preemptions),
            ("vllm:prefix_cache_queries", "Tokens looked up.", load.num_prefix_queries),
            ("vllm:prefix_cache_hits", "Tokens found.", load.num_prefix_hits),
            ("tandem_worker_steps", "Engine steps.", counters.num_steps),
        ]
        for name, text, value in totals:
            total = CounterMetricFamily(name, text, labels=["model_name"])
            total.add_metric([self._model], value)
            yield total


class _TransferCollector:
    def __init__(self, model: str, stats: Callable[[], TransferStats | None]) -> None:
        self._model = model
        self._stats = stats

    def describe(self) -> list[Metric]:
        """Nothing in advance: prefill workers receive nothing."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Reservations by state, what became of them, and KV bytes."""
        stats = self._stats()
        if stats is None:
            return
        held = GaugeMetricFamily(
            "tandem_worker_kv_reservations",
            "Reservations that hold KV blocks, by state.",
            labels=["model_name", "state"],
        )
        held.add_metric([self._model, "open"], stats.num_reserved)
        held.add_metric([self._model, "quarantined"], stats.num_quarantined)
        yield held
        ended = CounterMetricFamily(
            "tandem_worker_kv_transfers",
            "Reservations that ended, by outcome.",
            labels=["model_name", "outcome"],
        )
        ended.add_metric([self._model, "completed"], stats.num_completed)
        ended.add_metric([self._model, "failed"], stats.num_failed)
        yield ended
        for name, text, value in (
            ("tandem_worker_kv_received_bytes", "KV bytes received.", stats.bytes_received),
            (
                "tandem_worker_kv_refused_connections",
                "KV connections refused: wrong token, no handshake, too many.",
                stats.num_refused_connections,
            ),
        ):
            total = CounterMetricFamily(name, text, labels=["model_name"])
            total.add_metric([self._model], value)
            yield total
