"""Deployments nobody measured: a decode step's time from those of other deployments.

aiconfigurator's table has TTFT and TPOT of disaggregated deployments, mostly of large mixtures of
experts, each at some concurrency. A row of a deployment is predicted from those of all others: the
logarithm of TPOT by ridge regression on what a step does per GPU (sequences, context), on how the
decode worker is cut (GPUs, experts, data parallel) and on model, system, engine and precision.
Deployments are never split between the rows that teach and those that are predicted.

Only rows that say how many workers there were can be predicted so: the others do not say how many
sequences a worker had.
"""

from __future__ import annotations

import csv
import math
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FOLDS = 10
RIDGE = 0.3
KINDS = ("model_path", "system", "backend", "precision")
RESULTS = ("id", "silicon_data_source", "silicon_ttft_ms", "silicon_tpot_ms")
LOADS = ("prefill_batch_size", "decode_batch_size")


def rows_of(table: Path) -> list[dict[str, str]]:
    """Disaggregated rows that say how many workers there were and how many requests at a time."""
    with table.open(newline="") as f:
        rows = [row for row in csv.DictReader(f) if row["mode"] == "disagg"]
    for row in rows:
        found = re.search(r"silicon_concurrency=(\d+)", row["silicon_data_source"])
        row["concurrency"] = found[1] if found else ""
    return [row for row in rows if row["decode_num_workers"] and row["concurrency"]]


def predicted(table: Path) -> dict[str, float]:
    """Relative errors of TPOT: median, mean and 90th percentile, of rows not learnt from."""
    rows = rows_of(table)
    features = [_features(row) for row in rows]
    names = sorted({name for each in features for name in each})
    x = np.array([[each.get(name, 0.0) for name in names] for each in features])
    spread = x.std(axis=0)
    x = (x - x.mean(axis=0)) / np.where(spread > 0.0, spread, 1.0)
    y = np.log([float(row["silicon_tpot_ms"]) for row in rows])
    errors = np.abs(np.exp(_out_of_fold(x, y, _folds(rows)) - y) - 1.0)
    return {
        "rows": len(rows),
        "deployments": len({_deployment(row) for row in rows}),
        "tpot_median": float(np.median(errors)),
        "tpot_mean": float(errors.mean()),
        "tpot_p90": float(np.percentile(errors, 90)),
    }


def _features(row: dict[str, str]) -> dict[str, float]:
    gpus = math.prod(
        float(row[f"decode_{name}"] or 1) for name in ("tp_size", "pp_size", "attention_dp_size")
    )
    sequences = float(row["concurrency"]) / float(row["decode_num_workers"])
    context = float(row["isl"]) + float(row["osl"]) / 2.0
    each, cut = math.log(sequences / gpus + 0.02), math.log(gpus)
    parallel = float(float(row["decode_attention_dp_size"] or 1) > 1)
    found = {
        "each": each,
        "each squared": each * each,
        "cut": cut,
        "each cut": each * cut,
        "context": math.log(context),
        "each context": each * math.log(context),
        "experts": math.log(float(row["decode_moe_ep_size"] or 1)),
        "parallel": parallel,
        "each parallel": parallel * each,
    }
    return found | {f"{kind} {row[kind]}": 1.0 for kind in KINDS}


def _deployment(row: dict[str, str]) -> tuple[Any, ...]:
    """Everything but the load and what was measured."""
    left_out = {*RESULTS, *LOADS, "concurrency"}
    return tuple(value for name, value in row.items() if name not in left_out)


def _folds(rows: list[dict[str, str]]) -> NDArray[Any]:
    fold: dict[tuple[Any, ...], int] = defaultdict(lambda: len(fold) % FOLDS)
    return np.array([fold[_deployment(row)] for row in rows])


def _out_of_fold(x: NDArray[Any], y: NDArray[Any], folds: NDArray[Any]) -> NDArray[Any]:
    found = np.zeros(len(y))
    for fold in range(FOLDS):
        taught, asked = folds != fold, folds == fold
        mean = y[taught].mean()
        a = x[taught]
        weights = np.linalg.solve(a.T @ a + RIDGE * np.eye(a.shape[1]), a.T @ (y[taught] - mean))
        found[asked] = x[asked] @ weights + mean
    return found
