"""Change points: what forgetting is worth when the small tier, or the traffic, changes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from outcomes import Outcomes

from policy_studies.floor import true_ratio
from policy_studies.streams import columns
from tandem_router.control import QualityFloor, ShadowLabel, ShadowSampler, TrafficShift


def change_run(outcomes: Outcomes, way: str, seed: int, n: int = 16_000) -> dict[str, float]:
    """From half-way on the small tier silently gets 30 % of its good answers wrong."""
    rng = np.random.default_rng(seed)
    floor = 0.95
    controller = QualityFloor(floor, 0.1, smallest_probability=0.05, drift=way != "no forgetting")
    sampler = ShadowSampler(0.05, 0.25)
    p, q = columns(outcomes, np.arange(len(outcomes)))
    gain = p[:, 1] - p[:, 0]
    broken = rng.random(len(gain)) < 0.3
    q_after = np.stack([np.where(broken, 0.0, q[:, 0]), q[:, 1]], axis=1)
    frozen_at = max(t for t in controller.thresholds if true_ratio(q, gain, t) >= floor)
    rows, uniforms = rng.integers(0, len(gain), n), rng.random(n)
    routed, reference = np.zeros(n), np.zeros(n)
    alarm_at = math.nan
    for i, (row, uniform) in enumerate(zip(rows, uniforms, strict=True)):
        truth = q if i < n // 2 else q_after
        threshold = frozen_at if way == "frozen threshold" else controller.threshold
        chosen = "large" if gain[row] > threshold else "small"
        routed[i], reference[i] = truth[row, int(chosen == "large")], truth[row, 1]
        plan = sampler.draw(uniform, chosen, "small", "large")
        label = (
            None
            if plan is None
            else ShadowLabel(
                gain[row], truth[row, 0], truth[row, 1], plan.probability, p[row, 0], p[row, 1]
            )
        )
        alarmed = label is not None and controller.observe(label)
        if way == "QualityFloor" and alarmed and i >= n // 2 and math.isnan(alarm_at):
            alarm_at = i - n // 2
    after = slice(n // 2, n)
    last = slice(3 * n // 4, n)
    return {
        "ratio_before": routed[: n // 2].sum() / reference[: n // 2].sum(),
        "ratio_after": routed[after].sum() / reference[after].sum(),
        "ratio_last_quarter": routed[last].sum() / reference[last].sum(),
        "requests_to_alarm": alarm_at,
    }


def change_study(mmlu: Outcomes, gsm8k: Outcomes, seeds: Sequence[int]) -> dict[str, object]:
    result: dict[str, object] = {}
    for way in ("frozen threshold", "no forgetting", "QualityFloor"):
        rows = [change_run(mmlu, way, seed) for seed in seeds]
        result[way] = {
            key: float(np.mean([r[key] for r in rows if not math.isnan(r[key])] or [math.nan]))
            for key in rows[0]
        }
    detector_at = []
    for seed in seeds:
        stream, shift = _drift_stream(mmlu, gsm8k, seed), TrafficShift()
        at = [i for i in range(len(stream)) if shift.observe(stream[i][0], stream[i][1])]
        detector_at.append(([i for i in at if i < 3000], [i for i in at if i >= 3000]))
    result["TrafficShift mmlu to gsm8k at request 3000"] = {
        "false_alarms_per_run": float(np.mean([len(a) for a, _ in detector_at])),
        "requests_to_alarm": float(
            np.mean([b[0] - 3000 if b else math.nan for _, b in detector_at])
        ),
    }
    return result


def _drift_stream(mmlu: Outcomes, gsm8k: Outcomes, seed: int) -> list[tuple[float, float]]:
    rng = np.random.default_rng(seed)
    rows = []
    for outcomes, count in ((mmlu, 3000), (gsm8k, 1000)):
        picked = rng.integers(0, len(outcomes), count)
        rows += [
            (math.log1p(t), g)
            for t, g in zip(outcomes.prompt_tokens[picked], outcomes.gain[picked], strict=True)
        ]
    return rows
