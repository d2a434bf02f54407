"""No internal credential leaves for a provider, on any path that the router serves."""

from __future__ import annotations

from typing import Any

import pytest

from tandem_router.api.inference import INFERENCE, TOKENIZING
from tandem_router.testing.fake_provider import FakeProvider
from tandem_router.testing.two_tiers import TIERS

PEER_TOKEN = "peer-token-of-the-cluster"
CLIENT_KEY = "tdm-key-of-a-client"
MODELS = ("chat", "small", "large", "small-model", "large-model", None)
# Every path that takes a body; GET and admin paths are asked, too.
POSTED = [*INFERENCE, *sorted(TOKENIZING), "/v1/responses", "/v1/embeddings", "/v1/messages"]
READ = ["/v1/models", "/health", "/ready", "/metrics", "/admin/state", "/admin/decisions", "/"]


def served_paths(app: Any) -> set[str]:
    """What the control application routes, so that a new path cannot be forgotten here."""
    return {route.path for route in app.control.routes if hasattr(route, "path")}


@pytest.mark.parametrize("pools", [True, False])
async def test_a_provider_sees_no_header_of_ours_and_no_token_on_any_path(
    run_router: Any, make_worker: Any, pools: bool
) -> None:
    provider = await FakeProvider().start()
    tiers = [
        {**tier, "kind": "external", "url": f"{provider.url}/v1"}
        for tier in (TIERS[1:] if pools else TIERS)
    ]
    worker = await make_worker()
    table = {"small": {"unified": [worker]}} if pools else {}

    async with run_router(
        table, tiers=[*TIERS[:1], *tiers] if pools else tiers, peer_token=PEER_TOKEN
    ) as (client, app):
        for path in sorted({*READ, *served_paths(app)}):
            await client.get(path.replace("{request_id}", "x").replace("{path:path}", "x"))
        for path in POSTED:
            for model in MODELS:
                for stream in (False, True):
                    body = {
                        "prompt": [1, 2] if path == "/v1/completions" else "x",
                        "messages": [{"role": "user", "content": "x"}],
                        "input": "x",
                        "tokens": [1],
                        "stream": stream,
                        **({} if model is None else {"model": model}),
                    }
                    headers = {
                        "authorization": f"Bearer {CLIENT_KEY}",
                        "x-tandem-peer-token": PEER_TOKEN,
                        "cookie": CLIENT_KEY,
                    }
                    await client.request("POST", path, body, headers)
    await provider.stop()

    assert provider.seen
    assert {seen.path for seen in provider.seen} <= {"/v1/chat/completions", "/v1/completions"}
    for seen in provider.seen:
        assert not [name for name in seen.headers if name.startswith("x-tandem")]
        told = repr(seen.headers).encode() + seen.body
        assert PEER_TOKEN.encode() not in told
        assert CLIENT_KEY.encode() not in told


async def test_tokenizing_without_a_model_asks_a_pool_and_names_those_that_can(
    run_router: Any, make_worker: Any
) -> None:
    provider = await FakeProvider().start()
    tiers = [TIERS[0], {**TIERS[1], "kind": "external", "url": f"{provider.url}/v1"}]

    async with run_router({"small": {"unified": [await make_worker()]}}, tiers=tiers) as (
        client,
        _,
    ):
        anywhere = await client.request("POST", "/tokenize", {"prompt": "x"})
        named = await client.request("POST", "/tokenize", {"model": "large", "prompt": "x"})
    await provider.stop()

    assert anywhere.json["tokens"] == [1, 2]
    assert named.status == 404
    assert "tiers that have: small" in named.error["message"]
    assert not provider.seen
