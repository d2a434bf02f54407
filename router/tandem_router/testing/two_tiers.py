"""Two tiers, their configuration, and a predictor that says what a test wants."""

from __future__ import annotations

from typing import Any

from tandem_router.policy import PlainScore

TIERS: list[dict[str, Any]] = [
    {
        "name": "small",
        "served_model": "small-model",
        "usd_per_1m_input_tokens": 1.0,
        "usd_per_1m_output_tokens": 2.0,
    },
    {
        "name": "large",
        "served_model": "large-model",
        "usd_per_1m_input_tokens": 10.0,
        "usd_per_1m_output_tokens": 20.0,
    },
]


class Scores:
    """A predictor that says the same for every prompt and remembers what it was asked."""

    def __init__(self, small: float, large: float) -> None:
        self.quality = {"small": small, "large": large}
        self.prompts: list[str] = []

    def score(self, prompt: str) -> PlainScore:
        self.prompts.append(prompt)
        return PlainScore(self.quality)


async def both(make_worker: Any) -> dict[str, Any]:
    return {"small": {"unified": [await make_worker()]}, "large": {"decode": [await make_worker()]}}


CONFIG: dict[str, Any] = {
    "name": "chat",
    "tiers": TIERS,
    "fallback_tier": "large",
    "failover": {"wait_s": 2.0, "tier_wait_s": 0.05},
    "picking": {"load_poll_s": 0.05},
}
