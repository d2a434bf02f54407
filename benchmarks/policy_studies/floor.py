"""Quality: how often a floor is broken at any time of a run, against the stated risk."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from outcomes import Outcomes

from policy_studies.streams import columns
from tandem_router.control import QualityFloor, ShadowLabel, ShadowSampler


def true_ratio(q: NDArray[np.float64], gain: NDArray[np.float64], threshold: float) -> float:
    return float(np.where(gain > threshold, q[:, 1], q[:, 0]).mean() / q[:, 1].mean())


def floor_run(
    outcomes: Outcomes, floor: float, risk: float, num_requests: int, seed: int
) -> dict[str, float]:
    """Requests drawn from the set with replacement; the set itself is the truth."""
    rng = np.random.default_rng(seed)
    controller = QualityFloor(floor, risk, smallest_probability=0.05)
    sampler = ShadowSampler(0.05, 0.25)
    p, q = columns(outcomes, np.arange(len(outcomes)))
    gain = p[:, 1] - p[:, 0]
    labels: list[tuple[float, float, float, float]] = []
    seen: set[float] = set()
    large = 0
    for row, uniform in zip(
        rng.integers(0, len(gain), num_requests), rng.random(num_requests), strict=True
    ):
        chosen = "large" if gain[row] > controller.threshold else "small"
        large += chosen == "large"
        plan = sampler.draw(uniform, chosen, "small", "large")
        if plan:
            controller.observe(
                ShadowLabel(gain[row], q[row, 0], q[row, 1], plan.probability, p[row, 0], p[row, 1])
            )
            labels.append((gain[row], q[row, 0], q[row, 1], 1.0 / plan.probability))
        seen.add(controller.threshold)
    # The plug-in rule on the same labels: highest threshold whose weighted mean meets the floor.
    data = np.array(labels)
    plug_in = -math.inf
    for threshold in controller.thresholds:
        routed = np.where(data[:, 0] > threshold, data[:, 2], data[:, 1])
        if (data[:, 3] * (routed - floor * data[:, 2])).sum() >= 0:
            plug_in = float(threshold)
    # Frozen: a calibration set of 500 labelled rows from the same data, never looked at again.
    rows = rng.integers(0, len(gain), 500)
    frozen_at = max(
        (t for t in controller.thresholds if true_ratio(q[rows], gain[rows], t) >= floor),
        default=-math.inf,
    )
    return {
        "violated_ever": float(any(true_ratio(q, gain, t) < floor for t in seen)),
        "large_share": large / num_requests,
        "final_large_share": float((gain > controller.threshold).mean()),
        "num_labels": float(controller.num_labels),
        "alarms": float(controller.num_alarms),
        "plug_in_violated": float(true_ratio(q, gain, plug_in) < floor),
        "frozen_violated": float(true_ratio(q, gain, frozen_at) < floor),
    }


def floor_study(mmlu: Outcomes, gsm8k: Outcomes, seeds: Sequence[int]) -> dict[str, object]:
    result: dict[str, object] = {}
    for outcomes in (mmlu, gsm8k):
        for floor in (0.95, 0.9):
            p, q = columns(outcomes, np.arange(len(outcomes)))
            gain = p[:, 1] - p[:, 0]
            grid = np.linspace(-0.4, 0.4, 81)
            best = max(t for t in grid if true_ratio(q, gain, t) >= floor)
            rows = [floor_run(outcomes, floor, 0.1, 7000, seed) for seed in seeds]
            mean = {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
            mean["oracle_large_share"] = float((gain > best).mean())
            result[f"{outcomes.name}, floor {floor}, risk 0.1"] = mean
    return result
