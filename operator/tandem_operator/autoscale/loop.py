"""One control loop per Router: observed load in, replicas and threshold with reasons out.

Scaling up happens at once; scaling down only to the highest number wanted within a window, so
that a dip does not throw away workers that the next minute needs. Missing metrics hold
everything as it is; a tier whose workers have no performance profile yet holds its own pools only,
because it may be the threshold that keeps work from them. A worker that has been idle long enough
may go, if its pool may sleep.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from tandem_operator.autoscale.demand import Demand, drain_rates
from tandem_operator.autoscale.placement import Placement, Unplaced
from tandem_operator.autoscale.profile import Load, PerformanceProfile, Slo
from tandem_operator.autoscale.seasons import HourlyRates
from tandem_operator.autoscale.sizing import (
    Ceilings,
    Operating,
    PoolSpec,
    Role,
    Sizes,
    at_threshold,
    size,
    up_to,
)

FORECAST = "Forecast"
QUERY = "Prometheus"
# A signal this close to its target leaves the count as it is.
SIGNAL_BAND = 0.1

KEPT_DECISIONS = 10
# Curves are estimates on recent traffic; following each would move every router all the time. So a
# threshold in force stays while a higher one would give up no more than this quality (nothing to
# win), or another was wished for less than a window and it misses the floor by noise at most.
QUALITY_BAND = 0.02
FLOOR_NOISE = 0.005
THRESHOLD_WINDOW_S = 60.0
THRESHOLD_STEP = 0.01
# A cheaper threshold inside the quality band is taken where it saves this share of the bill.
WORTH_SAVING = 0.05
# Needs this far over a ceiling are no noise: the threshold moves at once.
FAR_OVER = 1.1
# Waiting requests per worker beyond which the load is no noise.
QUEUE_PER_WORKER = 4.0
DEFAULT_SIGNALS: Mapping[str, float] = {FORECAST: 1.0}


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast a pool may change in one direction."""

    window_s: float  # the wish must have held this long; the mildest one counts
    max_step: int  # workers at once
    period_s: float = 0.0  # least time between two steps


@dataclass(frozen=True, slots=True)
class LoopSettings:
    """What the Router and its AutoscalingPolicy ask for."""

    pools: tuple[PoolSpec, ...]
    slo: Slo
    ceilings: Ceilings = field(default_factory=Ceilings)
    quality_floor: float | None = None  # None where nothing measures quality
    base_threshold: float = 0.0  # without a floor: what holds while no ceiling is short
    startup_s: float = 60.0  # forecast horizon: a worker started now serves then
    up: Mapping[Role, Speed] = field(default_factory=dict)  # default UP
    down: Mapping[Role, Speed] = field(default_factory=dict)  # default DOWN
    idle_after_s: float | None = None  # None: pools never go below one worker
    missing_metrics: str = "Hold"  # Hold | ScaleUp
    # Per role: measured signals and where to hold them; the one that asks for most wins.
    signals: Mapping[Role, Mapping[str, float]] = field(default_factory=dict)

    def within(self, workers: Mapping[tuple[str, Role], int]) -> bool:
        """Whether these workers fit under the ceilings."""
        return self.ceilings.allow(self.pools, workers)


UP = Speed(window_s=0.0, max_step=8)
DOWN = Speed(window_s=300.0, max_step=2)


@dataclass(frozen=True, slots=True)
class Observation:
    """What was measured since the last step; None where a metric is missing."""

    load: Load | None
    workers: Mapping[tuple[str, Role], int]
    curve: Sequence[Operating]
    profiles: Mapping[str, PerformanceProfile]
    threshold: float  # in force
    threshold_limit: float | None = None  # the routers' quality floor lets no higher one through
    floor: int = 0  # workers of every pool that a schedule asks for now
    floor_name: str = ""  # of that schedule
    signals: Mapping[tuple[str, Role], Mapping[str, float]] = field(default_factory=dict)
    # Of each pool's query: its number for the whole pool, or why there is none.
    queried: Mapping[tuple[str, Role], float | str] = field(default_factory=dict)
    # Requests by the tier they wanted since the last reading; None where only the sum is known.
    arrived: Mapping[str, float] | None = None
    # Requests that wait at routers and workers now, by tier.
    backlog: Mapping[str, float] = field(default_factory=dict)
    # Workers that no node takes, and why.
    unplaced: Mapping[tuple[str, Role], Unplaced] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ScalingDecision:
    """One change, or a refusal to change, with its reason in a sentence."""

    at_s: float
    pool: str  # "<tier>/<role>", "threshold", or "all"
    before: float
    after: float
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What to write: replicas to WorkerPools, the threshold to routers."""

    workers: Mapping[tuple[str, Role], int]
    threshold: float
    decisions: tuple[ScalingDecision, ...]
    slo_met: bool | None  # None while something is not measured
    within_budget: bool


class Autoscaler:
    """The loop's memory between steps, under settings that may change.

    Args:
        settings: What is asked for.
        hourly: What was learnt of the week before.
    """

    def __init__(self, settings: LoopSettings, hourly: HourlyRates | None = None) -> None:
        self.settings = settings
        self.recent: deque[ScalingDecision] = deque(maxlen=KEPT_DECISIONS)
        self.demand = Demand(settings.startup_s, settings.idle_after_s, hourly)
        self._wanted: dict[tuple[str, Role], deque[tuple[float, int]]] = {
            pool.key: deque() for pool in settings.pools
        }
        self._thresholds: deque[tuple[float, float]] = deque()
        self._since: dict[tuple[str, Role], float] = {}
        self._stepped: dict[tuple[str, Role], float] = {}
        self._placement = Placement()

    def reconfigure(self, settings: LoopSettings) -> None:
        """Take other settings; what was learnt of traffic and pools goes on."""
        self.settings = settings
        self.demand.idle_after_s = settings.idle_after_s
        self._wanted = {pool.key: self._wanted.get(pool.key, deque()) for pool in settings.pools}
        self._thresholds.clear()

    def step(self, now: float, seen: Observation) -> Plan:
        """Decide once; call every few seconds with what was observed."""
        settings = self.settings
        current = {pool.key: seen.workers.get(pool.key, 0) for pool in settings.pools}
        self._note_traffic(now, seen, current)
        self._placement.observe(now, settings.pools, seen.unplaced, current)
        problem = self._problem(seen)
        if problem is not None:
            return self._hold(now, seen, current, problem)
        load = seen.load
        assert load is not None
        if all(self.demand.asleep(now, tier) for tier in self._tiers()):
            return self._put_to_sleep(now, seen, current)
        rate = self.demand.rate(now, load.requests_per_s)
        future = Load(rate, load.prompt_tokens, load.prompt_tokens_squared, load.output_tokens)
        pools = [self._placement.bounded(now, pool) for pool in settings.pools]
        measured = tuple(pool for pool in pools if pool.tier in seen.profiles)
        unmeasured = [pool for pool in pools if pool.tier not in seen.profiles]
        ceilings = settings.ceilings.beside(unmeasured, current)
        stuck = self._placement.stuck(now)
        backlog = drain_rates(seen.backlog)

        def sized(curve: Sequence[Operating], floor: float | None) -> Sizes:
            return size(
                measured,
                future,
                curve,
                seen.profiles,
                settings.slo,
                floor,
                ceilings,
                settings.base_threshold if floor is None else 0.0,
                backlog,
                stuck,
                current,
            )

        sizes = sized(up_to(seen.curve, seen.threshold_limit), settings.quality_floor)
        here = at_threshold(seen.curve, seen.threshold)
        if here is not None:
            same = sized((here,), 0.0)
            if self._keeps_threshold(now, here, sizes, same, ceilings, stuck):
                sizes = same
        kept = {pool.key: current[pool.key] for pool in unmeasured}
        counts = {**kept, **sizes.workers}
        decisions: list[ScalingDecision] = []
        wanted = {
            pool.key: self._wish(now, pool, counts[pool.key], current[pool.key], seen)
            for pool in pools
        }
        steps = {
            pool.key: self._damped(
                now,
                pool,
                current[pool.key],
                wanted[pool.key],
                queues=seen.backlog.get(pool.tier, 0.0) > QUEUE_PER_WORKER * current[pool.key],
            )
            for pool in pools
        }
        workers = {key: count for key, (count, _) in steps.items()}
        taken_back = self._take_back(workers, wanted, current)
        for pool in pools:
            if workers[pool.key] != current[pool.key]:
                why = "the budget" if pool.key in taken_back else steps[pool.key][1]
                if _scheduled(seen, current[pool.key], workers[pool.key], counts[pool.key]):
                    why = _schedule(seen)
                latency = predicted(sizes.ttft_s, sizes.tpot_s, pool.tier)
                waits = seen.backlog.get(pool.tier, 0.0)
                queue = f", {waits:.0f} waiting" if waits >= 1.0 else ""
                decisions.append(
                    self._record(
                        now,
                        f"{pool.tier}/{pool.role}",
                        current[pool.key],
                        workers[pool.key],
                        f"{why}: {rate:.3g} requests/s forecast{queue}, {latency}",
                    )
                )
        threshold = sizes.threshold
        if abs(threshold - seen.threshold) < THRESHOLD_STEP:
            threshold = seen.threshold
        if threshold != seen.threshold:
            usual = "cheapest threshold that meets the quality floor"
            if settings.quality_floor is None:
                usual = f"the budget allows {settings.base_threshold:.3g} again"
            reason = "; ".join(sizes.notes) or usual
            decisions.append(self._record(now, "threshold", seen.threshold, threshold, reason))
        return Plan(
            workers,
            threshold,
            tuple(decisions),
            sizes.slo_met if not unmeasured else None,
            within_budget=settings.within(workers),
        )

    def _tiers(self) -> set[str]:
        return {pool.tier for pool in self.settings.pools}

    def _note_traffic(
        self, now: float, seen: Observation, current: Mapping[tuple[str, Role], int]
    ) -> None:
        if seen.load is None or not seen.load.usable:
            return
        asked = None
        if seen.arrived is not None:
            waits = {tier for tier, count in seen.backlog.items() if count > 0.0}
            asked = {tier for tier, count in seen.arrived.items() if count > 0.0} | waits
        awake = {tier for (tier, _), count in current.items() if count}
        self.demand.observe(now, seen.load, asked, awake, self._tiers())

    def _problem(self, seen: Observation) -> str | None:
        if seen.load is None or not seen.load.usable:
            return "the load is not measured"
        if not seen.curve:
            return "no routing curve is known"
        return None

    def _hold(
        self,
        now: float,
        seen: Observation,
        current: Mapping[tuple[str, Role], int],
        problem: str,
    ) -> Plan:
        measured = seen.load is not None and seen.load.usable
        if measured and all(self.demand.asleep(now, tier) for tier in self._tiers()):
            # What is missing is the routing curve, and nobody asks: that says enough.
            return self._put_to_sleep(now, seen, current)
        traffic = seen.load is not None and measured and seen.load.requests_per_s > 0.0
        asked = traffic or any(count > 0.0 for count in seen.backlog.values())
        wanted = {
            pool.key: self._without_metrics(
                pool,
                current[pool.key],
                asked and not self.demand.asleep(now, pool.tier),
                seen.floor,
            )
            for pool in self.settings.pools
        }
        workers = self._raised(current, wanted)
        if workers != wanted:
            problem += ", the budget allows no more workers"
        for pool in self.settings.pools:
            if (after := workers[pool.key]) != current[pool.key]:
                why = "a request waits" if asked else "below the minimum or not measured"
                if _scheduled(seen, current[pool.key], after, 1 if asked else 0):
                    why = _schedule(seen)
                name = f"{pool.tier}/{pool.role}"
                self._record(now, name, current[pool.key], after, f"{why}; {problem}")
        decision = ScalingDecision(now, "all", 0, 0, f"{problem}: holding")
        if not self.recent or self.recent[-1].reason != decision.reason:
            self.recent.append(decision)
        return Plan(workers, seen.threshold, (decision,), None, self.settings.within(workers))

    def _without_metrics(self, pool: PoolSpec, current: int, asked: bool, floor: int) -> int:
        """What a pool should have while nothing is known of it."""
        more = 1 if self.settings.missing_metrics == "ScaleUp" else 0
        # Without a worker there will never be a measurement.
        lowest = max(pool.minimum, floor, 1 if asked else 0)
        return max(current, min(pool.maximum, max(lowest, current + more)))

    def _raised(
        self, current: Mapping[tuple[str, Role], int], wanted: Mapping[tuple[str, Role], int]
    ) -> dict[tuple[str, Role], int]:
        """What the ceilings allow of it: the first tiers first, all roles of one or none."""
        workers = dict(current)
        for tier in dict.fromkeys(pool.tier for pool in self.settings.pools):
            own = {key: count for key, count in wanted.items() if key[0] == tier}
            if self.settings.within({**workers, **own}):
                workers.update(own)
        return workers

    def _put_to_sleep(
        self, now: float, seen: Observation, current: Mapping[tuple[str, Role], int]
    ) -> Plan:
        workers = dict(current)
        decisions: list[ScalingDecision] = []
        for pool in self.settings.pools:
            workers[pool.key] = min(pool.maximum, max(pool.minimum, seen.floor))
            if workers[pool.key] != current[pool.key]:
                before, after = current[pool.key], workers[pool.key]
                name = f"{pool.tier}/{pool.role}"
                why = f"nobody asks, {_schedule(seen)}" if after else "nobody asks: sleeping"
                decisions.append(self._record(now, name, before, after, why))
        within = self.settings.within(workers)
        return Plan(workers, seen.threshold, tuple(decisions), None, within)

    def _keeps_threshold(
        self,
        now: float,
        here: Operating,
        best: Sizes,
        same: Sizes,
        ceilings: Ceilings,
        stuck: Collection[tuple[str, Role]],
    ) -> bool:
        """Whether the present threshold stays: another is hardly better, or wished for too briefly.

        At once it moves where it clearly misses the floor, where what it needs is far over a
        ceiling (a budget that was cut), or where the workers it needs cannot be placed. All else
        takes a window.
        """
        self._thresholds.append((now, best.threshold))
        while self._thresholds[0][0] < now - THRESHOLD_WINDOW_S:
            self._thresholds.popleft()
        floor = self.settings.quality_floor
        if best.threshold > here.threshold:
            if _far_over(same, ceilings) or same.short.intersection(stuck):
                return False
            brief = min(wish for _, wish in self._thresholds) <= here.threshold + THRESHOLD_STEP
            near = floor is not None and here.quality_ratio - best.quality_ratio <= QUALITY_BAND
            saves = best.usd_per_hour < (1.0 - WORTH_SAVING) * same.usd_per_hour
            return brief or (not same.notes and near and not saves)
        if floor is not None and here.quality_ratio >= floor:
            return True
        brief = max(wish for _, wish in self._thresholds) >= here.threshold - THRESHOLD_STEP
        return brief and (floor is None or here.quality_ratio >= floor - FLOOR_NOISE)

    def _wish(
        self, now: float, pool: PoolSpec, forecast: int, current: int, seen: Observation
    ) -> int:
        """Within the pool's bounds; a tier that is awake keeps a worker in each pool."""
        lowest = min(pool.maximum, max(pool.minimum, seen.floor))
        if self.demand.asleep(now, pool.tier):
            return lowest
        targets = self.settings.signals.get(pool.role) or DEFAULT_SIGNALS
        wishes = [1, lowest]
        if FORECAST in targets:
            wishes.append(forecast)
        measured = seen.signals.get(pool.key, {})
        for name, target in targets.items():
            if name == FORECAST:
                continue
            value: float | str | None = measured.get(name)
            if name == QUERY:
                value = seen.queried.get(pool.key)
                self._note_unread(now, pool, current, value)
            if not isinstance(value, float) or not math.isfinite(value) or target <= 0.0:
                wishes.append(current)  # what is not measured asks for nothing else
                continue
            # Values are means per worker, so the count scales with value over target; of a query
            # the number is the whole pool's.
            count = value / target if name == QUERY else current * value / target
            near = abs(count - current) <= SIGNAL_BAND * current
            wishes.append(current if near else math.ceil(count))
        return min(pool.maximum, max(wishes))

    def _note_unread(
        self, now: float, pool: PoolSpec, current: int, said: float | str | None
    ) -> None:
        if isinstance(said, str):
            reason = f"the query of the policy gives no number, holding: {said}"
            self._record(now, f"{pool.tier}/{pool.role}", current, current, reason)

    def _damped(
        self, now: float, pool: PoolSpec, current: int, wanted: int, *, queues: bool = False
    ) -> tuple[int, str]:
        """Bounded steps towards the mildest wish of the direction's window.

        queues: requests wait already, so that no window is needed to believe the load.
        """
        up = self.settings.up.get(pool.role, UP)
        down = self.settings.down.get(pool.role, DOWN)
        history = self._wanted[pool.key]
        history.append((now, wanted))
        while history[0][0] < now - max(up.window_s, down.window_s):
            history.popleft()
        if current < pool.minimum:
            return pool.minimum, "below the pool's minimum"
        if current > pool.maximum:
            if (why := self._placement.why(now, pool.key)) is not None:
                return pool.maximum, f"withdrawn, no node takes the workers ({why})"
            return pool.maximum, "above the pool's maximum"
        stepped_at = self._stepped.get(pool.key, -math.inf)
        least = min(count for at, count in history if at >= now - up.window_s)
        if (current == 0 or queues) and wanted > 0:
            least = wanted  # a window would only make requests wait
        if least > current and (now - stepped_at >= up.period_s or current == 0):
            self._stepped[pool.key] = now
            return min(least, current + up.max_step), "more load"
        if wanted == 0 and current > 0 and self.demand.asleep(now, pool.tier):
            return 0, "nobody asks for the tier: sleeping"
        most = max(count for at, count in history if at >= now - down.window_s)
        covered = now - self._since.setdefault(pool.key, now) >= down.window_s
        if most < current and covered and now - stepped_at >= down.period_s:
            self._stepped[pool.key] = now
            return max(most, current - down.max_step), "less load for a while"
        return current, ""

    def _take_back(
        self,
        workers: dict[tuple[str, Role], int],
        wanted: Mapping[tuple[str, Role], int],
        current: Mapping[tuple[str, Role], int],
    ) -> set[tuple[str, Role]]:
        """Bring damped sizes under the ceilings; a budget waits for no window.

        First workers that are kept only because a window has not passed, then workers just added.
        """
        touched: set[tuple[str, Role]] = set()
        for floor in (wanted, {key: min(wanted[key], current[key]) for key in wanted}):
            while not self.settings.within(workers):
                spare = [p for p in self.settings.pools if workers[p.key] > floor[p.key]]
                if not spare:
                    break
                pool = max(spare, key=lambda p: (workers[p.key] - floor[p.key], p.usd_per_hour))
                workers[pool.key] -= 1
                touched.add(pool.key)
        return touched

    def _record(
        self, now: float, pool: str, before: float, after: float, reason: str
    ) -> ScalingDecision:
        decision = ScalingDecision(now, pool, before, after, reason)
        last = next((known for known in reversed(self.recent) if known.pool == pool), None)
        # Said once where nobody carries it out.
        if last is None or (last.before, last.after) != (before, after):
            self.recent.append(decision)
        return decision


def _far_over(sizes: Sizes, ceilings: Ceilings) -> bool:
    """Whether a need is over a ceiling by more than noise."""
    gpus, usd = ceilings.gpus, ceilings.usd_per_hour
    return (gpus is not None and sizes.wanted_gpus > FAR_OVER * gpus) or (
        usd is not None and sizes.wanted_usd_per_hour > FAR_OVER * usd
    )


def _scheduled(seen: Observation, before: int, after: int, without: int) -> bool:
    """Whether it is the schedule in force that raises a pool, or keeps it from going lower."""
    return bool(seen.floor_name) and without < seen.floor and before != after <= seen.floor


def _schedule(seen: Observation) -> str:
    if not seen.floor_name:
        return "the minimum is kept"
    return f"schedule {seen.floor_name} asks for {seen.floor}"


def predicted(ttft: Mapping[str, float], tpot: Mapping[str, float], tier: str) -> str:
    """The tier's predicted latencies in words."""
    parts = []
    for name, table in (("TTFT", ttft), ("TPOT", tpot)):
        if tier in table:
            value = table[tier]
            parts.append(f"{name} {'saturated' if math.isinf(value) else f'{1000 * value:.3g} ms'}")
    return ", ".join(parts) + " predicted"
