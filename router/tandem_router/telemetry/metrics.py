"""What the router counts, in Prometheus text; children are bound once, not per request.

Each App owns a registry, so that several routers can live in one process (tests, local mode).
Names follow the OpenTelemetry and vLLM habit: seconds, totals, and the labels tier and reason.

Everything is counted on the event loop, so a child is a plain number: the client library's take a
lock for each step and cost a tenth of a request. They become its families when somebody asks.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

TTFT_BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 20, 60)
TPOT_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1)
E2E_BUCKETS = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300)
TOKEN_BUCKETS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 131072)
SCORE_BUCKETS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)

Child = TypeVar("Child")


class Counter:
    """A sum that only grows."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def inc(self, amount: float = 1.0) -> None:
        self.value += amount


class Gauge:
    """A number that goes up and down."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def inc(self, amount: float = 1.0) -> None:
        self.value += amount

    def dec(self, amount: float = 1.0) -> None:
        self.value -= amount

    def set(self, value: float) -> None:
        self.value = float(value)


class Histogram:
    """How many observations were at most each bound, and their sum."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def observe_all(self, values: list[float]) -> None:
        """As `observe` of each: their order is looked up for each bound, not a bound for each."""
        values.sort()
        before = 0
        for index, bound in enumerate(self.bounds):
            upto = bisect_right(values, bound, before)
            self.counts[index] += upto - before
            before = upto
        self.counts[-1] += len(values) - before
        self.sum += math.fsum(values)


class Family(dict[tuple[str, ...], Child], Generic[Child]):
    """Children of one name by label values, made on first use."""

    def __init__(
        self, name: str, text: str, labels: Sequence[str], make: Callable[[], Child]
    ) -> None:
        super().__init__()
        self.name, self.text, self.names = name, text, labels
        self._make = make
        if not labels:
            self[()] = make()  # shown before anything was counted

    def __missing__(self, labels: tuple[str, ...]) -> Child:
        assert len(labels) == len(self.names)
        child = self[labels] = self._make()
        return child


class _Scraped(Collector):
    """The families as the client library writes them."""

    def __init__(self) -> None:
        self.before: Callable[[], None] = lambda: None
        self.counters: list[Family[Counter]] = []
        self.gauges: list[Family[Gauge]] = []
        self.histograms: list[Family[Histogram]] = []

    def collect(self) -> Iterator[Metric]:
        self.before()
        for counters in self.counters:
            summed = CounterMetricFamily(counters.name, counters.text, labels=counters.names)
            for labels, counter in counters.items():
                summed.add_metric(labels, counter.value)
            yield summed
        for gauges in self.gauges:
            levels = GaugeMetricFamily(gauges.name, gauges.text, labels=gauges.names)
            for labels, gauge in gauges.items():
                levels.add_metric(labels, gauge.value)
            yield levels
        for histograms in self.histograms:
            spread = HistogramMetricFamily(
                histograms.name, histograms.text, labels=histograms.names
            )
            for labels, histogram in histograms.items():
                spread.add_metric(labels, _cumulated(histogram), histogram.sum)
            yield spread


def _cumulated(histogram: Histogram) -> list[tuple[str, float]]:
    total, found = 0, []
    for bound, count in zip((*histogram.bounds, math.inf), histogram.counts, strict=True):
        total += count
        found.append(("+Inf" if math.isinf(bound) else str(float(bound)), float(total)))
    return found


class TierMetrics:
    """Everything that is counted per tier."""

    def __init__(self, metrics: Metrics, tier: str) -> None:
        self.ttft = metrics.ttft[(tier,)]
        self.tpot = metrics.tpot[(tier,)]
        self.e2e = metrics.e2e[(tier,)]
        self.prompt_tokens = metrics.prompt_tokens[(tier,)]
        self.output_tokens = metrics.output_tokens[(tier,)]
        self.prompt_length = metrics.prompt_length[(tier,)]
        self.output_length = metrics.output_length[(tier,)]
        self.cost = metrics.cost[(tier,)]
        self.inflight = metrics.inflight[(tier,)]
        self.waiting = metrics.waiting[(tier,)]


class _ByTier(dict[str, TierMetrics]):
    """Those of each tier, made when it is first asked for; of a tier that is gone they stay."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def __missing__(self, tier: str) -> TierMetrics:
        made = self[tier] = TierMetrics(self._metrics, tier)
        return made


class Metrics:
    """One router's metrics."""

    def __init__(self, tiers: Sequence[str]) -> None:
        self.registry = CollectorRegistry()
        scraped = self._scraped = _Scraped()

        def counters(name: str, text: str, labels: Sequence[str]) -> Family[Counter]:
            family = Family(f"tandem_{name}", text, labels, Counter)
            scraped.counters.append(family)
            return family

        def counter(name: str, text: str) -> Counter:
            return counters(name, text, ())[()]

        def gauges(name: str, text: str, labels: Sequence[str]) -> Family[Gauge]:
            family = Family(f"tandem_{name}", text, labels, Gauge)
            scraped.gauges.append(family)
            return family

        def gauge(name: str, text: str) -> Gauge:
            return gauges(name, text, ())[()]

        def histograms(
            name: str, text: str, buckets: Sequence[float], labels: Sequence[str] = ()
        ) -> Family[Histogram]:
            family = Family(f"tandem_{name}", text, labels, lambda: Histogram(buckets))
            scraped.histograms.append(family)
            return family

        tier = ("tier",)
        self.ttft = histograms("ttft_seconds", "Time to first token.", TTFT_BUCKETS, tier)
        self.tpot = histograms("tpot_seconds", "Time per output token.", TPOT_BUCKETS, tier)
        self.e2e = histograms("e2e_seconds", "Whole request.", E2E_BUCKETS, tier)
        self.prompt_tokens = counters("prompt_tokens", "Prompt tokens.", tier)
        self.output_tokens = counters("output_tokens", "Generated tokens.", tier)
        self.prompt_length = histograms(
            "prompt_length_tokens", "Prompt tokens of a request.", TOKEN_BUCKETS, tier
        )
        self.output_length = histograms(
            "output_length_tokens", "Generated tokens of a request.", TOKEN_BUCKETS, tier
        )
        self.cost = counters("cost_usd", "Realised cost, US dollars.", tier)
        self.cost_all_large = counter(
            "cost_all_large_usd", "What the same requests would have cost on the dearest tier."
        )
        self.inflight = gauges("inflight_requests", "Requests at workers.", tier)
        self.waiting = gauges("waiting_requests", "Requests held for a worker.", tier)
        self.predictor_seconds = histograms(
            "predictor_seconds", "Time to score one prompt.", SCORE_BUCKETS
        )[()]
        self.threshold = gauge("gain_threshold", "Gain above which the dearest tier answers.")
        self.lambda_per_usd = gauge("lambda_per_usd", "Quality points that one dollar is worth.")
        self.expected_quality_ratio = gauge(
            "expected_quality_ratio", "Predicted quality of recent choices over all-dearest."
        )
        self.learning_cost = counter(
            "learning_cost_usd", "Shadow answers and their judge, US dollars at list prices."
        )
        self.measured_quality = gauge(
            "measured_quality_ratio", "Measured quality delivered over all-dearest."
        )
        self.measured_low = gauge(
            "measured_quality_ratio_low", "Lower end of its interval, valid at any time."
        )
        self.measured_high = gauge("measured_quality_ratio_high", "Upper end of its interval.")
        self.quality_labels = counters(
            "quality_labels", "Labels of quality by source.", ("source",)
        )
        self.requests = counters("requests", "Requests by outcome.", ("tier", "status"))
        self.decisions = counters("decisions", "Tier choices by reason.", ("tier", "reason"))
        self.failovers = counters("failovers", "Requests carried on elsewhere.", ("tier", "kind"))
        self.tier_changes = counters(
            "tier_changes", "Requests that another tier took over.", ("from_tier", "tier")
        )
        self.ejections = counters("ejections", "Workers left out for failing requests.", ("tier",))
        self.upstream_errors = counters(
            "upstream_errors", "Failed calls to workers.", ("tier", "kind")
        )
        self.rejected = counters(
            "rejected_requests", "Requests refused before a worker.", ("code",)
        )
        self.cascade_zones = counters(
            "cascade_zones",
            "Requests that the cascade could read: small and large answer directly, verify is read "
            "first.",
            ("zone",),
        )
        self.cascade_outcomes = counters(
            "cascade_outcomes",
            "Answers that were to be read: verified, escalated, or why neither.",
            ("outcome",),
        )
        self.cascade_judge = counters(
            "cascade_judge",
            "Answers of which the judge was to be asked before they were sent: good, bad, or why "
            "it said neither.",
            ("outcome",),
        )
        self.predictor_outcomes = counters("predictor_outcomes", "Scores by outcome.", ("outcome",))
        self.workers = gauges("workers", "Workers known.", ("tier", "role", "state"))
        self.tenant_cost = counters("tenant_cost_usd", "Realised cost per tenant.", ("tenant",))
        self.resumptions = counters(
            "resumptions",
            "Streams that another worker went on with: exact, or continued with other tokens than "
            "the first one would have made.",
            ("tier", "kind"),
        )
        self.registry.register(scraped)
        self.tiers = _ByTier(self)
        self.show(tiers)

    def show(self, tiers: Sequence[str]) -> None:
        """Name these tiers before anything was counted."""
        for name in tiers:
            _ = self.tiers[name]

    @property
    def before_read(self) -> Callable[[], None]:
        """Called before anybody reads, for who has not counted all yet."""
        return self._scraped.before

    @before_read.setter
    def before_read(self, counts: Callable[[], None]) -> None:
        self._scraped.before = counts

    def render(self) -> bytes:
        return generate_latest(self.registry)
