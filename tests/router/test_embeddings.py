"""/v1/embeddings: by the tier that can, never by another, and paid by what is read."""

from __future__ import annotations

from typing import Any

import pytest

from tandem_router.testing.fake_provider import FakeProvider, Fault
from tandem_router.testing.fake_server import plain_reply
from tandem_router.testing.two_tiers import TIERS

VECTORS = {"embeddings": True, "generation": False}


@pytest.fixture
async def provider() -> Any:
    server = await FakeProvider().start()
    yield server
    await server.stop()


def beside(provider: Any, name: str = "vectors", **capabilities: Any) -> dict[str, Any]:
    return {
        "name": name,
        "served_model": f"{name}-model",
        "kind": "external",
        "url": f"{provider.url}/v1",
        "usd_per_1m_input_tokens": 2.0,
        "usd_per_1m_output_tokens": 0.0,
        "capabilities": {**VECTORS, **capabilities},
    }


async def embed(client: Any, text: Any = "some text", **fields: Any) -> Any:
    return await client.request(
        "POST", "/v1/embeddings", {"model": "chat", "input": text, **fields}
    )


async def test_the_tier_that_can_embeds_and_its_input_tokens_are_paid(
    run_router: Any, make_worker: Any, provider: Any
) -> None:
    table = {"large": {"unified": [await make_worker()]}}

    async with run_router(table, tiers=[*TIERS, beside(provider)]) as (client, app):
        reply = await embed(client, ["ab", "cde"])

        assert reply.status == 200
        assert [entry["index"] for entry in reply.json["data"]] == [0, 1]
        assert reply.headers["x-tandem-tier"] == "vectors"
        assert float(reply.headers["x-tandem-cost-usd"]) == pytest.approx(5 * 2e-6)
        (record,) = app.services.decisions.last(1)
        assert (record["kind"], record["prompt_tokens"], record["output_tokens"]) == (
            "embeddings",
            5,
            0,
        )
    sent = provider.seen[0]
    assert (sent.path, sent.json["model"]) == ("/v1/embeddings", "vectors-model")
    assert "max_tokens" not in sent.json


async def test_a_worker_that_says_so_embeds(
    run_router: Any, make_worker: Any, reported: Any
) -> None:
    worker = await make_worker(capabilities=VECTORS)

    async with run_router({"small": {"unified": [worker]}}) as (client, app):
        await reported(app)
        ids = await embed(client, [1, 2, 3], model="small", encoding_format="base64")
        texts = await embed(client)

    assert (ids.status, texts.status) == (200, 200)
    assert isinstance(ids.json["data"][0]["embedding"], str)
    assert worker.inference[0].headers["x-request-id"] == ids.headers["x-request-id"]


async def test_a_tier_that_only_embeds_is_no_choice_for_a_chat(
    run_router: Any, provider: Any
) -> None:
    """Cheap as it is: neither routed to, nor when all else fails."""
    broken = await FakeProvider(always=Fault.STATUS_401).start()
    chats = {"kind": "external", "url": f"{broken.url}/v1"}
    tiers = [*({**tier, **chats} for tier in TIERS), beside(provider)]

    async with run_router({}, tiers=tiers) as (client, _):
        routed = await client.chat()
        named = await client.chat(model="vectors")
    await broken.stop()

    assert routed.status == 502
    assert (named.status, named.error["code"]) == (400, "unsupported_by_tier")
    assert "tier 'vectors' lacks generation" in named.error["message"]
    assert provider.seen == []


async def test_where_several_tiers_embed_the_client_names_one(
    run_router: Any, provider: Any
) -> None:
    tiers = [*TIERS, beside(provider, "one"), beside(provider, "two")]

    async with run_router({}, tiers=tiers) as (client, _):
        routed = await embed(client)
        named = await embed(client, model="two")

    assert (routed.status, routed.error["code"]) == (400, "ambiguous_model")
    assert "tiers one, two embed" in routed.error["message"]
    assert named.headers["x-tandem-tier"] == "two"


async def test_no_tier_that_embeds_is_a_400_that_says_so(run_router: Any, make_worker: Any) -> None:
    async with run_router({"small": {"unified": [await make_worker()]}}) as (client, _):
        routed, named = await embed(client), await embed(client, model="small")

    assert "no tier embeds now" in routed.error["message"]
    assert "tier 'small' lacks embeddings" in named.error["message"]


async def test_vectors_of_another_model_never_stand_in(run_router: Any, provider: Any) -> None:
    other = await FakeProvider().start()
    provider.always = Fault.STATUS_401
    tiers = [*TIERS, beside(provider), {**beside(other, "two")}]

    async with run_router({}, tiers=tiers) as (client, _):
        reply = await embed(client, model="vectors")
    await other.stop()

    assert reply.status == 502
    assert other.seen == []


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"input": []}, "`input`"),
        ({"input": ""}, "`input`"),
        ({"input": [["a"]]}, "`input[0][0]`"),
        ({"input": ["a"] * 3}, "`input` has 3 parts"),
        ({"stream": True}, "not streamed"),
        ({"encoding_format": "int8"}, "`encoding_format`"),
        ({"dimensions": 0}, "`dimensions`"),
        ({"input": 7}, "`input`"),
    ],
)
async def test_what_is_no_input_is_refused_by_name(
    run_router: Any, fields: dict[str, Any], said: str
) -> None:
    async with run_router({}, limits={"max_embedding_inputs": 2}) as (client, _):
        body = {"model": "chat", "input": "a", **fields}
        reply = await client.request("POST", "/v1/embeddings", body)

    assert reply.status == 400
    assert said in reply.error["message"]


@pytest.mark.parametrize(
    "body",
    [
        *(b"<html>", b"{}", b'{"data": []}', b'{"data": [{"index": 0}]}'),
        *(b'"<script>alert(1)</script>"', b"[]"),
    ],
)
async def test_a_reply_without_vectors_is_not_passed_on(
    run_router: Any, provider: Any, body: bytes
) -> None:
    async def answer(seen: Any, writer: Any) -> bool:
        return await plain_reply(writer, 200, {}, body, "text/html")

    provider.answer = answer
    async with run_router({}, tiers=[*TIERS, beside(provider)]) as (client, _):
        reply = await embed(client)

    assert reply.status == 502
    assert reply.headers["content-type"] == "application/json"
