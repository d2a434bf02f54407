"""Real runs of vLLM, request by request, against simulated ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fidelity.layers import DEVICES, LLAMA_8B, LayerTables, OtherDevice, TensorParallel
from tandem_operator.simulate.arrivals import Arrival
from tandem_operator.simulate.cluster import PoolPlan
from tandem_operator.simulate.engine import EngineSettings
from tandem_operator.simulate.front import TierPlan
from tandem_operator.simulate.simulation import Simulation, SimulationPlan

MEASURED = "perf_{device}_meta-llama/Llama-3.1-8B/bf16/tp1"

# As the runs' own metadata tell them: sequences, tokens a step, KV tokens, vLLM's blocks of 16.
ENGINES = {
    "RTXPRO6000": EngineSettings(128, 2048, kv_tokens=480_000, block_size=16),
    "RTX4090": EngineSettings(256, 2048, kv_tokens=41_408, block_size=16),
}


def all_runs(runs: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Every run, by the device's own layers where they were measured, else by the other's."""
    found = {}
    for device, engine in ENGINES.items():
        own = runs / MEASURED.format(device=device)
        model: LayerTables
        if own.is_dir():
            model = LayerTables(own, DEVICES[device])
        else:
            other = runs / MEASURED.format(device="RTXPRO6000")
            model = OtherDevice(other, DEVICES["RTXPRO6000"], DEVICES[device], LLAMA_8B)
        found[device] = compare(runs / device / "Llama-3.1-8B", model, engine)
    return found


def published(checkout: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Runs whose device's own layers LLMServingSim publishes, from a checkout of it.

    Qwen3-32B on two RTX PRO 6000 was looked at after everything else was settled; its link is the
    one of the run's own configuration.
    """
    layers = checkout / "profiler" / "perf"
    runs = checkout / "bench" / "examples"
    own = LayerTables(layers / "RTX4090/meta-llama/Llama-3.1-8B/bf16/tp1", DEVICES["RTX4090"])
    pair = TensorParallel(
        layers / "RTXPRO6000/Qwen/Qwen3-32B/bf16/tp2", DEVICES["RTXPRO6000"], num_layers=64,
        num_kv_heads=4, hidden_size=5120, link_bytes_per_s=16e9, link_latency_s=20e-6,
    )  # fmt: skip
    engine = EngineSettings(128, 2048, kv_tokens=400_000, block_size=16)
    return {
        "RTX4090, its own layers": compare(
            runs / "RTX4090/Llama-3.1-8B/vllm", own, ENGINES["RTX4090"]
        ),
        "two RTXPRO6000, Qwen3-32B": compare(runs / "RTXPRO6000/Qwen3-32B/vllm", pair, engine),
    }


def simulate(rows: Sequence[dict[str, Any]], model: Any, engine: EngineSettings) -> Simulation:
    """The requests of a run, sent to one simulated engine when the real one queued them."""
    began = min(row["queued_ts"] for row in rows)
    arrivals = [
        Arrival(row["queued_ts"] - began, row["input_toks"], {"": row["output_toks"]})
        for row in sorted(rows, key=lambda row: row["queued_ts"])
    ]
    pool = PoolPlan("t", "unified", 1, model, engine)
    simulation = Simulation(SimulationPlan((TierPlan("t"),), {pool.key: pool}), iter(arrivals))
    simulation.run()
    return simulation


def compare(folder: Path, model: Any, engine: EngineSettings) -> dict[str, dict[str, float]]:
    """Simulated over real, minus one: mean, p50, p90 and p99 of TTFT, TPOT and E2E."""
    with (folder / "requests.jsonl").open(encoding="utf-8") as f:
        rows = [json.loads(line) for line in f]
    out = simulate(rows, model, engine).outcomes
    assert len(out) == len(rows)
    real = {
        "ttft": [row["first_token_ts"] - row["queued_ts"] for row in rows],
        "tpot": [
            (row["last_token_ts"] - row["first_token_ts"]) / (row["output_toks"] - 1)
            for row in rows
            if row["output_toks"] > 1
        ],
        "e2e": [row["last_token_ts"] - row["queued_ts"] for row in rows],
    }
    simulated = {"ttft": out.ttft_s, "tpot": out.tpot_s, "e2e": out.e2e_s}
    return {name: _errors(real[name], simulated[name]) for name in real}


def _errors(real: Sequence[float], simulated: Sequence[float]) -> dict[str, float]:
    a, b = np.asarray(real), np.asarray(simulated)
    b = b[~np.isnan(b)]
    found = {"real_mean": float(a.mean()), "mean": float(b.mean() / a.mean() - 1.0)}
    for p in (50, 90, 99):
        found[f"p{p}"] = float(np.percentile(b, p) / np.percentile(a, p) - 1.0)
    return found
