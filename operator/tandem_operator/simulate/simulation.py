"""One run: arrivals in, outcomes, usage and every scaling decision out."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tandem_operator.autoscale.loop import Plan
from tandem_operator.simulate.arrivals import Arrival
from tandem_operator.simulate.clock import VirtualClock
from tandem_operator.simulate.cluster import PoolPlan, Role, Running, SimulatedCluster
from tandem_operator.simulate.front import Front, TierPlan
from tandem_operator.simulate.outcome import Outcomes, Targets, summary
from tandem_router.config import PickingConfig

# What happens to requests that no worker takes yet: the router holds them this long.
HOLD_S = 30.0
RETRY_S = 0.25

Scale = Callable[[float, Mapping[tuple[str, Role], int], dict[str, Any], list[Any]], Plan | None]
"""(now, workers, router state, (tier, load) of each worker) -> what the control loop plans."""


@dataclass(frozen=True, slots=True)
class SimulationPlan:
    """What is simulated.

    Attributes:
        scale: The control loop's step, or None: replicas stay.
        interval_s: Between two steps of the loop.
        training: What the predictor knows of typical prompts (`Front`).
        margin: Of its predicted limit (`Front`).
    """

    tiers: tuple[TierPlan, ...]
    pools: Mapping[tuple[str, Role], PoolPlan]
    fallback: str | None = None
    threshold: float = 0.1
    quality_floor: float | None = None
    targets: Targets = field(default_factory=Targets)
    picking: PickingConfig = field(default_factory=PickingConfig)
    startup_s: float = 60.0
    scale: Scale | None = None
    interval_s: float = 10.0
    seed: int = 0
    training: tuple[tuple[float, float], ...] = ()
    margin: float = 0.0


@dataclass(frozen=True, slots=True)
class TimelinePoint:
    """The cluster at one moment."""

    at_s: float
    workers: Mapping[str, int]
    running: int
    waiting: int
    utilisation: float
    threshold: float


class Simulation:
    """Replays arrivals; call :meth:`run` once."""

    def __init__(self, plan: SimulationPlan, arrivals: Iterator[Arrival]) -> None:
        self.plan = plan
        self.clock = VirtualClock()
        self._arrivals = arrivals
        self.cluster = SimulatedCluster(
            plan.pools,
            self.clock,
            seed=plan.seed,
            startup_s=plan.startup_s,
            picking=plan.picking,
        )
        self._external = {t.name: t for t in plan.tiers if t.external_ttft_s is not None}
        self.front = Front(
            plan.tiers,
            fallback=plan.fallback,
            threshold=plan.threshold,
            quality_floor=plan.quality_floor,
            ttft_slo_s=plan.targets.ttft_s,
            tpot_slo_s=plan.targets.tpot_s,
            available=self._has_worker,
            training=plan.training,
            margin=plan.margin,
        )
        self.outcomes = Outcomes(tuple(tier.name for tier in plan.tiers))
        self.timeline: list[TimelinePoint] = []
        self.decisions: list[dict[str, Any]] = []
        self._held: deque[tuple[Running, float]] = deque()
        self._retry_due = False
        self._busy_before = 0.0
        self._pods_before = 0.0
        self._open = 0
        self._last_s = 0.0
        self._ended = False

    # -- requests --------------------------------------------------------------------------------

    def _has_worker(self, tier: str) -> bool:
        return tier in self._external or self.cluster.picker.num_listed(tier) > 0

    def _next(self) -> None:
        arrival = next(self._arrivals, None)
        if arrival is None:
            self._ended = True
            return
        self.clock.at(arrival.at_s, self._arrive, arrival)

    def _arrive(self, arrival: Arrival) -> None:
        self._next()
        self._last_s = self.clock.now
        decision = self.front.choose(arrival)
        reason = str(decision.reason.value)
        self.outcomes.reasons[reason] = self.outcomes.reasons.get(reason, 0) + 1
        if decision.tier is None:
            self.outcomes.num_rejected += 1
            return
        tier, arrived_s = decision.tier, self.clock.now
        self._open += 1
        self.front.num_inflight += 1
        first: list[float] = []
        running = Running(
            arrival,
            tier,
            on_first=first.append,
            on_done=lambda now: self._done(arrival, tier, arrived_s, first[0], now),
        )
        external = self._external.get(tier)
        if external is not None:
            self._ask_external(external, running)
        else:
            self._send(running, arrived_s + HOLD_S)

    def _ask_external(self, tier: TierPlan, running: Running) -> None:
        assert tier.external_ttft_s is not None
        first = self.clock.now + tier.external_ttft_s
        outputs = running.arrival.output_of(tier.name)
        self.clock.at(first, running.on_first, first)
        done = first + (outputs - 1) * tier.external_tpot_s
        self.clock.at(done, running.on_done, done)

    def _send(self, running: Running, until_s: float) -> None:
        outputs = running.arrival.output_of(running.tier)
        longest = running.arrival.prompt_tokens + outputs
        pools = [p for key, p in self.cluster.pools.items() if key[0] == running.tier]
        if all(longest > p.settings.kv_tokens for p in pools if p.role != "prefill"):
            self._give_up(rejected=True)  # the worker's 400: longer than its context
        elif not self.cluster.submit(running):
            self._held.append((running, until_s))
            self.front.held[running.tier] += 1
            self._retry_later()

    def _retry_later(self) -> None:
        """One look at all that are held, however many they are."""
        if self._held and not self._retry_due:
            self._retry_due = True
            self.clock.after(RETRY_S, self._try_held)

    def _try_held(self) -> None:
        self._retry_due = False
        full: set[str] = set()  # who came first is asked first: one refusal answers for the rest
        for _ in range(len(self._held)):
            running, until_s = self._held.popleft()
            if running.tier not in full and self.cluster.submit(running):
                self.front.held[running.tier] -= 1
                continue
            full.add(running.tier)
            if self.clock.now >= until_s:
                self.front.held[running.tier] -= 1
                self.front.num_refused += 1
                self._give_up(rejected=False)
            else:
                self._held.append((running, until_s))
        self._retry_later()

    def _give_up(self, *, rejected: bool) -> None:
        self._open -= 1
        self.front.num_inflight -= 1
        if rejected:
            self.outcomes.num_rejected += 1
        else:
            self.outcomes.num_failed += 1

    def _done(
        self, arrival: Arrival, tier: str, arrived_s: float, first_s: float, now: float
    ) -> None:
        self._open -= 1
        self.front.num_inflight -= 1
        outputs = arrival.output_of(tier)
        self.front.finished(tier, arrival.prompt_tokens, outputs)
        quality = arrival.quality or {}
        self.outcomes.add(
            arrived_s=arrived_s,
            first_s=first_s,
            done_s=now,
            tier=tier,
            prompt_tokens=arrival.prompt_tokens,
            output_tokens=outputs,
            quality=quality.get(tier, math.nan),
            best_quality=quality.get(self.plan.tiers[-1].name, math.nan),
        )

    # -- control ---------------------------------------------------------------------------------

    def _tick(self) -> None:
        self._sample()
        if self.plan.scale is not None:
            workers = {key: self.cluster.num_workers(key) for key in self.cluster.pools}
            planned = self.plan.scale(self.clock.now, workers, self.front.state(), self._loads())
            if planned is not None:
                self._carry_out(planned, workers)
        if not self._ended or self._open:
            self.clock.after(self.plan.interval_s, self._tick)

    def _carry_out(self, planned: Plan, workers: Mapping[tuple[str, Role], int]) -> None:
        for key, replicas in planned.workers.items():
            if replicas != workers.get(key):
                self.cluster.scale(key, replicas)
        if planned.threshold != self.front.set_points.gain_threshold:
            self.front.move_threshold(planned.threshold)
        for decision in planned.decisions:
            self.decisions.append(
                {
                    "at_s": self.clock.now,
                    "pool": decision.pool,
                    "before": decision.before,
                    "after": decision.after,
                    "reason": decision.reason,
                }
            )

    def _loads(self) -> list[Any]:
        """What GET /v1/load of each worker says."""
        found = []
        for pod in self.cluster.pods.values():
            if pod.ready_s > self.clock.now or pod.draining:
                continue
            worker, profile = pod.worker, pod.pool.profile
            blocks, scheduler = worker.blocks, worker.scheduler
            body = {
                "role": pod.pool.role,
                "num_running": len(scheduler.running),
                "num_waiting": len(scheduler.waiting) + len(scheduler.awaiting_kv),
                "pending_prefill_tokens": scheduler.num_pending_prefill_tokens,
                "kv_blocks": {
                    "total": blocks.num_blocks,
                    "free": blocks.num_free,
                    "cached": blocks.num_cached,
                    "used": blocks.num_used,
                },
                "block_size": blocks.block_size,
                "profile": {"prefill": list(profile.prefill), "decode": list(profile.decode)},
            }
            found.append((pod.pool.tier, body))
        return found

    def _sample(self) -> None:
        pods = list(self.cluster.pods.values())
        usage = self.cluster.count_usage()
        busy = sum(pod.worker.busy_s for pod in pods)
        held = sum(usage.pod_s.values())
        spent = held - self._pods_before
        utilisation = (busy - self._busy_before) / spent if spent > 0.0 else 0.0
        self._busy_before, self._pods_before = busy, held
        counts: dict[str, int] = {}
        for pod in pods:
            name = f"{pod.pool.tier}/{pod.pool.role}"
            counts[name] = counts.get(name, 0) + 1
        self.timeline.append(
            TimelinePoint(
                self.clock.now,
                counts,
                sum(len(pod.worker.scheduler.running) for pod in pods),
                sum(len(pod.worker.scheduler.waiting) for pod in pods) + len(self._held),
                max(0.0, min(1.0, utilisation)),
                self.front.set_points.gain_threshold,
            )
        )

    # -- the run ---------------------------------------------------------------------------------

    def run(self, progress: Callable[[float, int], None] | None = None) -> dict[str, Any]:
        """Replay to the end; the result as plain data (`report`).

        Args:
            progress: Told (virtual time, requests served) now and then.
        """
        self._next()
        self.clock.after(self.plan.interval_s, self._tick)
        steps = 0
        while self.clock.next_at is not None:
            self.clock.run(self.clock.next_at + 60.0)
            steps += 1
            if progress is not None and steps % 5 == 0:
                progress(self.clock.now, len(self.outcomes))
        return self.result()

    def result(self) -> dict[str, Any]:
        """Everything measured, as data that can be written as JSON."""
        duration = max(self.clock.now, 1e-9)
        usage = self.cluster.count_usage()
        tokens_usd = self._tokens_usd()
        gaps = self.cluster.gaps
        return {
            "duration_s": duration,
            **summary(self.outcomes, self.plan.targets, duration),
            "itl_s": {f"p{p:g}": _known(gaps.percentile(p)) for p in (50.0, 90.0, 95.0, 99.0)},
            "gpu_hours": usage.gpu_s / 3600.0,
            "pod_hours": {
                f"{tier}/{role}": seconds / 3600.0
                for (tier, role), seconds in sorted(usage.pod_s.items())
            },
            "usd": {
                "workers": usage.usd,
                "tokens": tokens_usd,
                "total": usage.usd + tokens_usd,
            },
            "decisions": self.decisions,
            "timeline": [
                {
                    "at_s": point.at_s,
                    "workers": dict(point.workers),
                    "running": point.running,
                    "waiting": point.waiting,
                    "utilisation": round(point.utilisation, 4),
                    "threshold": point.threshold,
                }
                for point in self.timeline
            ],
        }

    def _tokens_usd(self) -> float:
        """What external answers cost; our own workers are paid by the hour."""
        total = 0.0
        for name, tier in self._external.items():
            _, prompt, output = self.front.counts[name]
            total += prompt * tier.usd_per_1m_input_tokens + output * tier.usd_per_1m_output_tokens
        return total / 1e6


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
