"""What is asked of the router, whether or not it is served: what the control loop sizes for.

Completions say what the workers could do; arrivals say what was wanted of them. A request counts
once, when its tier is first decided, under the tier that it would have had were every tier ready:
so a tier that sleeps is woken by those who need it and by nobody else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from tandem_router.policy import Decision, Reason
from tandem_router.telemetry.metrics import Metrics


class Arrivals:
    """Running totals since the start, and how many requests are held for a worker now."""

    def __init__(self, tiers: Iterable[str], metrics: Metrics) -> None:
        self._metrics = metrics
        self._wanted: dict[str, list[int]] = {tier: [0, 0] for tier in tiers}
        self._held: Counter[str] = Counter()
        self._num_refused = 0

    def arrived(self, decision: Decision, prompt_tokens: int) -> None:
        """A request was decided for the first time."""
        tier = wanted_tier(decision)
        if tier is not None:
            row = self._wanted.setdefault(tier, [0, 0])
            row[0] += 1
            row[1] += prompt_tokens

    def refused(self) -> None:
        """A request was sent away for want of capacity."""
        self._num_refused += 1

    def held(self, tier: str) -> None:
        """A request begins to wait for a worker of the tier."""
        self._held[tier] += 1
        self._metrics.tiers[tier].waiting.inc()

    def let_go(self, tier: str | None) -> None:
        """It waits no longer; None: it did not."""
        if tier is not None:
            self._held[tier] -= 1
            self._metrics.tiers[tier].waiting.dec()

    def report(self) -> dict[str, Any]:
        """For `/admin/state`."""
        return {
            "num_refused": self._num_refused,
            "tiers": {
                tier: {"num_arrived": n, "prompt_tokens": tokens, "num_held": self._held[tier]}
                for tier, (n, tokens) in self._wanted.items()
            },
        }


def wanted_tier(decision: Decision) -> str | None:
    """The tier that the policy would have taken had every tier been ready."""
    if decision.reason is not Reason.UNAVAILABLE:
        return decision.tier
    fit = [v for v in decision.verdicts if v.excluded in (None, Reason.UNAVAILABLE)]
    scored = [v for v in fit if v.utility is not None]
    if scored:
        return max(scored, key=lambda v: v.utility or 0.0).tier
    asleep = [v.tier for v in fit if v.excluded is Reason.UNAVAILABLE]
    return asleep[-1] if asleep else decision.tier
