"""From a request to a tier: score the prompt, gather what the tiers offer, ask the policy.

The policy itself is pure (`tandem_router.policy`); here its inputs are collected from the
predictor, the picker and the tenant, and its answer is counted. A predictor that is late or
broken costs a counter, never a request.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal

from tandem_router.admission import TenantState
from tandem_router.config import PredictorConfig, RouterConfig, TierConfig
from tandem_router.control import BudgetPacer, OnlineControl, ShareTracker, TrafficShift
from tandem_router.control import Reservation as Budgeted
from tandem_router.errors import ApiError
from tandem_router.floor import PredictedFloor
from tandem_router.metrics import Metrics
from tandem_router.picking import Picker
from tandem_router.policy import (
    Decision,
    LatencySlo,
    Overrides,
    PlainScore,
    PolicySetPoints,
    PolicyState,
    RouteRequest,
    Score,
    ScoreStatus,
    TenantCeilings,
    TierOption,
    decide,
)
from tandem_router.predictors import ArtifactPredictor, Predictor
from tandem_router.requests import DEFAULT_OUTPUT_TOKENS, InferenceRequest

logger = logging.getLogger("tandem.router")

DEFAULT_THRESHOLDS = {"Learned": 0.1, "Fixed": 0.1, "Length": 0.5}
# A predictor that scores a long prompt within this runs on the event loop: a thread hop costs about
# 0.1 ms and its wake-up competes with the streams.
INLINE_BELOW_S = 0.005
# Inline scores above the deadline, in a row, before the predictor is moved to a thread.
SLOW_IN_A_ROW = 3
LATENCY_SMOOTHING = 0.2
# A smoothed latency says nothing about a load that ended longer ago than this.
LATENCY_BELIEVED_S = 10.0
EXPECTED_QUALITY_WINDOW = 500


class Scorer:
    """Runs a predictor under its deadline, inline as long as it is quick.

    Late is a score that was not ready in time, not one whose result waited for a busy event loop:
    a finished score is used. Inline there is nothing to be saved by throwing a slow score away;
    it moves the predictor to a thread instead, where lateness costs no stream anything.
    """

    def __init__(
        self, predictor: Predictor | None, config: PredictorConfig, metrics: Metrics
    ) -> None:
        self._predictor = predictor
        self._type = config.type
        self._deadline_s = config.deadline_ms / 1000.0
        self._max_chars = config.max_prompt_chars
        self._metrics = metrics
        self._executor: ThreadPoolExecutor | None = None
        self._running: Future[tuple[Score, float]] | None = None
        self._num_slow = 0
        self._complained = False
        if predictor is not None and not self._is_quick(predictor):
            self._leave_the_loop()

    @property
    def name(self) -> str:
        """For people: the configured type, and the version of a learned predictor."""
        version = getattr(self._predictor, "version", None)
        return f"{self._type} {version}" if isinstance(version, str) else self._type

    @property
    def inline(self) -> bool:
        return self._executor is None

    def _leave_the_loop(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="predictor")

    def _is_quick(self, predictor: Predictor) -> bool:
        """Best of three on a long prompt: noise of a busy machine only ever adds time."""
        probe = "How many tokens does a long prompt take to read, and why? 12 + 34. " * 480
        best = math.inf
        try:
            for _ in range(3):
                start = time.perf_counter()
                predictor.score(probe[: self._max_chars])
                best = min(best, time.perf_counter() - start)
        except Exception as error:
            logger.warning("the predictor failed on a probe prompt: %s", error)
            return True
        return best <= INLINE_BELOW_S

    async def score(self, prompt: str) -> tuple[Score | None, ScoreStatus]:
        predictor = self._predictor
        if predictor is None:
            return None, ScoreStatus.ABSENT
        prompt = prompt[: self._max_chars]
        status = ScoreStatus.OK
        score: Score | None = None
        took_s: float | None = None
        try:
            if self._executor is None:
                score, took_s = _timed(predictor, prompt)
                self._num_slow = self._num_slow + 1 if took_s > self._deadline_s else 0
                if self._num_slow >= SLOW_IN_A_ROW:
                    logger.warning("the predictor has become slow; it now runs in a thread")
                    self._leave_the_loop()
            else:
                score, took_s = await self._in_thread(self._executor, predictor, prompt)
                if score is None:
                    status = ScoreStatus.LATE
        except Exception:
            status = ScoreStatus.FAILED
            if not self._complained:
                self._complained = True
                logger.exception("the predictor failed; the fallback tier answers (said once)")
        if took_s is not None:
            self._metrics.predictor_seconds.observe(took_s)
        self._metrics.predictor_outcomes[(status.value,)].inc()
        return score, status

    async def _in_thread(
        self, executor: ThreadPoolExecutor, predictor: Predictor, prompt: str
    ) -> tuple[Score | None, float | None]:
        if self._running is not None and not self._running.done():
            # One late score at a time: a queue behind it would make all of them late.
            return None, None
        running = self._running = executor.submit(_timed, predictor, prompt)
        try:
            async with asyncio.timeout(self._deadline_s):
                return await asyncio.shield(asyncio.wrap_future(running))
        except TimeoutError:
            if running.done():
                score, took_s = running.result()
                if took_s <= self._deadline_s:
                    return score, took_s
            return None, None

    def close(self) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)


def _timed(predictor: Predictor, prompt: str) -> tuple[Score, float]:
    start = time.perf_counter()
    score = predictor.score(prompt)
    return score, time.perf_counter() - start


@dataclass(frozen=True, slots=True)
class Scored:
    """What the predictor said about one prompt, and whether it said it in time."""

    score: Score | None
    status: ScoreStatus


@dataclass(slots=True)
class _Expected:
    """Predicted qualities of one request, cheapest tier first, and which of them was taken."""

    chosen: int
    qualities: tuple[float | None, ...]


@dataclass(slots=True)
class Counted:
    """One request as the policy's memory and the controllers know it; it counts once."""

    tier: str
    set_points: PolicySetPoints  # those it was decided with
    reserve_cost_usd: float
    place: int  # among the recent requests
    budgeted: Budgeted | None  # None without a budget
    expected: _Expected | None  # None where a quality is unknown


@dataclass
class TierLatency:
    """Smoothed latencies of a tier as this router saw them, seconds."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    updated: float = 0.0

    def saw(self, ttft_s: float | None, tpot_s: float | None, now: float) -> None:
        self.updated = now
        if ttft_s is not None:
            self.ttft_s = _smoothed(self.ttft_s, ttft_s)
        if tpot_s is not None:
            self.tpot_s = _smoothed(self.tpot_s, tpot_s)


def _smoothed(old: float | None, new: float) -> float:
    return new if old is None else old + LATENCY_SMOOTHING * (new - old)


class Routing:
    """The tier choice of one router.

    `set_points` is replaced by online controllers or by /admin/set-points.
    """

    def __init__(
        self,
        config: RouterConfig,
        predictor: Predictor | None,
        picker: Picker,
        metrics: Metrics,
        clock: Callable[[], float],
    ) -> None:
        self._config = config
        self._picker = picker
        self._metrics = metrics
        self._clock = clock
        self.scorer = Scorer(predictor, config.predictor, metrics)
        self.state = PolicyState()
        self.latency = {tier.name: TierLatency() for tier in config.tiers}
        threshold = config.threshold
        if threshold is None:
            threshold = DEFAULT_THRESHOLDS[config.predictor.type]
        base = PolicySetPoints(
            gain_threshold=threshold,
            fallback_tier=config.fallback_tier,
            slo=LatencySlo(
                ttft_s=_seconds(config.slo.ttft_ms), tpot_s=_seconds(config.slo.tpot_ms)
            ),
            on_exhausted=_ON_EXHAUSTED[config.budget.on_exhausted],
        )
        # Of equally priced tiers the last declared, as the policy ranks them.
        self.dearest = max(
            reversed(config.tiers),
            key=lambda tier: tier.usd_per_1m_input_tokens + tier.usd_per_1m_output_tokens,
        ).name
        self.cheapest = min(
            config.tiers,
            key=lambda tier: tier.usd_per_1m_input_tokens + tier.usd_per_1m_output_tokens,
        ).name
        cap = config.tier(self.dearest).max_share
        # Our own workers are paid by the hour whether they answer or not, and the operator holds
        # them within the budget; an answer costs money only where somebody else gives it.
        workers = frozenset(tier.name for tier in config.tiers if tier.kind == "pool")
        budget = config.budget.usd_per_hour if len(workers) < len(config.tiers) else None
        self.control = OnlineControl(
            base,
            pacer=(BudgetPacer(budget, clock(), unbilled=workers) if budget is not None else None),
            share=ShareTracker(cap) if cap is not None and len(config.tiers) > 1 else None,
            share_ceiling=True,
            shift=TrafficShift() if budget is not None or cap is not None else None,
        )
        self._floor: PredictedFloor | None = None
        self._expected: deque[_Expected] = deque(maxlen=EXPECTED_QUALITY_WINDOW)
        self._set_floor(predictor, threshold)
        self._show_set_points()
        self._by_model = {tier.served_model: tier.name for tier in config.tiers}
        self._by_model.update({tier.name: tier.name for tier in config.tiers})
        self._prices = {tier.name: tier for tier in config.tiers}

    @property
    def set_points(self) -> PolicySetPoints:
        return self.control.set_points(self._clock())

    def _set_floor(self, predictor: Predictor | None, threshold: float) -> None:
        """A quality floor without a threshold is held by the predictor's expectation.

        Only a learned predictor's qualities are measured ones; a fixed or length predictor keeps
        its threshold.
        """
        floor = self._config.objective.quality_floor
        if floor is None or self._config.threshold is not None or len(self._config.tiers) < 2:
            return
        if not isinstance(predictor, ArtifactPredictor):
            return
        training = predictor.training_gains(self.dearest, self.cheapest)
        self._floor = PredictedFloor(floor, threshold, training)
        self.control.base = replace(self.control.base, gain_threshold=self._floor.threshold)

    def predictor_changed(self, predictor: Predictor) -> None:
        """A new artifact is in use: its gains are on another scale."""
        if self._floor is not None:
            self._set_floor(predictor, self._floor.threshold)
            self._show_set_points()

    def move_set_points(self, **changes: float) -> None:
        """Replace some base set-points; names are fields of PolicySetPoints.

        Whoever sets the gain threshold holds the quality floor from then on.
        """
        if "gain_threshold" in changes:
            self._floor = None
        self.control.base = replace(self.control.base, **changes)  # type: ignore[arg-type]
        self._show_set_points()

    def _show_set_points(self) -> None:
        points = self.set_points
        self._metrics.threshold.set(points.gain_threshold)
        self._metrics.lambda_per_usd.set(points.lambda_per_usd)

    def count(
        self, decision: Decision, request: InferenceRequest, set_points: PolicySetPoints
    ) -> Counted | None:
        """Count a request where it was decided to go, and set its money aside.

        Counted before it is served, so that requests in flight already weigh in the next
        decisions. None, and nothing is counted, when concurrent requests took the money since.
        """
        assert decision.tier is not None
        budgeted = self.control.decided(self._clock(), decision, request.num_prompt_tokens)
        if budgeted is None and self.control.pacer is not None:
            return None
        expected = _expected(decision)
        if expected is not None:
            self._expected.append(expected)
            self._hold_floor(decision.gain, expected.qualities[-1])
        return Counted(
            decision.tier,
            set_points,
            decision.reserve_cost_usd,
            self.state.record(decision.tier, request.num_prompt_tokens),
            budgeted,
            expected,
        )

    def _hold_floor(self, gain: float | None, dearest: float | None) -> None:
        floor = self._floor
        if floor is None or gain is None or dearest is None:
            return
        if floor.observe(gain, dearest):
            self.control.base = replace(self.control.base, gain_threshold=floor.threshold)

    def move(self, counted: Counted, decision: Decision) -> bool:
        """Another tier takes the request over: it counts there, and no longer where it was.

        False, and nothing changes, when the budget cannot pay the other tier.
        """
        assert decision.tier is not None
        budgeted = self.control.moved(self._clock(), counted.tier, decision, counted.budgeted)
        if budgeted is None and self.control.pacer is not None:
            return False
        expected = _expected(decision)
        if counted.expected is not None and expected is not None:
            counted.expected.chosen = expected.chosen
        self.state.move(counted.place, decision.tier)
        counted.tier = decision.tier
        counted.reserve_cost_usd = decision.reserve_cost_usd
        counted.budgeted = budgeted
        return True

    def settle(self, counted: Counted, cost_usd: float) -> None:
        """Book what the answer really cost; zero for a request that never ran."""
        if counted.budgeted is not None:
            self.control.settle(self._clock(), counted.budgeted, cost_usd)

    @property
    def expected_quality_ratio(self) -> float | None:
        """Predicted quality of recent choices as a share of all-dearest; None without scores."""
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

    def forced_tier(self, model: str) -> str | None:
        """Tier named by `model`; None where the router decides. Raises ApiError (404)."""
        if model == self._config.name:
            return None
        tier = self._by_model.get(model)
        if tier is None:
            names = ", ".join([self._config.name, *self._by_model])
            raise ApiError(
                404,
                f"the model {model[:100]!r} does not exist; use one of {names}",
                param="model",
                code="model_not_found",
            )
        return tier

    def cost_usd(self, tier: str, prompt_tokens: float, output_tokens: float) -> float:
        prices = self._prices[tier]
        return (
            prompt_tokens * prices.usd_per_1m_input_tokens
            + output_tokens * prices.usd_per_1m_output_tokens
        ) / 1e6

    async def score(self, request: InferenceRequest) -> Scored:
        """The predictor's view of a request; absent where the request names its tier."""
        if request.prompt is None or self.forced_tier(request.model) is not None:
            return Scored(None, ScoreStatus.ABSENT)
        return Scored(*await self.scorer.score(request.prompt))

    def choose(
        self,
        request: InferenceRequest,
        overrides: Overrides,
        tenant: TenantState,
        scored: Scored,
        set_points: PolicySetPoints,
        expected_uses: float = 1.0,
    ) -> Decision:
        """Decide, without counting: the caller counts what it dispatches.

        expected_uses: how often the answer will be served, this time included. Raises ApiError
        (404) for an unknown model.
        """
        left = tenant.usd.level if tenant.usd is not None else None
        return self._decide(
            request, overrides, tenant, scored, set_points, left, frozenset(), expected_uses
        )

    def choose_again(
        self,
        counted: Counted,
        request: InferenceRequest,
        overrides: Overrides,
        tenant: TenantState,
        scored: Scored,
        failed: frozenset[str],
        expected_uses: float = 1.0,
    ) -> Decision:
        """The same choice without the tiers that failed this request.

        It is made with the set-points of the first time, since this very request has moved them
        since, and may spend what is already set aside for it.
        """
        set_points = counted.set_points
        if self.control.pacer is not None and counted.budgeted is not None:
            left = self.control.pacer.remaining_usd(self._clock())
            set_points = replace(
                set_points, budget_remaining_usd=left + counted.budgeted.reserved_usd
            )
        remaining_usd = tenant.usd.level if tenant.usd is not None else None
        if remaining_usd is not None:
            remaining_usd += counted.reserve_cost_usd
        return self._decide(
            request, overrides, tenant, scored, set_points, remaining_usd, failed, expected_uses
        )

    def _decide(
        self,
        request: InferenceRequest,
        overrides: Overrides,
        tenant: TenantState,
        scored: Scored,
        set_points: PolicySetPoints,
        remaining_usd: float | None,
        unavailable: frozenset[str],
        expected_uses: float,
    ) -> Decision:
        forced = self.forced_tier(request.model)
        score = scored.score
        allowed = tenant.config.allowed_tiers
        options = [self._option(tier, unavailable) for tier in self._config.tiers]
        if any(option.ttft_s is None for option in options if option.available):
            # Latencies are compared: one known beside one unknown would count as the slower.
            options = [replace(option, ttft_s=None, tpot_s=None) for option in options]
        if forced is not None or not any(option.available for option in options):
            # Held until a worker is there rather than refused: the exchange waits.
            options = [replace(option, available=True) for option in options]
        route = RouteRequest(
            prompt_tokens=request.num_prompt_tokens,
            score=_with_gains(score),
            score_status=scored.status,
            max_tokens=request.max_tokens,
            num_choices=request.num_choices,
            num_expected_uses=expected_uses,
            overrides=replace(overrides, tier=forced),
            tenant=TenantCeilings(
                allowed_tiers=frozenset(allowed) if allowed is not None else None,
                remaining_usd=remaining_usd,
            ),
        )
        decision = decide(route, options, set_points, self.state)
        if score is not None and decision.difficulty is not None:
            cheapest = score.quality.get(decision.verdicts[0].tier)
            if cheapest is not None:
                decision = replace(decision, difficulty=1.0 - cheapest)
        return decision

    def _option(self, tier: TierConfig, unavailable: frozenset[str]) -> TierOption:
        latency = self.latency[tier.name]
        # A tier that was slow a while ago is worth another try: without traffic the smoothed
        # value would never recover.
        fresh = self._clock() - latency.updated < LATENCY_BELIEVED_S
        available = tier.name not in unavailable and (
            tier.kind == "external" or self._picker.num_usable(tier.name) > 0
        )
        return TierOption(
            name=tier.name,
            available=available,
            usd_per_1m_input_tokens=tier.usd_per_1m_input_tokens,
            usd_per_1m_output_tokens=tier.usd_per_1m_output_tokens,
            ttft_s=latency.ttft_s if fresh else None,
            tpot_s=latency.tpot_s if fresh else None,
            max_share=tier.max_share,
            default_output_tokens=float(DEFAULT_OUTPUT_TOKENS),
        )


def _expected(decision: Decision) -> _Expected | None:
    qualities = tuple(verdict.quality for verdict in decision.verdicts)
    chosen = next((i for i, v in enumerate(decision.verdicts) if v.tier == decision.tier), None)
    if decision.gain is None or chosen is None:
        return None
    if qualities[chosen] is None or qualities[-1] is None:
        return None
    return _Expected(chosen, qualities)


def _with_gains(score: Score | None) -> Score | None:
    """The score with qualities whose differences are the predictor's gains.

    A learned predictor's `utility` is trained on differences between tiers and ranks prompts
    better than subtracting two calibrated qualities does. The dearest tier's quality stays where
    it is, unless the scale 0..1 forces a shift.
    """
    utility: Mapping[str, float] | None = getattr(score, "utility", None)
    if score is None or not utility or set(utility) != set(score.quality):
        return score
    if not all(map(math.isfinite, utility.values())):
        return score
    best = max(utility, key=lambda tier: utility[tier])
    offset = score.quality[best] - utility[best]
    lowest = min(utility.values()) + offset
    offset += max(0.0, -lowest)
    return PlainScore(
        {tier: min(1.0, max(0.0, value + offset)) for tier, value in utility.items()},
        score.output_tokens,
        score.out_of_distribution,
    )


_ON_EXHAUSTED: dict[str, Literal["downgrade", "queue", "reject"]] = {
    "Downgrade": "downgrade",
    "Queue": "queue",
    "Reject": "reject",
}


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000.0
