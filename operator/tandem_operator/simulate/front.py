"""The router of a simulation: the production policy and controllers, fed from the trace's scores.

`tandem_router.routing.set_points` drives the same objects: `decide`, `PolicyState`, `OnlineControl`
and `FloorLimit`. What it has beside them is what a replay has not: an artifact that is exchanged,
labels, money that other replicas spend, and metrics.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from msgspec.structs import replace

from tandem_operator.simulate.arrivals import Arrival
from tandem_router.control import OnlineControl, ShareTracker, TrafficShift
from tandem_router.control.floor_limit import FloorLimit
from tandem_router.control.usual_saving import UsualSaving
from tandem_router.policy import (
    Decision,
    LatencySlo,
    Overrides,
    PlainScore,
    PolicySetPoints,
    PolicyState,
    RouteRequest,
    ScoreStatus,
    TierOption,
    decide,
)
from tandem_router.routing.arrivals import wanted_tier


@dataclass(frozen=True, slots=True)
class TierPlan:
    """One tier as the router knows it.

    Attributes:
        external_ttft_s: Of an external tier: how long its first token takes; None for our own.
        external_tpot_s: Its time per token.
    """

    name: str
    usd_per_1m_input_tokens: float = 0.0
    usd_per_1m_output_tokens: float = 0.0
    max_share: float | None = None
    external_ttft_s: float | None = None
    external_tpot_s: float = 0.02


class Front:
    """Chooses a tier per request and counts it.

    Args:
        tiers: In the Router's order.
        fallback: Tier without scores; None: the dearest.
        threshold: Gain threshold at the start.
        quality_floor: Held on predictions, as the router does before it has labels.
        available: Whether a tier has a worker now.
        training: (gain, quality of the dearest tier) of the prompts that the predictor was trained
            on: they stand for traffic until there is some.
        margin: Of the limit that is predicted, where labels are to come.
    """

    def __init__(
        self,
        tiers: tuple[TierPlan, ...],
        *,
        fallback: str | None,
        threshold: float,
        quality_floor: float | None,
        ttft_slo_s: float | None,
        tpot_slo_s: float | None,
        available: Callable[[str], bool],
        training: Iterable[tuple[float, float]] = (),
        margin: float = 0.0,
    ) -> None:
        self._tiers = tiers
        self._available = available
        base = PolicySetPoints(
            gain_threshold=threshold,
            fallback_tier=fallback,
            slo=LatencySlo(ttft_slo_s, tpot_slo_s),
            unbilled=frozenset(t.name for t in tiers if t.external_ttft_s is None),
        )
        cap = tiers[-1].max_share if len(tiers) > 1 else None
        self._control = OnlineControl(
            base,
            share=ShareTracker(cap) if cap is not None else None,
            share_ceiling=True,
            shift=TrafficShift() if cap is not None else None,
        )
        self._now = 0.0
        self._asked: float | None = None
        self._saving = UsualSaving()
        self._state = PolicyState()
        self._floor: FloorLimit | None = None
        if quality_floor is not None:
            self._floor = FloorLimit(quality_floor, threshold, training, margin=margin)
            self._move_base()
        self.counts = {tier.name: [0, 0, 0] for tier in tiers}  # requests, prompt, output tokens
        self.num_inflight = 0
        self.num_refused = 0
        self.held: Counter[str] = Counter()
        self._wanted = {tier.name: [0, 0] for tier in tiers}  # requests, prompt tokens

    @property
    def set_points(self) -> PolicySetPoints:
        """Those in force."""
        return self._control.set_points(self._now)

    def choose(self, arrival: Arrival) -> Decision:
        """The policy's decision, counted."""
        self._now = arrival.at_s
        score = None
        if arrival.predicted:
            score = PlainScore(arrival.predicted, mean_tokens=arrival.predicted_tokens)
        options = [
            TierOption(
                name=tier.name,
                available=self._available(tier.name),
                usd_per_1m_input_tokens=tier.usd_per_1m_input_tokens,
                usd_per_1m_output_tokens=tier.usd_per_1m_output_tokens,
                max_share=tier.max_share,
            )
            for tier in self._tiers
        ]
        if not any(option.available for option in options):
            options = [replace(option, available=True) for option in options]  # held, not refused
        request = RouteRequest(
            prompt_tokens=arrival.prompt_tokens,
            score=score,
            score_status=ScoreStatus.OK if score else ScoreStatus.ABSENT,
            overrides=Overrides(tier=arrival.tier),
        )
        decision = decide(request, options, self.set_points, self._state)
        wanted = wanted_tier(decision)
        if wanted is not None:
            self._wanted[wanted][0] += 1
            self._wanted[wanted][1] += arrival.prompt_tokens
        if decision.tier is not None:
            self._state.record(decision.tier)
            self._control.decided(self._now, decision, arrival.prompt_tokens)
        forced = arrival.tier is not None
        if self._floor is not None and not forced and decision.gain is not None:
            dearest = decision.verdicts[-1].quality
            stake = self._saving.observe(decision)
            if dearest is not None and self._floor.observe(decision.gain, dearest, stake):
                self._move_base()
        return decision

    def finished(self, tier: str, prompt_tokens: int, output_tokens: int) -> None:
        """A request was served."""
        row = self.counts[tier]
        row[0] += 1
        row[1] += prompt_tokens
        row[2] += output_tokens

    def move_threshold(self, threshold: float) -> None:
        """What the control loop asks for, within what the quality floor lets through."""
        self._asked = threshold
        self._move_base()

    def _threshold(self) -> float:
        if self._floor is not None:
            return self._floor.clip(self._asked)
        assert self._asked is not None
        return self._asked

    def _move_base(self) -> None:
        is_free = self._asked is None
        self._control.base = self._saving.in_force(
            self._control.base, self._threshold, self._floor, is_free
        )

    def state(self) -> dict[str, Any]:
        """What GET /admin/state says, as far as the control loop reads it."""
        return {
            "num_inflight": self.num_inflight,
            "arrivals": {
                "num_refused": self.num_refused,
                "tiers": {
                    name: {"num_arrived": n, "prompt_tokens": tokens, "num_held": self.held[name]}
                    for name, (n, tokens) in self._wanted.items()
                },
            },
            "tiers": [
                {
                    "name": name,
                    "num_requests": row[0],
                    "prompt_tokens": row[1],
                    "output_tokens": row[2],
                }
                for name, row in self.counts.items()
            ],
            "curve": [
                {
                    "threshold": point.threshold,
                    "shares": point.shares,
                    "quality_ratio": point.quality_ratio,
                }
                for point in self._control.curve.points()
            ],
            "set_points": {"gain_threshold": self.set_points.gain_threshold},
            "threshold": {
                "asked": self._asked,
                "limit": self._floor.threshold if self._floor is not None else None,
                "in_force": self.set_points.gain_threshold,
            },
        }
