"""Two providers that are right as often as a test says, a judge, and their configuration."""

from __future__ import annotations

from typing import Any

from tandem_router.testing.planted_quality import FakeJudge, PlantedProvider


class World:
    """Two providers and a judge behind a router."""

    def __init__(self, small: PlantedProvider, large: PlantedProvider, judge: FakeJudge) -> None:
        self.small, self.large, self.judge = small, large, judge

    def config(self, **learning: Any) -> dict[str, Any]:
        def tier(name: str, provider: PlantedProvider, usd: float) -> dict[str, Any]:
            return {
                "name": name,
                "served_model": f"{name}-model",
                "kind": "external",
                "url": f"{provider.url}/v1",
                "usd_per_1m_input_tokens": usd,
                "usd_per_1m_output_tokens": usd,
            }

        judge = {
            "type": "External",
            "url": f"{self.judge.url}/v1",
            "model": "judge",
            "usd_per_1m_input_tokens": 2.0,
            "usd_per_1m_output_tokens": 4.0,
            "timeout_s": 0.3,
        }
        return {
            "tiers": [tier("small", self.small, 1.0), tier("large", self.large, 10.0)],
            "threshold": 0.2,
            "learning": {"shadow_share": 1.0, "judge": judge, **learning},
        }
