"""What the simulator says of a pool at a steady rate: the table behind the world of control steps.

For each pool, number of workers and rate per worker one short simulation: how many requests meet
their targets, also when something else has used part of the time already, and what workers report.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from scaling_studies import cluster
from scaling_studies.cluster import DECODE, POOLS, PREFILL, PROFILES, SMALL, TPOT_S, TTFT_S, Key
from scaling_studies.traffic import Prompts
from tandem_operator.simulate.simulation import Simulation, SimulationPlan

COUNTS = (1, 2, 4, 8, 16)
PARTS = (0.3, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95, 1.05)  # of the rate at which steps double
SPENT = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the TTFT target
PLENTY = 24


@dataclass(frozen=True, slots=True)
class PoolTable:
    """One pool at (number of workers) x (requests per second and worker).

    Attributes:
        met: Share of requests with all their targets met, by rate, and by the part of the TTFT
            target that a queue has used before: rows [count][rate][spent].
        running, waiting, pending: Means per worker of what `/v1/load` says, [count][rate].
        capacity: Requests per second and worker under overload, by count.
        drain_s: How long a worker that is taken away still runs.
    """

    counts: tuple[int, ...]
    rates: tuple[float, ...]
    met: list[list[list[float]]]
    running: list[list[float]]
    waiting: list[list[float]]
    pending: list[list[float]]
    capacity: list[float]
    drain_s: float


def fitted(prompts: Prompts, *, anew: bool = False) -> dict[Key, PoolTable]:
    """Tables of all pools; kept between runs for the same cluster and prompts."""
    text = repr(
        (
            [PROFILES[key[0]] for key in POOLS],
            COUNTS,
            PARTS,
            SPENT,
            TTFT_S,
            TPOT_S,
            prompts.lengths[:50],
            5,
        )
    )
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    folder = Path(os.environ.get("TANDEM_BENCH_CACHE", Path.home() / ".cache" / "tandem-bench"))
    kept = folder / f"scaling-{digest}.json"
    if kept.exists() and not anew:
        raw = json.loads(kept.read_text())
        return {key: PoolTable(**raw["/".join(key)]) for key in POOLS}
    found = {key: _table(key, prompts) for key in POOLS}
    folder.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps({"/".join(key): asdict(table) for key, table in found.items()}))
    return found


def nominal_rate(key: Key, prompts: Prompts) -> float:
    """Requests per second of one worker at which a decode step takes its whole target."""
    profile = PROFILES[key[0]]
    prompt, output = prompts.prompt_tokens, prompts.output_tokens
    prefill = profile.prefill[1] * prompt
    token = profile.decode[1] * (prompt + output / 2) + profile.decode[2]
    if key == PREFILL:
        return 1.0 / (profile.prefill[0] + prefill)
    room = 1.0 - profile.decode[0] / TPOT_S
    return room / (output * token + (prefill if key == SMALL else 0.0))


def alone(key: Key, count: int) -> SimulationPlan:
    """One tier with so many workers in a pool and plenty in the other."""
    tier = key[0]
    found = cluster.resources(tiers=(tier,))
    replicas: dict[Key, int] = {key: count}
    if key == PREFILL:
        replicas[DECODE] = PLENTY
    if key == DECODE:
        replicas[PREFILL] = PLENTY
    return cluster.plan(found, replicas)


def _table(key: Key, prompts: Prompts) -> PoolTable:
    nominal = nominal_rate(key, prompts)
    rates = tuple(round(nominal * part, 4) for part in PARTS)
    met, running, waiting, pending, capacity = [], [], [], [], []
    for count in COUNTS:
        rows = [_steady(key, prompts, count, rate * count) for rate in rates]
        met.append([row["met"] for row in rows])
        running.append([row["running"] for row in rows])
        waiting.append([row["waiting"] for row in rows])
        pending.append([row["pending"] for row in rows])
        capacity.append(_overload(key, prompts, count, 2.0 * nominal * count))
    drain = _drain(key, prompts, 0.6 * nominal)
    return PoolTable(COUNTS, rates, met, running, waiting, pending, capacity, drain)


def _steady(key: Key, prompts: Prompts, count: int, rate: float) -> dict[str, Any]:
    until = max(90.0, 1400.0 / rate)
    warm = 0.2 * until
    sums = {"running": [], "waiting": [], "pending": []}  # type: ignore[var-annotated]

    def listen(
        now: float, workers: Mapping[Key, int], state: Any, loads: Sequence[tuple[str, Any]]
    ) -> None:
        own = [load for _, load in loads if load["role"] == key[1]]
        if now > warm and own:
            sums["running"].append(np.mean([load["num_running"] for load in own]))
            sums["waiting"].append(np.mean([load["num_waiting"] for load in own]))
            sums["pending"].append(np.mean([load["pending_prefill_tokens"] for load in own]))

    plan = replace(alone(key, count), scale=listen, interval_s=2.0)
    arrivals = prompts.arrivals(lambda at_s: rate, until, rate, seed=count)
    simulation = Simulation(plan, arrivals)
    simulation.run()
    out = simulation.outcomes
    arrived = np.frombuffer(out.arrived_s)
    ttft = np.frombuffer(out.ttft_s, dtype=np.float32)[arrived > warm]
    tpot = np.frombuffer(out.tpot_s, dtype=np.float32)[arrived > warm]
    fast = np.ones(len(tpot), dtype=bool) if key == PREFILL else ~(tpot > TPOT_S)
    return {
        "met": [float((fast & (ttft <= TTFT_S * (1.0 - spent))).mean()) for spent in SPENT],
        **{name: float(np.mean(values)) for name, values in sums.items()},
    }


def _overload(key: Key, prompts: Prompts, count: int, rate: float) -> float:
    """Requests per second and worker that leave a pool which always has more to do."""
    until = 60.0
    arrivals = prompts.arrivals(lambda at_s: rate, until, rate, seed=count)
    simulation = Simulation(alone(key, count), arrivals)
    simulation.run()
    out = simulation.outcomes
    arrived, ttft = np.frombuffer(out.arrived_s), np.frombuffer(out.ttft_s, dtype=np.float32)
    first = arrived + ttft
    return float(((first > 20.0) & (first < until)).sum()) / (until - 20.0) / count


def _drain(key: Key, prompts: Prompts, rate: float) -> float:
    """Mean time from the end of a worker's listing to its end."""
    took = []
    for seed in range(4):
        simulation = Simulation(
            alone(key, 4), prompts.arrivals(lambda at_s: 4 * rate, 120.0, 4 * rate, seed=seed)
        )
        simulation.clock.at(60.0, simulation.cluster.scale, key, 3)
        simulation.run()
        usage = simulation.cluster.count_usage()
        took.append(usage.pod_s[key] - 3 * simulation.clock.now - 60.0)
    return float(np.mean(took))
