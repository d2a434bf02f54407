"""A tier that comes to a router whose predictor has never seen it, with providers and a judge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from quality_world import World
from tandem_router.policy import PlainScore
from tandem_router.routing.new_tiers import ENOUGH
from tandem_router.routing.predictor_source import ArtifactPredictor
from tandem_router.testing.planted_quality import FakeJudge, PlantedProvider


class Trained(ArtifactPredictor):
    """Knows two tiers, and thinks the large one worth its price on every prompt."""

    known_tiers = ("small", "large")

    def __init__(self) -> None:
        super().__init__(Path("none"), ("small", "large"))

    def score(self, prompt: str) -> PlainScore:
        return PlainScore({"small": 0.4, "large": 0.9})


@pytest.mark.parametrize(("quality", "adopted"), [(0.92, True), (0.3, False)])
async def test_a_new_cheap_tier_is_adopted_within_100_requests_where_it_is_worth_it(
    run_router: Any, quality: float, adopted: bool
) -> None:
    small = await PlantedProvider(quality=lambda _: 0.4).start()
    large = await PlantedProvider(quality=lambda _: 0.9).start()
    mini = await PlantedProvider(quality=lambda _: quality).start()
    judge = await FakeJudge().start()
    config = World(small, large, judge).config(shadow_share=0.02, daily_usd=100.0)
    first, last = config["tiers"]
    cheap = {**first, "name": "mini", "served_model": "mini-model", "url": f"{mini.url}/v1"}
    cheap |= {"usd_per_1m_input_tokens": 0.1, "usd_per_1m_output_tokens": 0.1}
    config["tiers"] = [cheap, first, last]
    taken = []
    try:
        async with run_router({}, predictor=Trained(), **config) as (client, app):
            for number in range(160):
                reply = await client.chat(f"question {number}")
                taken.append(reply.headers["x-tandem-tier"])
                await app.services.learner.idle()
            state = (await client.get("/admin/state")).json
    finally:
        for server in (small, large, mini, judge):
            await server.stop()

    assert taken[:20] == ["large"] * 20
    assert ENOUGH <= state["learning"]["new_tiers"]["mini"] <= ENOUGH + 10
    assert ("mini" in taken[:100]) is adopted
    assert (taken[100:].count("mini") > 30) is adopted
    assert not state["quality"]["changes"]
