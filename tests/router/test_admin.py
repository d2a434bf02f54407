"""What an operator of the router sees: decisions, set-points, metrics."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tandem_router.testing.two_tiers import Scores, both


async def test_decisions_hold_no_text_and_can_be_followed(
    run_router: Any, make_worker: Any
) -> None:
    async with run_router(await both(make_worker), predictor=Scores(0.2, 0.9)) as (client, _):
        first = await client.chat("a secret question", stream=True)
        await client.chat("another")
        everything = (await client.get("/admin/decisions")).json
        newer = (await client.get("/admin/decisions?after=1")).json
        one = (await client.get(f"/admin/decisions/{first.headers['x-request-id']}")).json
        missing = await client.get("/admin/decisions/nope")

    assert [record["sequence"] for record in everything["decisions"]] == [2, 1]
    assert [record["sequence"] for record in newer["decisions"]] == [2]
    assert one["ttft_s"] is not None
    assert one["gain"] == pytest.approx(0.7)
    assert missing.status == 404
    assert "secret" not in json.dumps(everything)


async def test_set_points_move_with_the_peer_token_only(run_router: Any, make_worker: Any) -> None:
    table = await both(make_worker)
    async with run_router(table, predictor=Scores(0.5, 0.7), threshold=0.1, peer_token="t") as (
        client,
        _,
    ):
        before = await client.chat()
        refused = await client.request("PUT", "/admin/set-points", {"gain_threshold": 0.5})
        unknown = await client.request(
            "PUT", "/admin/set-points", {"gain": 0.5}, {"x-tandem-peer-token": "t"}
        )
        moved = await client.request(
            "PUT",
            "/admin/set-points",
            b'{"gain_threshold": 0.5}',
            {"x-tandem-peer-token": "t", "content-type": "application/json"},
        )
        after = await client.chat()

    assert refused.status == 401
    assert unknown.status == 400
    assert moved.json["gain_threshold"] == 0.5
    assert before.headers["x-tandem-tier"] == "large"
    assert after.headers["x-tandem-tier"] == "small"


async def test_metrics_carry_the_prefix_and_count_what_happened(
    run_router: Any, make_worker: Any
) -> None:
    async with run_router(await both(make_worker), predictor=Scores(0.2, 0.9)) as (client, _):
        await client.chat(stream=True)
        await client.chat(model="small")
        text = (await client.get("/metrics")).body.decode()

    assert 'tandem_decisions_total{reason="gain",tier="large"} 1.0' in text
    assert 'tandem_requests_total{status="200",tier="small"} 1.0' in text
    assert 'tandem_ttft_seconds_count{tier="large"} 1.0' in text
    assert 'tandem_workers{role="decode",state="usable",tier="large"} 1.0' in text
    names = {line.split("{")[0].split(" ")[0] for line in text.splitlines() if line[0] != "#"}
    assert all(name.startswith("tandem_") for name in names)
