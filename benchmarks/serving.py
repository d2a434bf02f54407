"""Which layout, order, chunk and choice of worker serves best, by the simulator.

    python benchmarks/serving.py [layout|order|chunks|picking|lengths|reject|all] [--json FILE]

Every comparison is made on one trace by the production scheduler, block manager and picker; what
differs is named in the row. `docs/studies/serving.md` says what follows.
"""

from __future__ import annotations

import argparse
import bisect
import csv
import functools
import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from outcomes import DATA, azure_arrivals, markdown

from tandem_operator.simulate.arrivals import Arrival, read_trace
from tandem_operator.simulate.cluster import PoolPlan, Role
from tandem_operator.simulate.engine import EngineSettings, SimulatedWorker
from tandem_operator.simulate.front import TierPlan
from tandem_operator.simulate.outcome import Targets
from tandem_operator.simulate.profiles import Profile
from tandem_operator.simulate.simulation import Simulation, SimulationPlan
from tandem_router.balancing.endpoint_picker import Picker
from tandem_router.balancing.worker import Load, Worker

# A 70B model on four training GPUs.
PROFILE = Profile((0.03, 1.5e-4, 1e-9), (0.025, 1.2e-7, 2.5e-4), 300_000)
ENGINE = EngineSettings(128, 2048, kv_tokens=300_000, prefix_cache=False)
TARGETS = Targets(2.0, 0.06)
NUM_REQUESTS = 800
Pairs = Sequence[tuple[int, int]]


def lengths(kind: str) -> Pairs:
    """(prompt, answer) of Azure's conversations or code."""
    _, prompt, answer = azure_arrivals(kind)
    return [(max(1, int(p)), max(1, int(a))) for p, a in zip(prompt, answer, strict=True)]


def poisson(rate: float, pairs: Pairs, seed: int = 0, count: int = NUM_REQUESTS
            ) -> Iterator[Arrival]:  # fmt: skip
    rng, now = random.Random(seed), 0.0
    for _ in range(count):
        now += rng.expovariate(rate)
        prompt, answer = rng.choice(pairs)
        yield Arrival(now, prompt, {"": answer})


def simulate(
    arrivals: Iterator[Arrival],
    roles: dict[Role, int],
    engine: EngineSettings = ENGINE,
    alter: Callable[[Simulation], None] | None = None,
    profile: Profile = PROFILE,
) -> dict[str, Any]:
    pools = [PoolPlan("t", role, count, profile, engine) for role, count in roles.items()]
    plan = SimulationPlan((TierPlan("t"),), {p.key: p for p in pools}, targets=TARGETS)
    simulation = Simulation(plan, arrivals)
    if alter is not None:
        alter(simulation)
    return simulation.run()


def goodput(attain: Callable[[float], float], low: float, high: float) -> float:
    """Highest rate at which 95 % of requests meet both targets, by bisection."""
    for _ in range(6):
        middle = (low + high) / 2.0
        if attain(middle) >= 0.95:
            low = middle
        else:
            high = middle
    return low


def layouts() -> dict[str, Any]:
    """Unified against every split of four workers, on long answers and on long prompts."""
    found: dict[str, Any] = {}
    choices: dict[str, dict[Role, int]] = {"4 unified": {"unified": 4}}
    for prefill in (1, 2, 3):
        choices[f"{prefill} prefill, {4 - prefill} decode"] = {
            "prefill": prefill,
            "decode": 4 - prefill,
        }
    choices["hybrid: 2 unified, 1 prefill, 1 decode"] = {"unified": 2, "prefill": 1, "decode": 1}
    for label, scale in (("TPOT 35 ms", 0.035), ("TPOT 60 ms", 0.06), ("TPOT 200 ms", 0.2)):
        rows: dict[str, dict[str, float]] = {}
        for name, roles in choices.items():
            rows[name] = {}
            for kind in ("conv", "code"):
                pairs = lengths(kind)

                def attain(rate: float, roles: Any = roles, pairs: Any = pairs, t: float = scale
                           ) -> float:  # fmt: skip
                    arrivals = poisson(rate, pairs, count=300)
                    result = _judged(arrivals, roles, Targets(2.0, t))
                    return float(result)

                rows[name][kind] = goodput(attain, 0.5, 16.0)
        found[f"requests/s at 95 % in time, TTFT 2 s, {label}"] = rows
    return found


def _judged(arrivals: Iterator[Arrival], roles: dict[Role, int], targets: Targets) -> float:
    pools = [PoolPlan("t", role, count, PROFILE, ENGINE) for role, count in roles.items()]
    plan = SimulationPlan((TierPlan("t"),), {p.key: p for p in pools}, targets=targets)
    return float(Simulation(plan, arrivals).run()["slo"]["both"])


def predicted_lengths(count: int, rate: float, how: str, seed: int = 0) -> Iterator[Arrival]:
    """Real answers with a real proxy's predicted class; prompts of Azure's conversations."""
    path = DATA / "traces" / "lengths" / "ssjf_predictions_warmup_multi_cls.csv"
    with path.open() as lines:
        rows = [
            (int(row["predicted_length"]), int(row["output_token_length"]))
            for row in csv.DictReader(lines)
        ]
    by_class = defaultdict(list)
    for predicted, true in rows:
        by_class[predicted].append(true)
    mean = {predicted: sum(found) / len(found) for predicted, found in by_class.items()}
    rng, now, pairs = random.Random(seed), 0.0, lengths("conv")
    for _ in range(count):
        now += rng.expovariate(rate)
        predicted, true = rng.choice(rows)
        expected = {
            "unknown": None,
            "proxy": max(1, round(mean[predicted])),
            "true": max(1, true),
        }[how]
        yield Arrival(now, rng.choice(pairs)[0], {"": max(1, true)}, expected_tokens=expected)


def orders() -> dict[str, Any]:
    """Orders of a worker's queue under load, and what predictions add."""
    found: dict[str, Any] = {}
    engine = replace(ENGINE, max_num_seqs=32)  # small batches: only then does anything wait
    for rate in (4.0, 6.0, 8.0):
        rows = {}
        for order, how in (("fcfs", "unknown"), ("sjf", "unknown"), ("sjf", "proxy"),
                           ("sjf", "true"), ("mlfq", "unknown")):  # fmt: skip
            result = simulate(
                predicted_lengths(NUM_REQUESTS, rate, how),
                {"unified": 2},
                replace(engine, order=order),  # type: ignore[arg-type]
            )
            rows[f"{order}, lengths {how}"] = _latencies(result)
        found[f"{rate:g} requests/s on two unified workers of 32 sequences"] = rows
    return found


def _latencies(result: dict[str, Any]) -> dict[str, float]:
    return {
        "mean TTFT s": result["ttft_s"]["mean"],
        "p99 TTFT s": result["ttft_s"]["p99"],
        "mean E2E s": result["e2e_s"]["mean"],
        "p99 E2E s": result["e2e_s"]["p99"],
        "p95 TPOT s": result["tpot_s"]["p95"],
        "in time": result["slo"]["both"],
    }


def chunks() -> dict[str, Any]:
    """Tokens per step against the time per token, one unified worker at four rates."""
    found: dict[str, Any] = {}
    pairs = lengths("conv")
    for rate in (1.0, 2.0, 3.0):
        rows = {}
        for budget in (128, 256, 512, 1024, 2048, 4096):
            engine = replace(ENGINE, max_batched_tokens=budget)
            result = simulate(poisson(rate * 2, pairs), {"unified": 2}, engine)
            step_s = PROFILE.step_s([(0, budget)], [1200] * 16)
            rows[f"{budget} tokens a step"] = {
                "a full step s": step_s,
                "p95 TTFT s": result["ttft_s"]["p95"],
                "p95 TPOT s": result["tpot_s"]["p95"],
                "p99 ITL s": result["itl_s"]["p99"],
                "in time": result["slo"]["both"],
            }
        found[f"{rate:g} requests/s a worker"] = rows
    return found


class _Considering(Picker):
    """Base of those that consider other workers than two by chance and the nearest."""

    def _drawn(
        self, workers: Sequence[Worker], chain: Sequence[int], now: float, *rest: Any
    ) -> list[Worker]:
        return self._candidates([worker for worker in workers if worker.usable(now)], chain)


class _Random(_Considering):
    """Any worker."""

    def _candidates(self, workers: list[Worker], chain: Sequence[int]) -> list[Worker]:
        return [self._rng.choice(workers)]


class _PrefixOnly(_Considering):
    """The worker with the longest covered prefix, whatever waits there."""

    def _candidates(self, workers: list[Worker], chain: Sequence[int]) -> list[Worker]:
        most = max(w.prefixes.num_covered(chain) for w in workers)
        return [self._rng.choice([w for w in workers if w.prefixes.num_covered(chain) == most])]


class _LoadOnly(Picker):
    """Power of two choices by load, no prefixes."""

    def pick(self, tier: str, chain: Sequence[int], *rest: Any, **named: Any) -> Any:
        return super().pick(tier, (), *rest, **named)


class _ByRequests(Picker):
    """As the default, but lengths are unknown: requests in flight are counted."""

    def observed(self, worker: Worker, load: Load) -> None:
        super().observed(worker, replace(load, expected_tokens=None))


class _LeastOfAll(_Considering):
    """The least loaded of all workers, not of two by chance."""

    def _candidates(self, workers: list[Worker], chain: Sequence[int]) -> list[Worker]:
        return workers


class _BatchedByLength(_Considering):
    """Answers of like length share a worker: workers stand in a row from short to long.

    Each takes an equal part of all work, by the length that is stated; the less loaded of the
    two next to the place takes the request.
    """

    place: Callable[[int], float]

    def pick(self, tier: str, chain: Sequence[int], *rest: Any, **named: Any) -> Any:
        self._at = self.place(named.get("expected_tokens") or 1)
        return super().pick(tier, chain, *rest, **named)

    def _candidates(self, workers: list[Worker], chain: Sequence[int]) -> list[Worker]:
        row = sorted(workers, key=lambda worker: worker.url)
        low = min(len(row) - 1, max(0, int(self._at * len(row) - 0.5)))
        return row[low : low + 2]


def batched_by(how: str) -> type[Picker]:
    """That picker, with equal parts of the work of such statements."""
    stated = sorted(
        (a.expected_tokens or 1, a.output_of("")) for a in predicted_lengths(4000, 1.0, how, seed=9)
    )
    known = [length for length, _ in stated]
    prompt, _ = _mean_lengths()
    _, b, c = PROFILE.decode
    work = [PROFILE.prefill[1] * prompt + n * (b * (prompt + n / 2) + c) for _, n in stated]
    total, done, parts = sum(work), 0.0, []
    for one in work:
        parts.append((done + one / 2) / total)
        done += one

    def place(length: int) -> float:
        # Statements that are alike, as of one class, are spread over all of their places.
        low, high = bisect.bisect_left(known, length), bisect.bisect_right(known, length)
        return parts[min(len(parts) - 1, rng.randrange(low, max(low + 1, high)))]

    rng = random.Random(5)
    return type("_Batched", (_BatchedByLength,), {"place": staticmethod(place)})


def with_picker(kind: type[Picker]) -> Callable[[Simulation], None]:
    """Puts another picker into a simulation before it begins."""

    def alter(simulation: Simulation) -> None:
        cluster = simulation.cluster
        config = simulation.plan.picking
        cluster.picker = kind(config, random.Random(1), simulation.clock)
        cluster._list()

    return alter


def picking() -> dict[str, Any]:
    """Choices of a worker on Mooncake's conversations, whose prompts share prefixes."""
    found: dict[str, Any] = {}
    path = DATA / "traces" / "mooncake" / "conversation_trace.jsonl"
    trace = [a for a, _ in zip(read_trace(path), range(500), strict=False)]
    profile = replace(PROFILE, prefill=(0.03, 2e-5, 5e-11), kv_tokens=2_000_000)
    engine = EngineSettings(128, 8192, kv_tokens=2_000_000, prefix_cache=True)
    for speed in (1.5,):
        faster = [replace(a, at_s=a.at_s / speed) for a in trace]
        rows = {}
        for name, kind in (("random", _Random), ("load only, two choices", _LoadOnly),
                           ("prefix only", _PrefixOnly), ("prefix and load", Picker)):  # fmt: skip
            result = simulate(iter(faster), {"unified": 8}, engine, with_picker(kind), profile)
            rows[name] = _latencies(result)
        found[f"Mooncake conversations at {speed:g} times their rate, 8 workers"] = rows
    return found


def by_length() -> dict[str, Any]:
    """Choices of a worker where answers are of very unequal length."""
    found: dict[str, Any] = {}
    for rate in (10.0, 14.0):
        rows = {}
        for name, kind, how in (
            ("random", _Random, "unknown"),
            ("requests in flight", _ByRequests, "unknown"),
            ("expected tokens, unknown lengths", Picker, "unknown"),
            ("expected tokens, proxy's lengths", Picker, "proxy"),
            ("expected tokens, true lengths", Picker, "true"),
            ("least of all workers, proxy's lengths", _LeastOfAll, "proxy"),
            ("batched by the proxy's lengths", batched_by("proxy"), "proxy"),
            ("batched by true lengths", batched_by("true"), "true"),
        ):
            arrivals = predicted_lengths(2 * NUM_REQUESTS, rate, how)
            rows[name] = _latencies(simulate(arrivals, {"unified": 8}, ENGINE, with_picker(kind)))
        found[f"answers of very unequal length, {rate:g} requests/s, 8 workers"] = rows
    return found


def rejection() -> dict[str, Any]:
    """Turning away on arrival what cannot meet its TTFT, under overload."""
    found: dict[str, Any] = {}
    pairs = lengths("conv")
    for rate in (8.0, 12.0, 16.0):
        rows = {}
        for name, refuses in (
            ("all are taken", None),
            ("refused by TTFT", _late_first),
            ("refused by TPOT", _late_next),
            ("refused by either", lambda *seen: _late_first(*seen) or _late_next(*seen)),
        ):
            result = simulate(
                poisson(rate, pairs, count=2 * NUM_REQUESTS),
                {"unified": 4},
                alter=None if refuses is None else _refusing(refuses),
            )
            rows[name] = {**_latencies(result), "taken": result["served"] / result["requests"]}
        found[f"{rate:g} requests/s on 4 unified workers"] = rows
    return found


def _late_first(worker: SimulatedWorker, prompt_tokens: int) -> bool:
    """Whether the queue and the own prompt take longer than the target here."""
    assert TARGETS.ttft_s is not None
    waits = worker.scheduler.num_pending_prefill_tokens + prompt_tokens
    # Steps that also decode take half as long again.
    return 1.5 * PROFILE.prefill[1] * waits > TARGETS.ttft_s


def _late_next(worker: SimulatedWorker, prompt_tokens: int) -> bool:
    """Whether one more answer makes the steps here longer than the target.

    While n answers of a mean length run, n prompts of a mean length are computed in their steps.
    """
    assert TARGETS.tpot_s is not None
    prompt, answer = _mean_lengths()
    number = worker.num_requests + 1
    a, b, c = PROFILE.decode
    step = max(a, PROFILE.prefill[0]) + number * (b * (prompt + answer / 2) + c)
    return step + number * PROFILE.prefill[1] * prompt / answer > TARGETS.tpot_s


@functools.cache
def _mean_lengths() -> tuple[float, float]:
    pairs = lengths("conv")
    return sum(p for p, _ in pairs) / len(pairs), sum(a for _, a in pairs) / len(pairs)


def _refusing(late: Callable[[SimulatedWorker, int], bool]) -> Callable[[Simulation], None]:
    """Refuse on arrival what would be late at every worker."""

    def alter(simulation: Simulation) -> None:
        cluster, submit = simulation.cluster, simulation._send

        def send(running: Any, until_s: float) -> None:
            prompt = running.arrival.prompt_tokens
            if all(late(pod.worker, prompt) for pod in cluster.pods.values()):
                simulation._give_up(rejected=True)
            else:
                submit(running, until_s)

        simulation._send = send  # type: ignore[method-assign]

    return alter


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "layout": layouts,
    "order": orders,
    "chunks": chunks,
    "picking": picking,
    "lengths": by_length,
    "reject": rejection,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", nargs="?", default="all", choices=[*PARTS, "all"])
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    options = parser.parse_args()
    found = {}
    for name, study in PARTS.items():
        if options.part in (name, "all"):
            found[name] = study()
            print(markdown(found[name]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
