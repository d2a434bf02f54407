"""What became of the requests: latencies, goodput, cost and quality. Bounded memory per request."""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

PERCENTILES = (50.0, 90.0, 95.0, 99.0)


class Outcomes:
    """Columns of finished requests; a row takes 40 bytes."""

    def __init__(self, tiers: tuple[str, ...]) -> None:
        self.tiers = tiers
        self._tier_index = {name: i for i, name in enumerate(tiers)}
        self.arrived_s = array("d")
        self.ttft_s = array("f")
        self.e2e_s = array("f")
        self.tpot_s = array("f")
        self.tier = array("b")
        self.prompt_tokens = array("l")
        self.output_tokens = array("l")
        self.quality = array("f")
        self.best_quality = array("f")
        self.num_rejected = 0
        self.num_failed = 0
        self.reasons: dict[str, int] = {}

    def add(
        self,
        *,
        arrived_s: float,
        first_s: float,
        done_s: float,
        tier: str,
        prompt_tokens: int,
        output_tokens: int,
        quality: float = math.nan,
        best_quality: float = math.nan,
    ) -> None:
        """One served request; times on the virtual clock."""
        self.arrived_s.append(arrived_s)
        self.ttft_s.append(first_s - arrived_s)
        self.e2e_s.append(done_s - arrived_s)
        rest = output_tokens - 1
        self.tpot_s.append((done_s - first_s) / rest if rest > 0 else math.nan)
        self.tier.append(self._tier_index[tier])
        self.prompt_tokens.append(prompt_tokens)
        self.output_tokens.append(output_tokens)
        self.quality.append(quality)
        self.best_quality.append(best_quality)

    def __len__(self) -> int:
        return len(self.ttft_s)


@dataclass(frozen=True, slots=True)
class Targets:
    """The SLO, seconds; None: not promised."""

    ttft_s: float | None = None
    tpot_s: float | None = None


def percentiles(values: NDArray[Any]) -> dict[str, float | None]:
    """p50, p90, p95, p99 and the mean; None where nothing was measured."""
    known = values[~np.isnan(values)]
    if not len(known):
        return {**{f"p{p:g}": None for p in PERCENTILES}, "mean": None}
    found = np.percentile(known, PERCENTILES)
    named = {f"p{p:g}": float(v) for p, v in zip(PERCENTILES, found, strict=True)}
    return {**named, "mean": float(known.mean())}


def summary(outcomes: Outcomes, targets: Targets, duration_s: float) -> dict[str, Any]:
    """Latency, goodput, tokens and quality as plain data.

    Goodput counts requests that met every target; rejected and failed ones stand in its
    denominator.
    """
    ttft = np.frombuffer(outcomes.ttft_s, dtype=np.float32)
    tpot = np.frombuffer(outcomes.tpot_s, dtype=np.float32)
    e2e = np.frombuffer(outcomes.e2e_s, dtype=np.float32)
    tier = np.frombuffer(outcomes.tier, dtype=np.int8)
    met = np.ones(len(ttft), dtype=bool)
    met_ttft = ttft <= targets.ttft_s if targets.ttft_s is not None else met
    met_tpot = ~(tpot > targets.tpot_s) if targets.tpot_s is not None else met
    asked = len(ttft) + outcomes.num_rejected + outcomes.num_failed
    good = int((met_ttft & met_tpot).sum())
    quality = np.frombuffer(outcomes.quality, dtype=np.float32)
    best = np.frombuffer(outcomes.best_quality, dtype=np.float32)
    known = ~np.isnan(quality) & ~np.isnan(best)
    per_tier = {}
    for index, name in enumerate(outcomes.tiers):
        rows = tier == index
        per_tier[name] = {
            "requests": int(rows.sum()),
            "share": float(rows.mean()) if len(rows) else 0.0,
            "ttft_s": percentiles(ttft[rows]),
            "tpot_s": percentiles(tpot[rows]),
        }
    tokens = float(np.frombuffer(outcomes.output_tokens, dtype=np.int64).sum())
    return {
        "requests": asked,
        "served": len(ttft),
        "rejected": outcomes.num_rejected,
        "failed": outcomes.num_failed,
        "ttft_s": percentiles(ttft),
        "tpot_s": percentiles(tpot),
        "e2e_s": percentiles(e2e),
        "slo": {
            "ttft": float(met_ttft.sum()) / asked if asked and targets.ttft_s else None,
            "tpot": float(met_tpot.sum()) / asked if asked and targets.tpot_s else None,
            "both": good / asked if asked else None,
        },
        "goodput_per_s": good / duration_s if duration_s > 0.0 else None,
        "output_tokens_per_s": tokens / duration_s if duration_s > 0.0 else None,
        "quality": float(quality[known].mean()) if known.any() else None,
        "quality_ratio": (
            float(quality[known].sum() / best[known].sum())
            if known.any() and best[known].sum() > 0.0
            else None
        ),
        "tiers": per_tier,
        "reasons": dict(sorted(outcomes.reasons.items())),
    }
