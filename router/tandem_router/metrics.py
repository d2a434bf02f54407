"""What the router counts, in Prometheus text; children are bound once, not per request.

Each App owns a registry, so that several routers can live in one process (tests, local mode).
Names follow the OpenTelemetry and vLLM habit: seconds, totals, and the labels tier and reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import generate_latest

TTFT_BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 20, 60)
TPOT_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1)
E2E_BUCKETS = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300)
TOKEN_BUCKETS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 131072)
SCORE_BUCKETS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)

Child = TypeVar("Child")


class Family(dict[tuple[str, ...], Child]):
    """Children by label values, bound on first use."""

    def __init__(self, bind: Callable[..., Child]) -> None:
        super().__init__()
        self._bind = bind

    def __missing__(self, labels: tuple[str, ...]) -> Child:
        child = self[labels] = self._bind(*labels)
        return child


class TierMetrics:
    """Everything that is counted per tier."""

    def __init__(self, metrics: Metrics, tier: str) -> None:
        self.ttft = metrics.ttft.labels(tier)
        self.tpot = metrics.tpot.labels(tier)
        self.e2e = metrics.e2e.labels(tier)
        self.prompt_tokens = metrics.prompt_tokens.labels(tier)
        self.output_tokens = metrics.output_tokens.labels(tier)
        self.prompt_length = metrics.prompt_length.labels(tier)
        self.output_length = metrics.output_length.labels(tier)
        self.cost = metrics.cost.labels(tier)
        self.inflight = metrics.inflight.labels(tier)
        self.waiting = metrics.waiting.labels(tier)


class Metrics:
    """One router's metrics."""

    def __init__(self, tiers: Sequence[str]) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry

        def counter(name: str, text: str, labels: Sequence[str] = ()) -> Counter:
            return Counter(f"tandem_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, labels: Sequence[str] = ()) -> Gauge:
            return Gauge(f"tandem_{name}", text, labels, registry=registry)

        def histogram(
            name: str, text: str, buckets: Sequence[float], labels: Sequence[str] = ()
        ) -> Histogram:
            return Histogram(f"tandem_{name}", text, labels, buckets=buckets, registry=registry)

        tier = ("tier",)
        self.ttft = histogram("ttft_seconds", "Time to first token.", TTFT_BUCKETS, tier)
        self.tpot = histogram("tpot_seconds", "Time per output token.", TPOT_BUCKETS, tier)
        self.e2e = histogram("e2e_seconds", "Whole request.", E2E_BUCKETS, tier)
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens.", tier)
        self.output_tokens = counter("output_tokens", "Generated tokens.", tier)
        self.prompt_length = histogram(
            "prompt_length_tokens", "Prompt tokens of a request.", TOKEN_BUCKETS, tier
        )
        self.output_length = histogram(
            "output_length_tokens", "Generated tokens of a request.", TOKEN_BUCKETS, tier
        )
        self.cost = counter("cost_usd", "Realised cost, US dollars.", tier)
        self.cost_all_large = counter(
            "cost_all_large_usd", "What the same requests would have cost on the dearest tier."
        )
        self.inflight = gauge("inflight_requests", "Requests at workers.", tier)
        self.waiting = gauge("waiting_requests", "Requests held for a worker.", tier)
        self.predictor_seconds = histogram(
            "predictor_seconds", "Time to score one prompt.", SCORE_BUCKETS
        )
        self.threshold = gauge("gain_threshold", "Gain above which the dearest tier answers.")
        self.lambda_per_usd = gauge("lambda_per_usd", "Quality points that one dollar is worth.")
        self.expected_quality_ratio = gauge(
            "expected_quality_ratio", "Predicted quality of recent choices over all-dearest."
        )
        requests = counter("requests", "Requests by outcome.", ("tier", "status"))
        decisions = counter("decisions", "Tier choices by reason.", ("tier", "reason"))
        failovers = counter("failovers", "Requests carried on elsewhere.", ("tier", "kind"))
        tier_changes = counter(
            "tier_changes", "Requests that another tier took over.", ("from_tier", "tier")
        )
        ejections = counter("ejections", "Workers left out for failing requests.", ("tier",))
        upstream_errors = counter("upstream_errors", "Failed calls to workers.", ("tier", "kind"))
        rejected = counter("rejected_requests", "Requests refused before a worker.", ("code",))
        predictor = counter("predictor_outcomes", "Scores by outcome.", ("outcome",))
        workers = gauge("workers", "Workers known.", ("tier", "role", "state"))
        tenants = counter("tenant_cost_usd", "Realised cost per tenant.", ("tenant",))
        self.requests = Family(requests.labels)
        self.decisions = Family(decisions.labels)
        self.failovers = Family(failovers.labels)
        resumptions = counter(
            "resumptions",
            "Streams that another worker went on with: exact, or continued with other tokens than "
            "the first one would have made.",
            ("tier", "kind"),
        )
        self.resumptions = Family(resumptions.labels)
        self.tier_changes = Family(tier_changes.labels)
        self.ejections = Family(ejections.labels)
        self.upstream_errors = Family(upstream_errors.labels)
        self.rejected = Family(rejected.labels)
        self.predictor_outcomes = Family(predictor.labels)
        self.workers = Family(workers.labels)
        self.tenant_cost = Family(tenants.labels)
        self.tiers = {name: TierMetrics(self, name) for name in tiers}

    def render(self) -> bytes:
        return generate_latest(self.registry)
