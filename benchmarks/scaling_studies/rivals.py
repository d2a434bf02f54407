"""How others scale: HPA thresholds, KEDA on queues, a Dynamo-style planner, llm-d's law, an oracle.

Each is called as the simulator calls a control loop and returns the same plan; the threshold stays
at what holds the quality floor. Written from their documentation, with the signals that suit them
best, and each is given the setting that does best in hindsight on this very traffic.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from scaling_studies.cluster import POOLS, PROFILES, TPOT_S, TTFT_S, Key
from scaling_studies.fit import PoolTable
from scaling_studies.traffic import Rate
from scaling_studies.world import STEP_S, Pool
from tandem_operator.autoscale import Load, PerformanceProfile, PoolSpec, Slo, workers_for_slo
from tandem_operator.autoscale.loop import Plan
from tandem_operator.autoscale.observe import TrafficMeter
from tandem_operator.simulate.cluster import Role

MOST = 64
TOLERANCE = 0.1  # HPA's
STABILIZATION_S = 300.0  # HPA's, before it removes


def planned(workers: Mapping[Key, int], state: Mapping[str, Any]) -> Plan:
    """A plan that leaves the threshold where it is: as far as the routers' floor lets it."""
    floor = state["threshold"]["limit"] is not None
    threshold = 1.0 if floor else state["set_points"]["gain_threshold"]
    return Plan(dict(workers), threshold, (), None, True)


class Stabilized:
    """What an HPA does with a wish: up to double or four more, down to the window's maximum."""

    def __init__(self, least: int = 1, most: int = MOST) -> None:
        self.least, self.most = least, most
        self._wishes: deque[tuple[float, int]] = deque()

    def __call__(self, now: float, current: int, wish: int) -> int:
        self._wishes.append((now, wish))
        while self._wishes[0][0] < now - STABILIZATION_S:
            self._wishes.popleft()
        if wish > current:
            found = min(wish, max(2 * current, current + 4))
        else:
            found = min(current, max(count for _, count in self._wishes))
        return min(self.most, max(self.least, found))


def _bodies(loads: Iterable[tuple[str, Any]]) -> dict[Key, list[dict[str, Any]]]:
    found: dict[Key, list[dict[str, Any]]] = {}
    for tier, body in loads:
        role: Role = body["role"]
        found.setdefault((tier, role), []).append(body)
    return found


class Hpa:
    """`averageValue` of requests in the system per worker, the HPA's defaults for the rest.

    Args:
        target: Per pool.
    """

    every_s = 15.0

    def __init__(self, target: Mapping[Key, float], least: int = 1, most: int = MOST) -> None:
        self.target = target
        self._stable = {key: Stabilized(least, most) for key in target}
        self._next_s = -math.inf

    def value(self, body: Mapping[str, Any]) -> float:
        """What a worker reports."""
        return float(body["num_running"] + body["num_waiting"])

    def __call__(
        self, now: float, workers: Mapping[Key, int], state: dict[str, Any], loads: Sequence[Any]
    ) -> Plan | None:
        if now < self._next_s:
            return None
        self._next_s = now + self.every_s - 1e-6
        bodies = _bodies(loads)
        wanted = {}
        for key, current in workers.items():
            total = sum(self.value(body) for body in bodies.get(key, []))
            ratio = total / (current * self.target[key])
            wish = current if abs(ratio - 1.0) <= TOLERANCE else math.ceil(current * ratio)
            wanted[key] = self._stable[key](now, current, wish)
        return planned(wanted, state)


class Keda(Hpa):
    """The number of waiting requests, read every 30 s, above a fixed number of workers."""

    every_s = 30.0

    def __init__(self, target: Mapping[Key, float], least: int, most: int = MOST) -> None:
        super().__init__(target, least, most)

    def value(self, body: Mapping[str, Any]) -> float:
        return float(body["num_waiting"])


class _Metered:
    def __init__(self) -> None:
        self._meter = TrafficMeter()
        self._seen: deque[tuple[float, dict[str, float]]] = deque(maxlen=18)
        self._at_s: float | None = None
        self.load = Load(0.0, 1.0, 1.0, 1.0)

    def read(self, now: float, state: dict[str, Any]) -> bool:
        traffic = self._meter.read(now, {"router": state})
        before, self._at_s = self._at_s, now
        if traffic is None or before is None:
            return False
        self.load = traffic.load
        self._seen.append((now - before, dict(traffic.arrived)))
        return True

    def rates(self, steps: int) -> dict[str, float]:
        """Mean arrivals per second of the last readings, by tier."""
        rows = list(self._seen)[-steps:]
        seconds = sum(took for took, _ in rows)
        tiers = {tier for _, arrived in rows for tier in arrived}
        return {t: sum(row.get(t, 0.0) for _, row in rows) / seconds for t in tiers}


class SloLaw:
    """llm-d's SLO analyzer: the rate per worker at which mean latencies reach their targets.

    Every minute, from the last minute's arrivals and a queueing model of the worker (here our own
    formulas with exact profiles, which flatters it); no forecast.

    Args:
        part: Of the targets, for it looks at means and the SLO is a percentile.
    """

    def __init__(self, part: float, least: int = 1, most: int = MOST) -> None:
        self._slo = Slo(TTFT_S * part, TPOT_S * part, 50.0, 50.0)
        self._metered = _Metered()
        self._bounds = least, most
        self._stable: dict[Key, Stabilized] = {}
        self._next_s = -math.inf

    def __call__(
        self, now: float, workers: Mapping[Key, int], state: dict[str, Any], loads: Sequence[Any]
    ) -> Plan | None:
        if not self._metered.read(now, state) or now < self._next_s:
            return None
        self._next_s = now + 60.0 - 1e-6
        rates = self._metered.rates(6)
        wanted = {}
        for key, current in workers.items():
            stable = self._stable.setdefault(key, Stabilized(*self._bounds))
            wish = _needed(key, rates.get(key[0], 0.0), self._metered.load, self._slo)
            wanted[key] = stable(now, current, wish)
        return planned(wanted, state)


def _needed(key: Key, rate: float, load: Load, slo: Slo) -> int:
    profile = PROFILES[key[0]]
    performance = PerformanceProfile(profile.prefill, profile.decode, profile.kv_tokens, 128)
    part = Load(rate, load.prompt_tokens, load.prompt_tokens_squared, load.output_tokens)
    pool = PoolSpec(key[0], key[1], 1, 1.0, 1, MOST)
    return max(1, workers_for_slo(pool, part, performance, slo)[0])


class Planner:
    """Dynamo's SLA planner: a forecast every 180 s sets the floor, a load loop moves one worker.

    Args:
        headroom: On the forecast.
        targets: Requests in the system per worker at which the load loop adds one.
    """

    def __init__(self, headroom: float, targets: Mapping[Key, float], least: int = 1,
                 most: int = MOST) -> None:  # fmt: skip
        self._headroom = headroom
        self._targets = targets
        self._metered = _Metered()
        self._bounds = least, most
        self._history: list[dict[str, float]] = []
        self._floor: dict[Key, int] = {}
        self._next_s = -math.inf
        self._added_s: dict[Key, float] = {}

    def __call__(
        self, now: float, workers: Mapping[Key, int], state: dict[str, Any], loads: Sequence[Any]
    ) -> Plan | None:
        if not self._metered.read(now, state):
            return None
        low, high = self._bounds
        if now >= self._next_s:
            self._next_s = now + 180.0 - 1e-6
            self._history.append(self._metered.rates(18))
            self._floor = {
                key: min(high, max(low, self._throughput_workers(key))) for key in workers
            }
        bodies = _bodies(loads)
        wanted = {}
        for key, current in workers.items():
            found = bodies.get(key, [])
            busy = sum(b["num_running"] + b["num_waiting"] for b in found) / max(1, len(found))
            starting = current - len(found)
            wish = current
            if busy > self._targets[key] and starting <= 0:
                wish = current + 1
            elif busy * current < 0.8 * self._targets[key] * (current - 1):
                wish = current - 1
            wanted[key] = min(high, max(low, self._floor[key], wish))
        return planned(wanted, state)

    def _throughput_workers(self, key: Key) -> int:
        """Forecast rate over the throughput of a worker inside its SLO, as profiled offline."""
        last = [row.get(key[0], 0.0) for row in self._history[-3:]]
        trend = (last[-1] - last[0]) / (len(last) - 1) if len(last) > 1 else 0.0
        rate = max(0.0, last[-1] + trend) * self._headroom
        profile, load = PROFILES[key[0]], self._metered.load
        context = load.prompt_tokens + load.output_tokens / 2
        token = profile.decode[1] * context + profile.decode[2]
        prefill = profile.prefill[0] + profile.prefill[1] * load.prompt_tokens
        if key[1] == "prefill":
            each = 1.0 / prefill
        else:
            room = 1.0 - profile.decode[0] / TPOT_S
            work = load.output_tokens * token + (prefill if key[1] == "unified" else 0.0)
            each = room / work
        return math.ceil(rate / each)


def oracle(
    tables: Mapping[Key, PoolTable],
    share_small: float,
    rate: Rate,
    until_s: float,
    level: float,
    startup_s: float,
) -> list[dict[Key, int]]:
    """Fewest workers at each step of which this level of requests is in time, known in advance.

    They are asked for a start earlier, and kept where less than a start passes until the next
    need.
    """
    steps = round(until_s / STEP_S)
    # Asked for at the end of a step, ready a start later, in time for the step that needs them.
    ahead = math.ceil(startup_s / STEP_S) + 2
    found: list[dict[Key, int]] = [{} for _ in range(steps)]
    for key in POOLS:
        part = share_small if key[0] == "small" else 1.0 - share_small
        pool = Pool(key, tables[key], 1)
        known: dict[int, int] = {}
        needs = []
        for index in range(steps):
            asked = rate((index + 0.5) * STEP_S) * part
            rounded = math.ceil(asked * 20)
            if rounded not in known:
                known[rounded] = _least(pool, rounded / 20, level)
            needs.append(known[rounded])
        window: deque[int] = deque()
        for index in range(steps - 1, -1, -1):
            while window and needs[window[-1]] <= needs[index]:
                window.pop()
            window.append(index)
            while window[0] > index + ahead:
                window.popleft()
            found[index][key] = needs[window[0]]
    return found


def _least(pool: Pool, rate: float, level: float) -> int:
    count = 1
    while count < MOST and (
        rate / count > pool.table.rates[-1] or pool.at(count, rate / count) < level
    ):
        count += 1
    return count
