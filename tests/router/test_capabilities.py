"""What a request needs is looked at before its tier is chosen."""

from __future__ import annotations

from typing import Any

import pytest

from tandem_router.balancing.worker import Load
from tandem_router.testing.fake_provider import FakeProvider
from tandem_router.testing.two_tiers import TIERS, Scores, both

TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
IMAGE = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]


@pytest.fixture
async def provider() -> Any:
    server = await FakeProvider().start()
    yield server
    await server.stop()


def beside(provider: Any, **capabilities: Any) -> list[dict[str, Any]]:
    able = {"capabilities": capabilities} if capabilities else {}
    return [TIERS[0], {**TIERS[1], "kind": "external", "url": f"{provider.url}/v1", **able}]


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [TOOL]},
        {"functions": [{"name": "f"}]},
        {"response_format": {"type": "json_schema", "json_schema": {}}},
        {"guided_json": {}, "guided_regex": "a"},
        {"messages": [{"role": "user", "content": IMAGE}]},
    ],
)
async def test_a_body_that_workers_cannot_serve_goes_to_the_provider_whatever_it_says(
    run_router: Any, make_worker: Any, provider: Any, fields: dict[str, Any]
) -> None:
    worker = await make_worker()

    async with run_router(
        {"small": {"unified": [worker]}}, tiers=beside(provider), predictor=Scores(0.9, 0.9)
    ) as (client, _):
        plain = await client.chat()
        needy = await client.chat(**fields)

    assert plain.headers["x-tandem-tier"] == "small"
    assert (needy.status, needy.headers["x-tandem-tier"]) == (200, "large")
    assert needy.headers["x-tandem-reason"] == "capability"
    assert len(worker.inference) == 1


async def test_tools_that_may_not_be_called_need_nothing(
    run_router: Any, make_worker: Any, provider: Any
) -> None:
    async with run_router(
        {"small": {"unified": [await make_worker()]}},
        tiers=beside(provider),
        predictor=Scores(0.9, 0.9),
    ) as (client, _):
        reply = await client.chat(tools=[TOOL], tool_choice="none")

    assert reply.headers["x-tandem-tier"] == "small"


async def test_where_no_tier_can_one_400_says_which_lacks_what(
    run_router: Any, make_worker: Any, provider: Any
) -> None:
    worker = await make_worker()

    async with run_router(
        {"small": {"unified": [worker]}}, tiers=beside(provider, tools=False, images=False)
    ) as (client, app):
        routed = await client.chat(tools=[TOOL])
        named = await client.chat(model="small", tools=[TOOL])

    assert (routed.status, named.status) == (400, 400)
    assert "'small' lacks tools; tier 'large' lacks tools" in routed.error["message"]
    assert named.error["message"].endswith("tier 'small' lacks tools")
    assert not worker.inference
    assert not provider.seen
    assert app.services.ledger.num_inflight == 0


async def test_a_worker_that_reports_tools_gets_them(run_router: Any, make_worker: Any) -> None:
    async with run_router(
        await both(make_worker), predictor=Scores(0.9, 0.9), background=False
    ) as (client, app):
        before = await client.chat(tools=[TOOL])
        for worker in app.picker.workers:
            app.picker.observed(worker, Load.parse({"capabilities": {"tools": True}}))
        after = await client.chat(tools=[TOOL])

    assert before.status == 400
    assert (after.status, after.headers["x-tandem-tier"]) == (200, "small")


async def test_a_long_prompt_prefers_the_tier_with_room_and_ids_above_every_context_are_refused(
    run_router: Any, make_worker: Any
) -> None:
    async with run_router(
        await both(make_worker), predictor=Scores(0.9, 0.9), background=False
    ) as (client, app):
        for worker in app.picker.workers:
            length = 100 if worker.tier == "small" else 1000
            app.picker.observed(worker, Load.parse({"max_model_len": length}))
        long = await client.chat("word " * 200, max_tokens=8)
        ids = {"model": "chat", "prompt": [7] * 2000}
        refused = await client.request("POST", "/v1/completions", ids)

    assert long.headers["x-tandem-tier"] == "large"
    assert refused.status == 400
    assert "room for 2000 tokens" in refused.error["message"]
    # The code and words by which clients fall back on a model with more room.
    assert refused.error["code"] == "context_length_exceeded"
    assert "this model's maximum context length is" in refused.error["message"]


async def test_token_ids_are_routed_like_the_text_they_stand_for(
    run_router: Any, make_worker: Any
) -> None:
    workers = [await make_worker() for _ in range(2)]
    for worker in workers:
        worker.detokenized = "a hard question"
    scores = Scores(0.2, 0.9)

    async with run_router(
        {"small": {"unified": workers[:1]}, "large": {"decode": workers[1:]}}, predictor=scores
    ) as (client, app):
        reply = await client.request(
            "POST", "/v1/completions", {"model": "chat", "prompt": [4, 8, 15]}
        )
        (record,) = app.services.decisions.last(1)

    assert reply.status == 200
    assert scores.prompts[-1] == "a hard question"
    assert record["gain"] == pytest.approx(0.7)
