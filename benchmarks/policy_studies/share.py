"""Share: the worst window of 500 requests while traffic turns from mmlu to gsm8k."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from outcomes import Outcomes

from policy_studies.streams import TIERS, Stream, columns
from tandem_router.control import OnlineControl, ShareTracker
from tandem_router.policy import PolicySetPoints, PolicyState, decide


def share_stream(mmlu: Outcomes, gsm8k: Outcomes, seed: int, half: int = 4000) -> Stream:
    rng = np.random.default_rng(seed)
    a = columns(mmlu, rng.permutation(len(mmlu))[:half])
    b = columns(gsm8k, np.concatenate([rng.permutation(len(gsm8k)) for _ in range(6)])[:half])
    n = 2 * half
    ones = np.full(n, 400, dtype=np.int64)
    return Stream(
        np.arange(n, dtype=float),
        ones,
        ones,
        np.concatenate([a[0], b[0]]),
        np.concatenate([a[1], b[1]]),
        (100.0, 200.0, 400.0),
    )


def replay_share(stream: Stream, control: OnlineControl, target: float) -> dict[str, float]:
    state, large = PolicyState(), np.zeros(len(stream), dtype=bool)
    for i in range(len(stream)):
        decision = decide(stream.request(i), TIERS, control.set_points(stream.at_s[i]), state)
        control.decided(float(stream.at_s[i]), decision, 400)
        large[i] = decision.tier == "large"
    counts = np.concatenate([[0], np.cumsum(large)])
    windows = (counts[500:] - counts[:-500]) / 500
    half = len(stream) // 2
    return {
        "share_before": float(large[:half].mean()),
        "share_after": float(large[half:].mean()),
        "worst_window_points": float(100 * np.abs(windows - target).max()),
        "quality": float(np.where(large, stream.q[:, 1], stream.q[:, 0]).mean()),
    }


def geometric_quantile(target: float, gamma: float = 0.997) -> ShareTracker:
    """Forgetting alone: the quantile of recent gains (window of 1/(1-gamma)), no feedback."""
    window = round(1 / (1 - gamma))
    return ShareTracker(target, step=1e-9, slack=0.0, gentle_step=0.0, window=window)


def share_study(mmlu: Outcomes, gsm8k: Outcomes, seeds: Sequence[int]) -> dict[str, object]:
    result: dict[str, object] = {}
    for target in (0.3, 0.5):
        rows: dict[str, list[dict[str, float]]] = {}
        for seed in seeds:
            stream = share_stream(mmlu, gsm8k, seed)
            calibrated = float(np.quantile(mmlu.gain, 1 - target))
            ways = {
                "frozen threshold (RouteLLM's way)": OnlineControl(
                    PolicySetPoints(gain_threshold=calibrated)
                ),
                "forgetting quantile, no feedback": OnlineControl(
                    PolicySetPoints(), share=geometric_quantile(target)
                ),
                "ShareTracker": OnlineControl(
                    PolicySetPoints(),
                    share=ShareTracker(target, initial_threshold=calibrated),
                ),
            }
            for name, control in ways.items():
                rows.setdefault(name, []).append(replay_share(stream, control, target))
        result[f"target {target:.0%}"] = {
            name: {
                key: float(
                    (np.max if key.startswith("worst") else np.mean)([r[key] for r in list_])
                )
                for key in list_[0]
            }
            for name, list_ in rows.items()
        }
    return result
