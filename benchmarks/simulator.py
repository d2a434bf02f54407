"""What the simulator costs and how far it is from a real engine.

    python benchmarks/simulator.py [--json FILE]

Speed: Azure's conversations at 70 requests/s on 40 workers for two minutes, CPU time per request,
unified and split. Fidelity: real runs of vLLM 0.19 (Llama-3.1-8B, 300 requests) against simulated
ones, whose step times come from measured layers, never from a run. On the RTX PRO 6000 they are
that device's own; for the RTX 4090 the same ones, longer by the ratio of memory bandwidths.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tandem_operator.simulate.arrivals import Arrival, generate, read_trace
from tandem_operator.simulate.cluster import PoolPlan
from tandem_operator.simulate.engine import EngineSettings
from tandem_operator.simulate.front import TierPlan
from tandem_operator.simulate.profiles import Profile
from tandem_operator.simulate.simulation import Simulation, SimulationPlan

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
RUNS = DATA / "perf" / "vllm_runs"
LAYERS = 32
BANDWIDTH_GB_S = {"RTXPRO6000": 1792.0, "RTX4090": 1008.0}
PER_LAYER = ("qkv_proj", "rotary_emb", "o_proj", "gate_up_proj", "act_fn", "down_proj")


def speed() -> dict[str, float]:
    """CPU milliseconds per request."""
    profile = Profile((0.02, 1e-4, 1e-9), (0.025, 1e-7, 2e-4), kv_tokens=300_000)
    engine = EngineSettings(128, 2048, kv_tokens=300_000, prefix_cache=False)
    trace = list(read_trace(DATA / "traces/azure2023/AzureLLMInferenceTrace_conv.csv"))
    lengths = {
        "prompt_tokens": [a.prompt_tokens for a in trace],
        "output_tokens": [a.output_of("") for a in trace],
    }
    layouts = {
        "unified": [("unified", 40)],
        "split": [("prefill", 13), ("decode", 27)],
    }
    found = {}
    for name, roles in layouts.items():
        pools = [PoolPlan("t", role, count, profile, engine) for role, count in roles]  # type: ignore[arg-type]
        plan = SimulationPlan((TierPlan("t"),), {p.key: p for p in pools})
        simulation = Simulation(plan, generate(70.0, 120.0, 1, **lengths))
        began = time.process_time()
        result = simulation.run()
        found[name] = 1e3 * (time.process_time() - began) / result["requests"]
    return found


class LayerProfile:
    """Step times from measured layers: dense ones by tokens, attention by what it reads."""

    def __init__(self, folder: Path, slower: float = 1.0) -> None:
        self._slower = slower
        self._dense: dict[str, tuple[list[float], list[float]]] = _table(folder / "dense.csv")
        self._last: dict[str, tuple[list[float], list[float]]] = _table(folder / "per_sequence.csv")
        rows = list(csv.DictReader((folder / "attention.csv").open()))
        grid: dict[tuple[float, float, float, float], float] = {}
        for row in rows:
            key = tuple(
                float(row[c]) for c in ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode")
            )
            grid[key] = float(row["time_us"])  # type: ignore[index]
        self._prefill = _pairs({(k[0], k[1]): v for k, v in grid.items() if k[2] == 0})
        self._decode = _pairs({(k[2], k[3]): v for k, v in grid.items() if k[0] == 0})

    def step_s(
        self, num_prefill_tokens: int, prefill_squares: float, num_decodes: int, decode_context: int
    ) -> float:
        tokens = num_prefill_tokens + num_decodes
        layer = sum(_at(self._dense[name], tokens) for name in PER_LAYER)
        layer += 2.0 * _at(self._dense["layernorm"], tokens)
        if num_prefill_tokens:
            start = max(0.0, (prefill_squares / num_prefill_tokens - num_prefill_tokens) / 2.0)
            layer += _bilinear(self._prefill, num_prefill_tokens, start)
        if num_decodes:
            layer += _bilinear(self._decode, num_decodes, decode_context / num_decodes)
        sequences = num_decodes + (1 if num_prefill_tokens else 0)
        ends = _at(self._dense["embedding"], tokens) + _at(self._dense["final_layernorm"], tokens)
        ends += sum(_at(table, sequences) for table in self._last.values())
        return self._slower * (LAYERS * layer + ends) / 1e6

    def decode_line(self, num_decodes: int, decode_context: int) -> None:
        return None


def _table(path: Path) -> dict[str, tuple[list[float], list[float]]]:
    rows: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in csv.reader(path.open()):
        if row[0] != "layer":
            rows[row[0]].append((float(row[1]), float(row[2])))
    return {
        name: ([x for x, _ in sorted(points)], [y for _, y in sorted(points)])
        for name, points in rows.items()
    }


def _at(table: tuple[list[float], list[float]], x: float) -> float:
    return float(np.interp(x, table[0], table[1]))


Grid = tuple[list[float], dict[float, tuple[list[float], list[float]]]]


def _pairs(points: dict[tuple[float, float], float]) -> Grid:
    rows: dict[float, list[tuple[float, float]]] = defaultdict(list)
    for (x, y), value in points.items():
        rows[x].append((y, value))
    tables = {x: tuple(map(list, zip(*sorted(r), strict=True))) for x, r in rows.items()}
    return sorted(tables), tables  # type: ignore[return-value]


def _bilinear(grid: Grid, x: float, y: float) -> float:
    keys, tables = grid
    index = min(max(bisect_right(keys, x), 1), len(keys) - 1)
    low, high = keys[index - 1], keys[index]
    part = min(1.0, max(0.0, (x - low) / (high - low)))
    return (1.0 - part) * _at(tables[low], y) + part * _at(tables[high], y)


def fidelity(
    device: str, engine: EngineSettings, slower: float = 1.0
) -> dict[str, dict[str, float]]:
    """Simulated over real, for mean and p99 of TTFT and TPOT."""
    rows = [json.loads(line) for line in (RUNS / f"{device}/Llama-3.1-8B/requests.jsonl").open()]
    rows.sort(key=lambda r: r["arrival_time"])
    began = rows[0]["arrival_time"]
    arrivals = [
        Arrival(r["arrival_time"] - began, r["input_toks"], {"": r["output_toks"]}) for r in rows
    ]
    folder = RUNS / "perf_RTXPRO6000_meta-llama/Llama-3.1-8B/bf16/tp1"
    model: Any = LayerProfile(folder, slower)
    model.link_latency_s = 0.0
    pool = PoolPlan("t", "unified", 1, model, engine)
    simulation = Simulation(SimulationPlan((TierPlan("t"),), {pool.key: pool}), iter(arrivals))
    simulation.run()
    out = simulation.outcomes
    real_ttft = [r["first_token_ts"] - r["queued_ts"] for r in rows]
    real_tpot = [
        (r["last_token_ts"] - r["first_token_ts"]) / (r["output_toks"] - 1)
        for r in rows
        if r["output_toks"] > 1
    ]
    return {
        "ttft_s": _compare(real_ttft, out.ttft_s),
        "tpot_s": _compare(real_tpot, [t for t in out.tpot_s if not math.isnan(t)]),
    }


def _compare(real: Sequence[float], simulated: Sequence[float]) -> dict[str, float]:
    a, b = np.asarray(real), np.asarray(simulated)
    return {
        "real_mean": float(a.mean()),
        "simulated_mean": float(b.mean()),
        "mean_error": float(b.mean() / a.mean() - 1.0),
        "p99_error": float(np.percentile(b, 99) / np.percentile(a, 99) - 1.0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    # Settings as the runs' own metadata tell them: sequences, tokens a step, KV tokens.
    found = {
        "cpu_ms_per_request": speed(),
        "vllm_rtxpro6000": fidelity(
            "RTXPRO6000", EngineSettings(128, 2048, kv_tokens=500_000, prefix_cache=False)
        ),
        "vllm_rtx4090": fidelity(
            "RTX4090",
            EngineSettings(256, 2048, kv_tokens=41_408, prefix_cache=False),
            BANDWIDTH_GB_S["RTXPRO6000"] / BANDWIDTH_GB_S["RTX4090"],
        ),
    }
    print(json.dumps(found, indent=1))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
