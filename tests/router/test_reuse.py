"""Answers are reused only where they would come out the same, and never for a higher demand."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from tandem_router.policy import PlainScore
from tandem_router.testing.fake_provider import FakeProvider
from tandem_router.testing.fake_server import Seen
from tandem_router.testing.two_tiers import TIERS

CACHE = {"enabled": True, "max_bytes": 100_000}


@dataclass(eq=False)
class Thinking(FakeProvider):
    """more: what its messages and first deltas say besides text."""

    more: dict[str, Any] = field(default_factory=dict)

    def whole(self, seen: Seen) -> dict[str, Any]:
        reply = super().whole(seen)
        reply["choices"][0]["message"] |= self.more
        return reply

    def events(self) -> list[bytes]:
        first, *rest = super().events()
        return [first, self.chunk(self.more), *rest]


class Scores:
    def __init__(self, small: float, large: float) -> None:
        self.quality = {"small": small, "large": large}

    def score(self, prompt: str) -> PlainScore:
        return PlainScore(self.quality)


async def both(make_worker: Any) -> dict[str, Any]:
    return {"small": {"unified": [await make_worker()]}, "large": {"decode": [await make_worker()]}}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("second", [True, False])
async def test_a_repeated_request_is_answered_from_memory_in_either_form(
    run_router: Any, make_worker: Any, first: bool, second: bool
) -> None:
    table = await both(make_worker)
    options = {"include_usage": True}

    async with run_router(table, cache=CACHE, predictor=Scores(0.1, 0.9)) as (client, app):
        one = await client.chat("q", temperature=0, stream=first)
        two = await client.chat("q", temperature=0, stream=second, stream_options=options)
        record = app.services.decisions.last(1)[0]

    def text(reply: Any, stream: bool) -> str:
        return reply.text() if stream else reply.json["choices"][0]["message"]["content"]

    assert "x-tandem-cache" not in one.headers
    assert two.headers["x-tandem-cache"] == "hit"
    assert two.headers["x-tandem-reason"] == "cached"
    assert float(two.headers["x-tandem-cost-usd"]) == 0.0
    assert text(one, first) == text(two, second)
    assert len(table["large"]["decode"][0].inference) == 1
    usage = two.chunks[-1]["usage"] if second else two.json["usage"]
    assert usage["completion_tokens"] == 8
    assert record["cost_usd"] == 0.0
    assert record["cost_all_large_usd"] > 0.0


async def test_what_may_come_out_differently_is_asked_again(
    run_router: Any, make_worker: Any
) -> None:
    table = await both(make_worker)

    async with run_router(table, cache=CACHE) as (client, _):
        for fields in ({}, {"temperature": 0.7}, {"temperature": 0, "n": 2}):
            for _ in range(2):
                reply = await client.chat("q", model="large", **fields)
                assert "x-tandem-cache" not in reply.headers
        await client.chat("q", model="large", temperature=0)
        fresh = await client.chat(
            "q", model="large", temperature=0, headers={"cache-control": "no-cache"}
        )

    assert "x-tandem-cache" not in fresh.headers


async def test_a_small_answer_never_serves_who_demands_the_large_tier(
    run_router: Any, make_worker: Any
) -> None:
    table = await both(make_worker)
    demand = {"x-tandem-quality": "1.0"}

    async with run_router(table, cache=CACHE, predictor=Scores(0.8, 0.82)) as (client, _):
        small = await client.chat("q", temperature=0)
        demanded = await client.chat("q", temperature=0, headers=demand)
        again = await client.chat("q", temperature=0)

    assert small.headers["x-tandem-tier"] == "small"
    assert "x-tandem-cache" not in demanded.headers
    assert demanded.headers["x-tandem-tier"] == "large"
    # The better answer is kept and serves everybody from now on.
    assert again.headers["x-tandem-cache"] == "hit"
    assert again.headers["x-tandem-tier"] == "large"


async def test_a_stream_that_failed_over_is_asked_again_and_then_kept(
    run_router: Any, make_worker: Any
) -> None:
    cuts = [900]
    workers = [await make_worker(cut_after=cuts) for _ in range(2)]

    async with run_router({"large": {"decode": workers}}, cache=CACHE) as (client, _):
        replies = [
            await client.chat("q", model="large", temperature=0, seed=5, stream=True)
            for _ in range(3)
        ]

    assert ["x-tandem-cache" in reply.headers for reply in replies] == [False, False, True]
    assert len({reply.text() for reply in replies}) == 1


@pytest.mark.parametrize("more", ["reasoning_content", "reasoning", "refusal", "tool_calls"])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("second", [True, False])
async def test_what_is_more_than_text_is_not_kept(
    run_router: Any, more: str, first: bool, second: bool
) -> None:
    """Thoughts and calls came back as an answer without them."""
    call = {"index": 0, "id": "c", "type": "function", "function": {"name": "f", "arguments": ""}}
    provider = await Thinking(more={more: [call] if more == "tool_calls" else "because"}).start()
    tiers = [{**TIERS[1], "kind": "external", "url": f"{provider.url}/v1"}]

    async with run_router({}, cache=CACHE, tiers=tiers, background=False) as (client, _):
        one = await client.chat("q", temperature=0, stream=first)
        two = await client.chat("q", temperature=0, stream=second)
    await provider.stop()

    assert "x-tandem-cache" not in two.headers
    assert all(more.encode() in reply.body for reply in (one, two))


async def test_tenants_do_not_share_answers(run_router: Any, make_worker: Any) -> None:
    from tandem_router.api.api_keys import key_hash

    secret = b"0123456789abcdef"
    tenants = [{"name": n, "key_hashes": [key_hash(secret, n)]} for n in ("a", "b")]
    table = await both(make_worker)

    async with run_router(table, cache=CACHE, tenants=tenants, key_secret=secret) as (client, _):
        replies = [
            await client.chat("q", temperature=0, headers={"authorization": f"Bearer {name}"})
            for name in ("a", "b", "a")
        ]

    assert ["x-tandem-cache" in reply.headers for reply in replies] == [False, False, True]
