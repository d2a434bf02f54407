"""LoRA adapters that vLLM workers have loaded are models of their tier."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from tandem_router.api.api_keys import key_hash
from tandem_router.engines.vllm import NAMES_EVERY_S, VLLMReader
from tandem_router.testing.two_tiers import TIERS
from vllm_kit import asker

SECRET = b"0123456789abcdef"
TWO_TIERS = [TIERS[0], {**TIERS[1], "engine": "VLLM"}]
POEMS = {"model": "poems", "messages": [{"role": "user", "content": "How?"}], "temperature": 0}


async def reported(app: Any) -> None:
    """Until every worker has said what it has loaded."""
    async with asyncio.timeout(5):
        while any(worker.load is None for worker in app.picker.workers):
            app.services.workers_changed.clear()
            await app.services.workers_changed.wait()


async def test_a_request_for_an_adapter_goes_to_the_workers_that_have_it(
    run_router: Callable[..., Any], make_vllm: Callable[..., Any]
) -> None:
    has_it, plain = await make_vllm("poems"), await make_vllm()
    table = {"large": {"unified": [plain, has_it]}}

    async with run_router(table, tiers=TWO_TIERS) as (client, app):
        await reported(app)
        replies = [await client.chat(**POEMS, stream=stream) for stream in (True, False) * 4]
        [record] = app.services.decisions.last(1)
        counted = app.services.metrics.render().decode()

    assert {reply.status for reply in replies} == {200}
    assert {reply.headers["x-tandem-tier"] for reply in replies} == {"large"}
    assert [order.json["model"] for order in has_it.orders] == ["poems"] * 8
    assert plain.orders == []
    # Its books are the tier's.
    assert (record["tier"], record["model"], record["reason"]) == ("large", "poems", "forced")
    assert "poems" not in counted


async def test_adapters_are_listed_and_an_unknown_one_is_answered_with_their_names(
    run_router: Callable[..., Any], make_vllm: Callable[..., Any]
) -> None:
    server = await make_vllm("poems", "sql")

    async with run_router({"large": {"unified": [server]}}, tiers=TWO_TIERS) as (client, app):
        await reported(app)
        listed = (await client.request("GET", "/v1/models")).json["data"]
        one = await client.request("GET", "/v1/models/poems")
        unknown = await client.chat(**{**POEMS, "model": "prose"})

    parents = {entry["id"]: entry.get("parent") for entry in listed}
    assert (parents["poems"], parents["sql"]) == ("large-model", "large-model")
    assert (one.status, one.json["parent"]) == (200, "large-model")
    assert (unknown.status, unknown.json["error"]["code"]) == (404, "model_not_found")
    assert "'prose' does not exist; use one of" in unknown.json["error"]["message"]
    assert unknown.json["error"]["message"].endswith(", poems, sql")


async def test_a_stream_of_an_adapter_goes_on_only_where_the_adapter_is(
    run_router: Callable[..., Any], make_vllm: Callable[..., Any]
) -> None:
    cuts: list[int | None] = [6]  # whoever is asked first dies
    servers = [await make_vllm("poems", cut_after=cuts) for _ in range(2)]
    plain = await make_vllm()

    async with run_router({"large": {"unified": [plain, *servers]}}, tiers=TWO_TIERS) as (
        client,
        app,
    ):
        await reported(app)
        alone = await client.chat(**POEMS, max_tokens=12)
        broken = await client.chat(**POEMS, max_tokens=12, stream=True)

    assert b"[DONE]" in broken.body
    assert broken.text() == alone.json["choices"][0]["message"]["content"]
    assert {order.json["model"] for s in servers for order in s.orders} == {"poems"}
    assert plain.orders == []


async def test_an_adapter_is_refused_to_a_tenant_that_may_not_use_its_tier(
    run_router: Callable[..., Any], make_vllm: Callable[..., Any]
) -> None:
    server = await make_vllm("poems")
    hashes = [key_hash(SECRET, "acme-key")]
    tenants = [{"name": "acme", "key_hashes": hashes, "allowed_tiers": ["small"]}]

    async with run_router(
        {"large": {"unified": [server]}}, tiers=TWO_TIERS, tenants=tenants, key_secret=SECRET
    ) as (client, app):
        await reported(app)
        reply = await client.chat(**POEMS, headers={"authorization": "Bearer acme-key"})

    assert reply.status == 403
    assert server.orders == []


async def test_an_adapter_named_as_a_tier_does_not_take_its_place(
    run_router: Callable[..., Any], make_vllm: Callable[..., Any]
) -> None:
    server = await make_vllm("small", "large")

    async with run_router({"large": {"unified": [server]}}, tiers=TWO_TIERS) as (client, app):
        await reported(app)
        listed = (await client.request("GET", "/v1/models")).json["data"]
        reply = await client.chat(**{**POEMS, "model": "large"})

    assert [entry["id"] for entry in listed].count("small") == 1
    assert reply.status == 200
    assert server.orders[-1].json["model"] == "large-model"


async def test_tokens_are_counted_by_the_server_of_the_adapter_under_its_name(
    run_router: Callable[..., Any], make_vllm: Callable[..., Any]
) -> None:
    has_it, plain = await make_vllm("poems"), await make_vllm()
    table = {"large": {"unified": [plain, has_it]}}

    async with run_router(table, tiers=TWO_TIERS, peer_token="secret") as (client, app):
        await reported(app)
        adapter = await client.request("POST", "/tokenize", {"model": "poems", "prompt": "abc"})
        tier = await client.request("POST", "/tokenize", {"model": "large", "prompt": "abc"})

    assert (adapter.status, adapter.json["count"]) == (200, 3)
    assert (tier.status, tier.json["count"]) == (200, 3)
    asked = [seen for seen in (*has_it.seen, *plain.seen) if seen.path == "/tokenize"]
    assert {seen.json["model"] for seen in asked} == {"poems", "large-model"}
    # A server that is not ours is told no token of ours.
    assert not any("x-tandem-peer-token" in seen.headers for seen in asked)


async def test_an_adapter_that_is_loaded_while_the_server_runs_is_found(
    make_vllm: Callable[..., Any],
) -> None:
    now = [0.0]
    server = await make_vllm()
    reader = VLLMReader("large-model", "unified", lambda: now[0], probe=False)
    said = [(await reader.read(asker(server)))["adapters"]]

    server.adapters = ("poems",)
    now[0] += NAMES_EVERY_S
    said.append((await reader.read(asker(server)))["adapters"])

    assert said == [[], ["poems"]]
