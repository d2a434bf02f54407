"""The cluster at the resolution of control steps, by the table fitted to the simulator."""

from __future__ import annotations

import bisect
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from scaling_studies.cluster import GPUS, POOLS, PROFILES, STARTUP_S, TTFT_S, USD_PER_HOUR, Key
from scaling_studies.fit import SPENT, PoolTable
from scaling_studies.traffic import Prompts, Rate, Routing
from tandem_operator.simulate.simulation import Scale

STEP_S = 10.0
TIERS = ("small", "large")
# Work that a pool gets follows its share of arrivals with the time an answer takes.
LAG_S = 12.0


class Pool:
    """Workers of a pool with what waits for them."""

    def __init__(self, key: Key, table: PoolTable, count: int) -> None:
        self.key = key
        self.table = table
        self.ready = count
        self.starting: deque[tuple[float, int]] = deque()
        self.draining: deque[tuple[float, int]] = deque()
        self.backlog = 0.0
        self.rate = 0.0
        self._met = [
            [[met[index] for met in rates] for rates in table.met] for index in range(len(SPENT))
        ]

    @property
    def wanted(self) -> int:
        return self.ready + sum(count for _, count in self.starting)

    @property
    def held(self) -> int:
        """Pods that are paid for."""
        return self.wanted + sum(count for _, count in self.draining)

    def scale(self, now: float, count: int) -> None:
        """Start workers, or end those that have not begun, then ready ones."""
        more = count - self.wanted
        if more > 0:
            self.starting.append((now + STARTUP_S, more))
        for _ in range(max(0, -more)):
            if self.starting:
                ready_s, number = self.starting.pop()
                if number > 1:
                    self.starting.append((ready_s, number - 1))
            else:
                self.ready -= 1
                self.draining.append((now + self.table.drain_s, 1))

    def tick(self, now: float) -> None:
        """Workers that are ready now, and those that have drained."""
        while self.starting and self.starting[0][0] <= now:
            self.ready += self.starting.popleft()[1]
        while self.draining and self.draining[0][0] <= now:
            self.draining.popleft()

    def met(self, rate: float) -> float:
        """Share of the requests of the next step whose targets this pool meets."""
        count = max(1, self.ready)
        weight = 1.0 - math.exp(-STEP_S / LAG_S) if self.key[1] != "prefill" else 1.0
        self.rate += weight * (rate - self.rate)
        capacity = _by_count(self.table, self.table.capacity, count) * count
        before = self.backlog
        self.backlog = max(0.0, self.backlog + (rate - capacity) * STEP_S)
        wait = 0.5 * (before + self.backlog) / capacity
        if wait > 0.0:
            # The queue is counted by itself: beside it a request sees a busy worker.
            spent = wait / TTFT_S
            return self.at(count, min(self.rate / count, 0.8 * capacity / count), spent)
        return self.at(count, self.rate / count)

    def at(self, count: int, rate: float, spent: float = 0.0) -> float:
        """The table between its rows."""
        if spent >= 1.0:
            return 0.0
        index = min(int(spent / 0.25), len(SPENT) - 2)
        part = spent / 0.25 - index
        low = _between(self.table, self._met[index], count, rate)
        if part == 0.0:
            return low
        high = _between(self.table, self._met[index + 1], count, rate)
        return (1.0 - part) * low + part * high


def _place(counts: Sequence[int], count: int) -> tuple[int, int, float]:
    if count >= counts[-1]:
        return len(counts) - 1, len(counts) - 1, 0.0
    high = bisect.bisect_right(counts, count)
    low = high - 1
    part = math.log(count / counts[low]) / math.log(counts[high] / counts[low])
    return low, high, part


def _by_count(table: PoolTable, values: Sequence[float], count: int) -> float:
    low, high, part = _place(table.counts, count)
    return (1.0 - part) * values[low] + part * values[high]


def _between(table: PoolTable, rows: Sequence[Sequence[float]], count: int, rate: float) -> float:
    low, high, part = _place(table.counts, count)
    first = _line(table.rates, rows[low], rate)
    if part == 0.0:
        return first
    return (1.0 - part) * first + part * _line(table.rates, rows[high], rate)


def _line(xs: Sequence[float], ys: Sequence[float], x: float) -> float:
    if x <= xs[0]:
        return ys[0]
    if x >= xs[-1]:
        return ys[-1]
    i = bisect.bisect_right(xs, x)
    part = (x - xs[i - 1]) / (xs[i] - xs[i - 1])
    return ys[i - 1] + part * (ys[i] - ys[i - 1])


@dataclass
class Tally:
    """What a replay has shown."""

    requests: float = 0.0
    met: float = 0.0
    gpu_s: float = 0.0
    usd: float = 0.0
    actions: int = 0
    threshold_moves: int = 0
    quality: float = 0.0
    peak_usd_per_hour: float = 0.0
    over_usd: float = 0.0  # spent above the hourly budget
    hours_over: int = 0
    hours: int = 0
    by_hour: list[tuple[float, float, float]] = field(default_factory=list)
    _hour: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0, 0.0])

    def add(self, now: float, requests: float, met: float, gpu_s: float, usd: float,
            quality: float, budget: float | None) -> None:  # fmt: skip
        """One step."""
        self.requests += requests
        self.met += requests * met
        self.gpu_s += gpu_s
        self.usd += usd
        self.peak_usd_per_hour = max(self.peak_usd_per_hour, usd * 3600.0 / STEP_S)
        self.quality += requests * quality
        row = self._hour
        row[0] += requests
        row[1] += requests * met
        row[2] += gpu_s
        row[3] += usd
        if (now + STEP_S) % 3600.0 < STEP_S / 2:
            self.hours += 1
            self.by_hour.append((row[0], row[1] / max(row[0], 1e-9), row[2] / 3600.0))
            if budget is not None and row[3] > budget * 1.0001:
                self.hours_over += 1
                self.over_usd += row[3] - budget
            self._hour = [0.0, 0.0, 0.0, 0.0]

    def summary(self) -> dict[str, float]:
        """The figures of the page."""
        return {
            "slo": self.met / self.requests,
            "gpu_hours": self.gpu_s / 3600.0,
            "usd": self.usd,
            "actions": self.actions,
            "threshold_moves": self.threshold_moves,
            "quality_ratio": self.quality / self.requests,
            "hours_over_budget": self.hours_over,
            "spent_over_budget": self.over_usd / self.usd,
            "worst_hour": min(met for _, met, _ in self.by_hour) if self.by_hour else 1.0,
        }


class World:
    """A replay at control steps; `scale` is a control loop as the simulator calls it."""

    def __init__(
        self,
        tables: Mapping[Key, PoolTable],
        prompts: Prompts,
        routing: Routing,
        counts: Mapping[Key, int],
        threshold: float,
        *,
        seed: int = 0,
        budget: float | None = None,
    ) -> None:
        self.pools = {key: Pool(key, tables[key], counts[key]) for key in POOLS}
        self.threshold = threshold
        self.tally = Tally()
        self.budget = budget
        self._prompts, self._routing = prompts, routing
        self._rng = np.random.default_rng(seed)
        self._asked: float | None = None
        self._num_requests = 0.0
        self._arrived = dict.fromkeys(TIERS, 0.0)
        self._prompt_tokens = dict.fromkeys(TIERS, 0.0)
        self._served = dict.fromkeys(TIERS, 0.0)
        lengths = np.array(prompts.lengths, dtype=float)
        self._spread = float(lengths[:, 0].std())

    def step(self, now: float, rate: float, scale: Scale | None) -> None:
        """Serve for a step at that rate, then let the loop look."""
        point = self._routing.after(self._num_requests)
        self._num_requests += rate * STEP_S
        asked = point.limit if self._asked is None else self._asked
        self.threshold = min(asked, point.limit)
        small = self._routing.share_small(self.threshold)
        rates = {"small": rate * small, "large": rate * (1.0 - small)}
        shares = {"small": 1.0, "large": 1.0}
        gpu_s = usd = 0.0
        for key, pool in self.pools.items():
            pool.tick(now)
            shares[key[0]] *= pool.met(rates[key[0]])
            gpu_s += pool.held * GPUS[key[0]] * STEP_S
            usd += pool.held * USD_PER_HOUR[key[0]] * STEP_S / 3600.0
        met = small * shares["small"] + (1.0 - small) * shares["large"]
        quality = self._routing.quality_ratio(self.threshold)
        self.tally.add(now, rate * STEP_S, met, gpu_s, usd, quality, self.budget)
        for tier in TIERS:
            count = float(self._rng.poisson(rates[tier] * STEP_S))
            self._arrived[tier] += count
            noise = self._spread * math.sqrt(count) * self._rng.standard_normal()
            self._prompt_tokens[tier] += max(0.0, count * self._prompts.prompt_tokens + noise)
            self._served[tier] += count
        if scale is None:
            return
        workers = {key: pool.wanted for key, pool in self.pools.items()}
        plan = scale(now + STEP_S, workers, self._state(), self._loads())
        if plan is None:
            return
        for key, wanted in plan.workers.items():
            if wanted != workers[key]:
                self.tally.actions += 1
                self.pools[key].scale(now + STEP_S, wanted)
        # As the routers are told: only what differs from what is in force.
        if plan.threshold != self.threshold and plan.threshold != self._asked:
            self.tally.threshold_moves += 1
            self._asked = plan.threshold
            self.threshold = min(plan.threshold, point.limit)

    def _state(self) -> dict[str, Any]:
        point = self._routing.after(self._num_requests)
        held = dict.fromkeys(TIERS, 0.0)
        tiers = {
            tier: {
                "num_arrived": self._arrived[tier],
                "prompt_tokens": self._prompt_tokens[tier],
                "num_held": held[tier],
            }
            for tier in TIERS
        }
        return {
            "num_inflight": 0,
            "arrivals": {"num_refused": 0, "tiers": tiers},
            "tiers": [
                {
                    "name": tier,
                    "num_requests": self._served[tier],
                    "prompt_tokens": self._prompt_tokens[tier],
                    "output_tokens": self._served[tier] * self._prompts.output_tokens,
                }
                for tier in TIERS
            ],
            "curve": list(point.curve),
            "set_points": {"gain_threshold": self.threshold},
            "threshold": {
                "asked": self._asked,
                "limit": point.limit,
                "in_force": self.threshold,
            },
        }

    def _loads(self) -> list[tuple[str, Any]]:
        """One body per ready worker; they differ by chance as real ones do."""
        found = []
        for key, pool in self.pools.items():
            profile = PROFILES[key[0]]
            count = max(1, pool.ready)
            rate = pool.rate / count
            table = pool.table
            running = self._rng.poisson(_between(table, table.running, count, rate), count)
            waiting = self._rng.poisson(_between(table, table.waiting, count, rate), count)
            pending = _between(table, table.pending, count, rate)
            extra = pool.backlog / count
            half = "prefill" if key[1] == "prefill" else "decode"
            fits = {"prefill": list(profile.prefill), "decode": list(profile.decode)}
            for index in range(count):
                held = float(running[index])
                used = held * (self._prompts.prompt_tokens + self._prompts.output_tokens / 2)
                body = {
                    "role": key[1],
                    "num_running": held,
                    "num_waiting": float(waiting[index]) + extra,
                    "pending_prefill_tokens": pending + extra * self._prompts.prompt_tokens,
                    "kv_blocks": {
                        "total": profile.kv_tokens // 64,
                        "used": min(profile.kv_tokens, used) / 64.0,
                    },
                    "block_size": 64,
                    "profile": fits if key[1] == "unified" else {half: fits[half]},
                }
                found.append((key[0], body))
        return found


def replay(world: World, rate: Rate, until_s: float, scale: Scale | None, began_s: float = 0.0
           ) -> Tally:  # fmt: skip
    """Run a world from a time to another."""
    steps = round((until_s - began_s) / STEP_S)
    for index in range(steps):
        now = began_s + index * STEP_S
        world.step(now, rate(now + STEP_S / 2), scale)
    return world.tally
