"""How far the simulator is from machines and from another simulator, and what it costs.

    python benchmarks/simulator.py [splitwise] [vllm] [deployments] [speed] [--json FILE]

splitwise: in compatibility mode, six runs of splitwise-sim, each percentile beside ours.
vllm: two real runs of vLLM 0.19 against simulated ones, whose step times come from measured layers
and data sheets, never from a run; with `--llmservingsim DIR` (a checkout) two more.
deployments: decode steps of disaggregated deployments, each predicted from other ones.
speed: Azure's conversations at 70 requests/s on 40 workers for two minutes, CPU time per request,
with the production policies (unified and split) and by splitwise-sim's rules; with `--splitwise-sim
DIR --python PYTHON` (a checkout, and an interpreter with its requirements) beside splitwise-sim
itself, in turn with ours.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

from fidelity import deployments, splitwise, splitwise_sim, vllm_runs

from tandem_operator.simulate.arrivals import generate, read_trace
from tandem_operator.simulate.cluster import PoolPlan
from tandem_operator.simulate.engine import EngineSettings
from tandem_operator.simulate.front import TierPlan
from tandem_operator.simulate.profiles import Profile
from tandem_operator.simulate.simulation import Simulation, SimulationPlan

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
PARTS = ("splitwise", "vllm", "deployments", "speed")
LAYOUTS = {"unified": {"unified": 40}, "split": {"prefill": 13, "decode": 27}}


class Speed:
    """CPU milliseconds per request of runs that take turns."""

    def __init__(self, data: Path, rate: float = 70.0) -> None:
        self._data, self._rate = data, rate
        trace = list(read_trace(data / "traces/azure2023/AzureLLMInferenceTrace_conv.csv"))
        self._lengths = {
            "prompt_tokens": [a.prompt_tokens for a in trace],
            "output_tokens": [a.output_of("") for a in trace],
        }

    def ours(self, roles: dict[str, int], scale: float = 1.0) -> float:
        """The production policies; load and workers both multiplied by scale."""
        profile = Profile((0.02, 1e-4, 1e-9), (0.025, 1e-7, 2e-4), kv_tokens=300_000)
        engine = EngineSettings(128, 2048, kv_tokens=300_000, prefix_cache=False)
        pools = [
            PoolPlan("t", role, round(scale * count), profile, engine)  # type: ignore[arg-type]
            for role, count in roles.items()
        ]
        plan = SimulationPlan((TierPlan("t"),), {p.key: p for p in pools})
        arrivals = generate(scale * self._rate, 120.0, 1, **self._lengths)
        simulation = Simulation(plan, arrivals)
        began = time.process_time()
        result = simulation.run()
        return 1e3 * (time.process_time() - began) / float(result["requests"])

    def compatible(self, run: str) -> float:
        """The same by splitwise-sim's rules."""
        times = splitwise.iteration_times(self._data)
        trace = splitwise.trace_of(self._data, run)
        began = time.process_time()
        found = splitwise.replay(times, trace, splitwise.RUNS[run])
        return 1e3 * (time.process_time() - began) / len(found["ttft"])

    def measure(self, rounds: int, theirs: splitwise_sim.Checkout | None) -> dict[str, Any]:
        """Medians over rounds in which everybody runs once."""
        rows: dict[str, list[float]] = {}

        def add(name: str, value: float) -> None:
            rows.setdefault(name, []).append(value)

        for _ in range(rounds):
            for name, roles in LAYOUTS.items():
                add(name, self.ours(roles))
            add("unified, a quarter of load and workers", self.ours(LAYOUTS["unified"], 0.25))
            add("splitwise-sim's rules", self.compatible("conv_baseH40_70"))
            if theirs is not None:
                add("splitwise-sim", theirs.cpu_ms_per_request(self._data, "conv_baseH40_70"))
        return {name: median(values) for name, values in rows.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", help=f"{', '.join(PARTS)}; all by default")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--runs", nargs="+", default=list(splitwise.RUNS), metavar="RUN")
    parser.add_argument("--llmservingsim", type=Path, metavar="DIR", help="a checkout, for vllm")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--splitwise-sim", type=Path, metavar="DIR")
    parser.add_argument("--python", type=Path, metavar="PYTHON")
    args = parser.parse_args()
    found: dict[str, Any] = {}
    parts = args.parts or PARTS
    if unknown := sorted(set(parts) - set(PARTS)):
        parser.error(f"{unknown[0]!r} is no part; parts are {', '.join(PARTS)}")
    if "splitwise" in parts:
        found["splitwise"] = {run: splitwise.compare(args.data, run) for run in args.runs}
    if "vllm" in parts:
        found["vllm"] = vllm_runs.all_runs(args.data / "perf" / "vllm_runs")
        if args.llmservingsim is not None:
            found["vllm_published"] = vllm_runs.published(args.llmservingsim)
    if "deployments" in parts:
        table = args.data / "perf" / "aiconfigurator" / "silicon_sample_dev.csv"
        found["deployments"] = deployments.predicted(table)
    if "speed" in parts:
        theirs = None
        if args.splitwise_sim is not None:
            theirs = splitwise_sim.Checkout(args.splitwise_sim, args.python)
        found["cpu_ms_per_request"] = Speed(args.data).measure(args.rounds, theirs)
    print(json.dumps(found, indent=1))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
