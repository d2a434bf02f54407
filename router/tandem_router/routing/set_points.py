"""What the router learns from its decisions, and how that moves the next ones.

Every dispatched request is counted once, under the tier that serves it: in the recent shares, by
the online controllers (`tandem_router.control`), for the quality floor, and in the predicted
quality that people are shown.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from tandem_router.config import RouterConfig
from tandem_router.control import (
    Bucket,
    BudgetPacer,
    OnlineControl,
    ShadowLabel,
    ShareTracker,
    TrafficShift,
)
from tandem_router.control.floor_limit import MARGIN, FloorLimit
from tandem_router.control.usual_saving import UsualSaving
from tandem_router.limits.prices import Prices, list_price
from tandem_router.openai.request import InferenceRequest
from tandem_router.policy import (
    Decision,
    LatencySlo,
    PolicySetPoints,
    PolicyState,
    Reason,
    TierVerdict,
)
from tandem_router.routing.new_tiers import NewTiers
from tandem_router.routing.predictor_source import ArtifactPredictor, LengthPredictor, Predictor
from tandem_router.store.records import Label
from tandem_router.telemetry.metrics import Metrics

DEFAULT_THRESHOLDS = {"Learned": 0.1, "Fixed": 0.1, "Length": 0.5}
EXPECTED_QUALITY_WINDOW = 500
_NOT_BY_THRESHOLD = frozenset({Reason.FORCED, Reason.OUT_OF_DISTRIBUTION})


class _Expected(Struct, eq=False):
    """Predicted qualities of one request, cheapest tier first, and which of them was taken."""

    chosen: int
    qualities: tuple[float | None, ...]


class Counted(Struct, eq=False):
    """One request as the policy's memory and the controllers know it; it counts once."""

    tier: str
    expected_cost_usd: float
    set_points: PolicySetPoints  # those it was decided with
    place: int  # among the recent requests
    expected: _Expected | None  # None where a quality is unknown
    verdicts: tuple[TierVerdict, ...]  # cheapest first, as in `expected`


class Steering:
    """One router's set-points and memory of recent requests.

    The set-points are moved by online controllers or by /admin/set-points. Where a learned
    predictor holds a quality floor, a gain threshold that is asked for is clipped to the floor's.
    """

    def __init__(
        self,
        config: RouterConfig,
        prices: Prices,
        predictor: Predictor | None,
        metrics: Metrics,
        clock: Callable[[], float],
        budget: Bucket | None,
        unbilled: frozenset[str],
    ) -> None:
        self._config = config
        self._prices = prices
        self._metrics = metrics
        self._clock = clock
        self._predictor = predictor
        self._unbilled = unbilled
        self._ends = (prices.cheapest, prices.dearest)
        self.new_tiers = NewTiers()
        self._look_for_new_tiers()
        self.state = PolicyState()
        self._asked = config.threshold  # None: nobody asks for one
        self._floor = self._new_floor(predictor)
        self._saving = UsualSaving()
        base = PolicySetPoints(gain_threshold=self._clipped(), **_fixed_set_points(config))
        cap = config.tier(prices.dearest).max_share
        self.control = OnlineControl(
            base,
            pacer=BudgetPacer(budget, clock(), unbilled=unbilled) if budget is not None else None,
            share=ShareTracker(cap) if cap is not None and len(config.tiers) > 1 else None,
            share_ceiling=True,
            shift=TrafficShift() if budget is not None or cap is not None else None,
        )
        # Prompt length ranks prompts; the qualities it states were measured nowhere.
        self.states_quality = not isinstance(predictor, LengthPredictor)
        self._move_threshold()
        self._expected: deque[_Expected] = deque(maxlen=EXPECTED_QUALITY_WINDOW)
        self._show_set_points()

    def reconfigure(
        self, config: RouterConfig, budget: Bucket | None, unbilled: frozenset[str]
    ) -> None:
        """Take other settings; what was learnt about traffic, money and qualities stays.

        Only a threshold or floor that differs from before moves the threshold; where gains lie
        between other tiers than before, what was learnt of gains is forgotten.
        """
        before, self._config = self._config, config
        self._look_for_new_tiers()
        ends = (self._prices.cheapest, self._prices.dearest)
        if {tier.name for tier in config.tiers} != {tier.name for tier in before.tiers} or (
            ends != self._ends
        ):
            self._expected.clear()
        if ends != self._ends:
            self._ends = ends
            self.control.forget()
            self._saving = UsualSaving()
            self._floor = self._new_floor(self._predictor, before=self._floor)
            self._move_threshold()
        self._unbilled = unbilled
        if self.control.pacer is not None:
            self.control.pacer.unbilled = unbilled
        self.control.base = replace(self.control.base, **_fixed_set_points(config))
        pacer = self.control.pacer
        if budget is None:
            self.control.pacer = None
        elif pacer is None or pacer.bucket is not budget:
            self.control.pacer = BudgetPacer(budget, self._clock(), unbilled=self._unbilled)
        cap = config.tier(self._prices.dearest).max_share
        if cap is None or len(config.tiers) < 2:
            self.control.share = None
        elif self.control.share is None:
            self.control.share = ShareTracker(cap)
        else:
            self.control.share.target = cap
        floor = config.objective.quality_floor
        old_floor, learns = before.objective.quality_floor, config.learning.shadow_share > 0.0
        if (config.threshold, floor) != (before.threshold, old_floor):
            self._asked = config.threshold
            if self._floor is not None and floor is not None:
                self._floor.set_floor(floor)
            else:
                self._floor = self._new_floor(self._predictor)
            self._move_threshold()
        elif self._floor is None and learns:
            self._floor = self._new_floor(self._predictor)
        self._move_threshold()
        self._show_set_points()

    @property
    def set_points(self) -> PolicySetPoints:
        return self.set_points_now()

    def set_points_now(self) -> PolicySetPoints:
        """As `set_points`: a call costs a request less than a property."""
        return self.control.set_points(self._clock())

    @property
    def threshold_limit(self) -> dict[str, Any]:
        """The gain threshold asked for, the most that the quality floor allows, and that in force.

        In force may be more than the limit: a budget and a largest share come before quality.
        basis: what the limit rests on, and after how many labels.
        """
        floor = self._floor
        return {
            "asked": self._asked,
            "limit": floor.threshold if floor is not None else None,
            "basis": floor.basis if floor is not None else None,
            "num_labels": floor.num_labels if floor is not None else 0,
            "judge_lean": floor.lean if floor is not None else 1.0,
            "in_force": self.set_points.gain_threshold,
        }

    def learn(self, label: Label) -> bool:
        """A label of the cheapest and the dearest tier moves the floor's limit.

        One of a tier that the predictor does not know says what that is worth. True where the
        limit was refuted, and other tiers answer from now on.
        """
        self._look_for_new_tiers()
        self.new_tiers.learn(label)
        floor, prices = self._floor, self._prices
        small, large = (label.quality.get(tier) for tier in (prices.cheapest, prices.dearest))
        expected = [label.predicted.get(tier) for tier in (prices.cheapest, prices.dearest)]
        if floor is None or small is None or large is None:
            return False
        if expected[0] is None or expected[1] is None:
            return False
        gain = expected[1] - expected[0]
        stated = expected if floor.predicts else (None, None)
        one = ShadowLabel(gain, small, large, 1.0, *stated)
        before = floor.refuted
        floor.learn(one, self.set_points.gain_threshold)
        self._move_threshold()
        self._show_set_points()
        return floor.refuted and not before

    def _look_for_new_tiers(self) -> None:
        by_price = sorted(self._config.tiers, key=list_price)
        known = getattr(self._predictor, "known_tiers", None)
        self.new_tiers.set_tiers(tuple(tier.name for tier in by_price), known)

    def forget_labels(self) -> None:
        """Labels until now are of no use for the floor: what is predicted counts again."""
        self._floor = self._new_floor(self._predictor, before=self._floor)
        self._move_threshold()
        self._show_set_points()

    def judge_leans(self, factor: float) -> None:
        """Gold labels say that losses are so many times what the judge says."""
        if self._floor is not None and self._floor.judge_leans(factor):
            self._move_threshold()
            self._show_set_points()

    def _new_floor(
        self, predictor: Predictor | None, before: FloorLimit | None = None
    ) -> FloorLimit | None:
        """What holds the quality floor: the predictor's expectation, and labels.

        before: whose limit stands until enough is known.

        Only a learned predictor's qualities are measured ones; prompt length keeps its threshold
        until labels say that it breaks the floor, and a fixed choice for ever.
        """
        floor = self._config.objective.quality_floor
        if floor is None or len(self._config.tiers) < 2:
            return None
        if isinstance(predictor, LengthPredictor):
            if self._config.learning.shadow_share <= 0.0:
                return None
            grid = np.linspace(-0.02, 1.0, 52)
            return FloorLimit(floor, 1.0, predicts=False, thresholds=grid)
        if not isinstance(predictor, ArtifactPredictor):
            return None
        training = predictor.training_gains(self._prices.dearest, self._prices.cheapest)
        limit = before.threshold if before is not None else DEFAULT_THRESHOLDS["Learned"]
        # Without labels to come a prediction is all there is, and stays what it says.
        margin = MARGIN if self._config.learning.shadow_share > 0.0 else 0.0
        return FloorLimit(floor, limit, training, margin=margin)

    def _clipped(self) -> float:
        """The threshold asked for, within the floor's limit; that limit where nobody asks."""
        floor, asked = self._floor, self._asked
        if asked is None and (floor is None or not floor.predicts):
            by_length = isinstance(self._predictor, LengthPredictor)
            asked = DEFAULT_THRESHOLDS["Length" if by_length else self._config.predictor.type]
        if floor is not None:
            return floor.clip(asked)
        assert asked is not None
        return asked

    def _move_threshold(self) -> None:
        is_free = self._asked is None and self.control.pacer is None
        is_free = is_free and not self.control.base.lambda_per_usd > 0.0
        self.control.base = self._saving.in_force(
            self.control.base, self._clipped, self._floor, is_free
        )

    def predictor_changed(self, predictor: Predictor | None) -> None:
        """Another predictor or artifact is in use: its gains are on another scale."""
        self._predictor = predictor
        self._look_for_new_tiers()
        states_quality = not isinstance(predictor, LengthPredictor)
        if states_quality != self.states_quality:
            self._expected.clear()
        self.states_quality = states_quality
        self._floor = self._new_floor(predictor, before=self._floor)
        self._move_threshold()
        self._show_set_points()

    def move_set_points(
        self, gain_threshold: float | None = None, lambda_per_usd: float | None = None
    ) -> None:
        """Ask for other base set-points; a threshold over the quality floor's is clipped to it."""
        if lambda_per_usd is not None:
            self.control.base = replace(self.control.base, lambda_per_usd=lambda_per_usd)
        if gain_threshold is not None:
            self._asked = gain_threshold
        self._move_threshold()
        self._show_set_points()

    def _show_set_points(self) -> None:
        points = self.set_points
        self._metrics.threshold.set(points.gain_threshold)
        self._metrics.lambda_per_usd.set(points.lambda_per_usd)

    def count(
        self,
        decision: Decision,
        request: InferenceRequest,
        set_points: PolicySetPoints,
        will_be_read: bool = False,
    ) -> Counted:
        """Count a request where it was decided to go, once its money is held.

        Counted before it is served, so that requests in flight already weigh in the next
        decisions. will_be_read: the quality floor learns its gain from the verdict (`read`).
        """
        assert decision.tier is not None
        self.control.decided(self._clock(), decision, request.num_prompt_tokens)
        expected = _expected(decision) if self.states_quality else None
        stake = self._saving.observe(decision)
        if expected is not None:
            self._expected.append(expected)
            # Where the threshold decides nothing, it loses nothing: such requests have no part in
            # what others may lose.
            if not will_be_read and decision.reason not in _NOT_BY_THRESHOLD:
                self._hold_floor(decision.gain, expected.qualities[-1], stake)
        return Counted(
            decision.tier,
            decision.expected_cost_usd,
            set_points,
            self.state.record(decision.tier),
            expected,
            decision.verdicts,
        )

    def _hold_floor(self, gain: float | None, dearest: float | None, stake: float = 1.0) -> None:
        floor = self._floor
        if floor is None or gain is None or dearest is None:
            return
        if floor.observe(gain, dearest, stake):
            self._move_threshold()

    def read(self, counted: Counted, qualities: Mapping[str, float] | None) -> None:
        """A verifier has read the first answer; its qualities take the prompt's place.

        What the threshold was compared with is then the gain after reading. None: it said nothing.
        """
        expected = counted.expected
        if expected is None:
            return
        if qualities is not None:
            expected.qualities = tuple(
                qualities.get(verdict.tier, quality)
                for verdict, quality in zip(counted.verdicts, expected.qualities, strict=True)
            )
        cheapest, dearest = expected.qualities[0], expected.qualities[-1]
        if cheapest is not None and dearest is not None:
            self._hold_floor(dearest - cheapest, dearest)

    def move(self, counted: Counted, decision: Decision) -> None:
        """Another tier takes the request over: it counts there, and no longer where it was."""
        assert decision.tier is not None
        self.control.moved(counted.tier, counted.expected_cost_usd, decision)
        expected = _expected(decision)
        if counted.expected is not None and expected is not None:
            counted.expected.chosen = expected.chosen
        self.state.move(counted.place, decision.tier)
        counted.tier = decision.tier
        counted.expected_cost_usd = decision.expected_cost_usd

    def answered(self, counted: Counted, cost_usd: float) -> None:
        """Learn from what the answer really cost; zero for a request that never ran."""
        self.control.answered(counted.tier, counted.expected_cost_usd, cost_usd)

    @property
    def expected_quality_ratio(self) -> float | None:
        """Predicted quality of recent choices as a share of all-dearest.

        None without scores, and where the qualities are no measured ones (`Length`).
        """
        dearest = sum(one.qualities[-1] or 0.0 for one in self._expected)
        if dearest <= 0.0:
            return None
        return sum(one.qualities[one.chosen] or 0.0 for one in self._expected) / dearest

    @property
    def content_blind_quality_ratio(self) -> float | None:
        """The same had each tier got as many of these requests, whatever was in them.

        What the predictor is worth at equal cost is the difference. None without scores of every
        tier.
        """
        known = [
            (one.chosen, [quality for quality in one.qualities if quality is not None])
            for one in self._expected
            if None not in one.qualities
        ]
        if not known:
            return None
        columns = zip(*(found for _, found in known), strict=True)
        totals: list[float] = [sum(column) for column in columns]
        if totals[-1] <= 0.0:
            return None
        return sum(totals[chosen] for chosen, _ in known) / len(known) / totals[-1]


def _expected(decision: Decision) -> _Expected | None:
    qualities = tuple(verdict.quality for verdict in decision.verdicts)
    chosen = next((i for i, v in enumerate(decision.verdicts) if v.tier == decision.tier), None)
    if decision.gain is None or chosen is None:
        return None
    if qualities[chosen] is None or qualities[-1] is None:
        return None
    return _Expected(chosen, qualities)


def _fixed_set_points(config: RouterConfig) -> dict[str, Any]:
    """Those that no controller moves."""
    return {
        "fallback_tier": config.fallback_tier,
        "slo": LatencySlo(ttft_s=_seconds(config.slo.ttft_ms), tpot_s=_seconds(config.slo.tpot_ms)),
        "on_exhausted": _ON_EXHAUSTED[config.budget.on_exhausted],
        "max_paid_tokens": config.budget.max_paid_tokens,
        "min_paid_tokens": config.budget.min_paid_tokens,
    }


_ON_EXHAUSTED: dict[str, Literal["downgrade", "queue", "reject"]] = {
    "Downgrade": "downgrade",
    "Queue": "queue",
    "Reject": "reject",
}


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000.0
