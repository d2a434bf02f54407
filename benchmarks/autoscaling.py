"""What the control loop is worth on two weeks of real request rates, judged by the simulator.

    python benchmarks/autoscaling.py [two-weeks|ramp|all] [--days 14] [--json FILE]

Rates: ServeGen's 14 days of a production model, 5 to 60 requests/s; lengths: Azure's
conversations; qualities: MMLU's outcomes. Two tiers (unified; prefill and decode apart), pods that
take 90 s to start. The days run at control steps of 10 s through a table fitted to the simulator
(`scaling_studies/fit.py`, `world.py`); four whole hours of them run again request by request.
Beside the loop: an HPA, KEDA on queues, a planner as Dynamo's, llm-d's SLO-aware law, each with
the setting that does best on the first three days in hindsight, and an oracle that knows what
comes.

The ramp is 2 -> 10 -> 1 requests/s with pods that take 100 s and 3 to 8 replicas, request by
request, unified and with prefill and decode apart.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from outcomes import markdown
from scaling_studies import cluster, rivals, traffic
from scaling_studies.cluster import DECODE, POOLS, PREFILL, SMALL, STARTUP_S, TPOT_S, TTFT_S, Key
from scaling_studies.fit import PoolTable, fitted
from scaling_studies.traffic import Prompts, Rate, Routing
from scaling_studies.world import STEP_S, Tally, World

from tandem_operator.simulate.plan_file import simulation_plan
from tandem_operator.simulate.simulation import Scale, Simulation

DAY_S = 86400.0
WARM_S = 300.0
WANTED_SLO = 0.99
CHOICE_S = 3 * DAY_S


class TwoWeeks:
    """Everything that a replay of the days needs, and the replays.

    Args:
        days: Of the 14.
    """

    def __init__(self, prompts: Prompts, routing: Routing, tables: Mapping[Key, PoolTable],
                 rate: Rate, days: float) -> None:  # fmt: skip
        self.prompts, self.routing, self.tables, self.rate = prompts, routing, tables, rate
        self.until_s = days * DAY_S
        self.small = routing.share_small(routing.limit)
        self.begin = rivals.oracle(tables, self.small, rate, STEP_S, 0.995, 0.0)[0]
        self.budget: float | None = None
        self.kept: dict[float, tuple[Scale, dict[Key, int], float]] = {}

    def world(self) -> World:
        return World(
            self.tables, self.prompts, self.routing, self.begin, self.routing.limit,
            budget=self.budget,
        )  # fmt: skip

    def replay(self, scale: Scale, keep: Sequence[float] = ()) -> Tally:
        """All days under a loop; what it knows at some times is kept for `hour`."""
        found = self.world()
        cuts = {round((at_s - WARM_S) / STEP_S) for at_s in keep}
        self.kept = {}
        for index in range(round(self.until_s / STEP_S)):
            now = index * STEP_S
            if index in cuts:
                counts = {key: pool.wanted for key, pool in found.pools.items()}
                self.kept[now + WARM_S] = copy.deepcopy(scale), counts, found.threshold
            found.step(now, self.rate(now + STEP_S / 2), scale)
        return found.tally

    def oracle(self) -> tuple[Tally, float]:
        """The cheapest schedule that is known in advance and holds the wanted SLO."""
        best: tuple[Tally, float] | None = None
        for level in (0.97, 0.98, 0.984, 0.988, 0.99, 0.992, 0.994, 0.996, 0.998):
            schedule = iter(
                rivals.oracle(self.tables, self.small, self.rate, self.until_s, level, STARTUP_S)
            )

            def known(
                now: float, workers: Any, state: Any, loads: Any, rows: Any = schedule
            ) -> Any:
                return rivals.planned(next(rows), state)

            tally = self.replay(known)
            if best is None or tally.met / tally.requests >= WANTED_SLO:
                best = tally, level
            if tally.met / tally.requests >= WANTED_SLO:
                break
        assert best is not None
        return best

    def best_of(self, makers: Mapping[str, Callable[[], Scale]], keep: Sequence[float] = ()
                ) -> tuple[str, Tally]:  # fmt: skip
        """The cheapest setting that holds the SLO, else the one that misses least.

        Chosen on the first days, then run on all of them.
        """
        until_s, self.until_s = self.until_s, min(self.until_s, CHOICE_S)
        tallies = {name: self.replay(make()) for name, make in makers.items()}
        self.until_s = until_s
        good = {n: t for n, t in tallies.items() if t.met / t.requests >= WANTED_SLO}
        name = (
            min(good, key=lambda n: good[n].gpu_s)
            if good
            else max(tallies, key=lambda n: tallies[n].met / tallies[n].requests)
        )
        return name, self.replay(makers[name](), keep)

    def hour(self, at_s: float) -> dict[str, float]:
        """That hour request by request, by the loop as it was then."""
        scale, counts, threshold = self.kept[at_s]
        began = at_s - WARM_S

        def shifted(now: float, *seen: Any) -> Any:
            return scale(began + now, *seen)

        made = cluster.plan(cluster.resources(), counts, scale=shifted)
        made = replace(made, threshold=threshold)
        most = 1.05 * max(self.rate(began + 60.0 * m) for m in range(66))
        arrivals = self.prompts.arrivals(
            lambda now: self.rate(began + now), WARM_S + 3600.0, most, seed=int(at_s)
        )
        simulation = Simulation(made, arrivals)
        gpu_s: list[tuple[float, float]] = []

        def note() -> None:
            gpu_s.append((simulation.clock.now, simulation.cluster.count_usage().gpu_s))

        for when in (WARM_S, WARM_S + 3600.0):
            simulation.clock.at(when, note)
        simulation.run()
        return {**_judged(simulation, WARM_S), "gpu_hours": (gpu_s[1][1] - gpu_s[0][1]) / 3600.0}


def _judged(simulation: Simulation, since_s: float = 0.0) -> dict[str, float]:
    out = simulation.outcomes
    rows = np.frombuffer(out.arrived_s) >= since_s
    ttft = np.frombuffer(out.ttft_s, dtype=np.float32)[rows]
    tpot = np.frombuffer(out.tpot_s, dtype=np.float32)[rows]
    quality = np.frombuffer(out.quality, dtype=np.float32)[rows]
    best = np.frombuffer(out.best_quality, dtype=np.float32)[rows]
    asked = len(ttft) + out.num_rejected + out.num_failed
    good = (ttft <= TTFT_S) & ~(tpot > TPOT_S)
    return {
        "requests": float(asked),
        "slo": float(good.sum()) / asked,
        "quality_ratio": float(quality.sum() / best.sum()) if best.sum() else 1.0,
    }


def managed(usd_per_hour: float | None) -> Scale:
    """The production loop behind the same call."""
    found = cluster.resources(usd_per_hour=usd_per_hour)
    profiles = {tier: cluster.PROFILES[tier] for tier in ("small", "large")}
    scale = simulation_plan(found, profiles, startup_s=STARTUP_S).scale
    assert scale is not None
    return scale


def settings(peak: Mapping[Key, int]) -> dict[str, dict[str, Callable[[], Scale]]]:
    """What each rival is tried with."""
    # Requests in the system per worker at its SLO's edge, from the table.
    full = {SMALL: 20.0, PREFILL: 2.0, DECODE: 50.0}

    def targets(part: float) -> dict[Key, float]:
        return {key: part * value for key, value in full.items()}

    hpa = {f"{p:g} of the edge": (lambda p=p: rivals.Hpa(targets(p))) for p in (0.3, 0.4, 0.5, 0.6,
           0.75)}  # fmt: skip
    keda = {
        f"{q:g} waiting, at least {part:g} of the peak": (
            lambda q=q, part=part: rivals.Keda(
                dict.fromkeys(POOLS, q), max(1, round(part * max(peak.values())))
            )
        )
        for q in (0.5, 1.0)
        for part in (0.5, 0.75, 1.0)
    }
    dynamo = {
        f"headroom {h:g}, load at {p:g} of the edge": (
            lambda h=h, p=p: rivals.Planner(h, targets(p))
        )
        for h in (1.0, 1.2)
        for p in (0.5, 0.75)
    }
    law = {f"{p:g} of the targets": (lambda p=p: rivals.SloLaw(p)) for p in (0.4, 0.5, 0.6, 0.75,
           1.0)}  # fmt: skip
    return {
        "HPA on requests per worker": hpa,
        "KEDA on waiting requests": keda,
        "planner as Dynamo's": dynamo,
        "SLO-aware law as llm-d's": law,
    }  # type: ignore[return-value]


def four_hours(rate: Rate, until_s: float) -> dict[str, float]:
    """Beginnings of the hours that are run request by request; day 0 is left out where it can."""
    first = 24 if until_s > 2 * DAY_S else 1
    hours = [3600.0 * h for h in range(first, int(until_s // 3600.0) - 1)]
    mean = {h: sum(rate(h + 60.0 * m) for m in range(60)) / 60.0 for h in hours}
    # The rates begin on a Monday morning in ServeGen's own clock; days 5 and 6 are the weekend.
    weekend = [h for h in hours if int(h // DAY_S) % 7 in (5, 6)] or hours
    return {
        "peak": max(hours, key=lambda h: mean[h]),
        "trough": min(hours, key=lambda h: mean[h]),
        "ramp": max(hours, key=lambda h: rate(h + 3600.0) - rate(h)),
        "weekend": sorted(weekend, key=lambda h: mean[h])[len(weekend) // 2],
    }


def two_weeks(days: float, *, by_request: bool = True) -> dict[str, Any]:
    prompts = traffic.prompts()
    routing = traffic.routing(prompts, cluster.FLOOR)
    tables = fitted(prompts)
    rate = traffic.between(traffic.servegen())
    study = TwoWeeks(prompts, routing, tables, rate, days)
    oracle, level = study.oracle()
    # What the dearest moment needs, and a tenth: it bounds waste, not need.
    study.budget = 1.1 * oracle.peak_usd_per_hour
    hours = four_hours(rate, study.until_s)
    rows: dict[str, dict[str, float]] = {}
    began = time.process_time()
    ours = study.replay(managed(study.budget), list(hours.values()) if by_request else ())
    ours_cpu_s = time.process_time() - began
    rows["tandem"] = ours.summary()
    agreement: dict[str, dict[str, float]] = {}

    def agree(name: str, tally: Tally) -> None:
        for label, at_s in hours.items():
            seen = study.hour(at_s)
            _, met, gpu_hours = tally.by_hour[int(at_s // 3600.0)]
            agreement[f"{name}, {label}"] = {
                "requests": seen["requests"],
                "slo_by_request": seen["slo"],
                "slo_by_table": met,
                "gpu_hours_by_request": seen["gpu_hours"],
                "gpu_hours_by_table": gpu_hours,
                "quality_ratio": seen["quality_ratio"],
            }

    if by_request:
        agree("tandem", ours)
    peak = {key: max(1, round(study.begin[key] * traffic.MOST / rate(0.0))) for key in POOLS}
    chosen = {}
    for name, makers in settings(peak).items():
        which, tally = study.best_of(makers)
        chosen[name] = which
        rows[name] = tally.summary()
    rows["oracle"] = oracle.summary()
    for row in rows.values():
        row["of_the_oracle"] = row["gpu_hours"] / rows["oracle"]["gpu_hours"]
    return {
        "days": days,
        "budget_usd_per_hour": study.budget,
        "oracle_level": level,
        "loop_cpu_ms_per_step": 1e3 * ours_cpu_s / (study.until_s / STEP_S),
        "settings": chosen,
        "loops": rows,
        "hours": agreement,
    }


RAMP_STARTUP_S = 100.0
RAMP = ((0.0, 2.0), (600.0, 2.0), (1500.0, 10.0), (2400.0, 10.0), (3300.0, 1.0), (4200.0, 1.0))


def ramp_rate(at_s: float) -> float:
    """2 -> 10 -> 1 requests/s: a quarter of an hour for each way."""
    return float(np.interp(at_s, [t for t, _ in RAMP], [r for _, r in RAMP]))


def ramp() -> dict[str, Any]:
    """Each loop on the ramp, request by request."""
    prompts = traffic.prompts()
    seeds = (3, 4, 5)
    layouts: dict[str, dict[Any, tuple[int, int]]] = {
        "unified": {"unified": (3, 8)},
        "prefill and decode apart": {"prefill": (1, 4), "decode": (2, 4)},
    }
    found = {}
    for layout, bounds in layouts.items():
        resources = cluster.resources(
            tiers=("one",), bounds=bounds, roles={"one": tuple(bounds)}
        )  # fmt: skip
        least = {("one", role): low for role, (low, _) in bounds.items()}
        loops: dict[str, Callable[[], Scale | None]] = {
            "tandem": lambda found=resources: (
                simulation_plan(  # type: ignore[misc]
                    found, {"one": cluster.PROFILES["one"]}, startup_s=RAMP_STARTUP_S
                ).scale
            ),
        }
        if layout == "unified":
            for part in (0.5, 0.6, 0.75):
                target = {("one", "unified"): part * 22.0}
                loops[f"HPA, {part:g} of the edge"] = lambda target=target: rivals.Hpa(target, 3, 8)  # type: ignore[misc]
            for part in (0.5, 0.75, 1.0):
                loops[f"SLO-aware law, {part:g} of the targets"] = (
                    lambda part=part: rivals.SloLaw(part, 3, 8)  # type: ignore[misc]
                )
        rows = {}
        for name, make in loops.items():
            met, pods = [], []
            for seed in seeds:
                made = cluster.plan(
                    resources, least, scale=make(), startup_s=RAMP_STARTUP_S, interval_s=5.0
                )
                arrivals = prompts.arrivals(ramp_rate, RAMP[-1][0], 10.0, seed=seed)
                simulation = Simulation(made, arrivals)
                simulation.run()
                held = sum(simulation.cluster.count_usage().pod_s.values())
                met.append(_judged(simulation)["slo"])
                pods.append(held / simulation.clock.now)
            rows[name] = {
                "slo": float(np.mean(met)),
                "worst_slo": min(met),
                "mean_replicas": float(np.mean(pods)),
            }
        found[layout] = rows
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", nargs="?", default="all", choices=["two-weeks", "ramp", "all"])
    parser.add_argument("--days", type=float, default=14.0)
    parser.add_argument("--no-requests", action="store_true", help="leave out the four hours")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    options = parser.parse_args()
    found: dict[str, Any] = {}
    if options.part != "ramp":
        found["two weeks"] = two_weeks(options.days, by_request=not options.no_requests)
        print(markdown({f"{options.days:g} days": found["two weeks"]["loops"]}))
        print(markdown({"four hours": found["two weeks"]["hours"]}))
        print({k: v for k, v in found["two weeks"].items() if k not in ("loops", "hours")})
    if options.part != "two-weeks":
        found["ramp"] = ramp()
        print(markdown(found["ramp"]))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
