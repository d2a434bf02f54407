"""The floor as a running router holds it, under a loop that always asks for a cheaper threshold.

`FloorLimit` is the router's own: predicted at first, then certified or refuted by labels. What the
operator's loop asks for is clipped to it, so it may ask for anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
from outcomes import Outcomes

from policy_studies.floor import true_ratio
from policy_studies.streams import columns
from tandem_router.control import ShadowLabel
from tandem_router.control.floor_limit import MARGIN, FloorLimit

SHARE = 0.1  # shadowShare
#: Status shows two digits: less than half of the second is no violation there.
TOLERANCE = 0.005


def managed_run(
    outcomes: Outcomes, floor: float, asked: float | None, bias: float, num: int, seed: int
) -> dict[str, float]:
    rng = np.random.default_rng(seed)
    p, q = columns(outcomes, np.arange(len(outcomes)))
    p = np.clip(p + np.array([bias, 0.0]), 0.0, 1.0)
    gain = p[:, 1] - p[:, 0]
    known = rng.integers(0, len(gain), 200)
    training = [(float(gain[i]), float(p[i, 1])) for i in known]
    limit = FloorLimit(floor, 0.1, training, margin=MARGIN)

    @cache
    def ratio(threshold: float) -> float:
        return true_ratio(q, gain, threshold)

    below = {"Predicted": 0, "Certified": 0, "Refuted": 0}
    ever = dict.fromkeys(below, 0.0)
    large = 0
    for row in rng.integers(0, len(gain), num):
        in_force = round(limit.clip(asked), 4)
        large += gain[row] > in_force
        limit.observe(float(gain[row]), float(p[row, 1]))
        if rng.random() < SHARE:
            limit.learn(
                ShadowLabel(gain[row], q[row, 0], q[row, 1], 1.0, p[row, 0], p[row, 1]), in_force
            )
        if ratio(in_force) < floor - TOLERANCE:
            below[limit.basis] += 1
            ever[limit.basis] = 1.0
    return {
        "ever below, proven": max(ever["Certified"], ever["Refuted"]),
        "ever below, predicted": ever["Predicted"],
        "requests below": sum(below.values()) / num,
        "large share": large / num,
        "final ratio": ratio(round(limit.clip(asked), 4)),
    }


def managed_study(mmlu: Outcomes, gsm8k: Outcomes, seeds: Sequence[int]) -> dict[str, object]:
    result: dict[str, object] = {}
    for outcomes in (mmlu, gsm8k):
        for bias in (0.0, 0.05):
            for name, asked in (("nobody asks", None), ("the loop asks for .4", 0.4)):
                rows = [managed_run(outcomes, 0.95, asked, bias, 7000, seed) for seed in seeds]
                result[f"{outcomes.name}, bias {bias}, {name}"] = {
                    key: float(np.mean([row[key] for row in rows])) for key in rows[0]
                }
    return result
