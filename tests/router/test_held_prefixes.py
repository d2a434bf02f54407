"""A conversation stays at the tier that holds its prefix, and a row says why."""

from __future__ import annotations

import random
from typing import Any

from tandem_router.balancing.endpoint_picker import PROVIDER_KEEPS_S, Picker
from tandem_router.config import PickingConfig
from tandem_router.policy import PlainScore
from tandem_router.testing.two_tiers import both

LONG = "All that we have said so far, and it was long. " * 400  # 19 kB


class ByWord:
    """A predictor that sees a hard question once in a while."""

    def score(self, prompt: str) -> PlainScore:
        hard = "hard" in prompt.splitlines()[-1]
        return PlainScore({"small": 0.3 if hard else 0.88, "large": 0.93})


def turn(*said: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {
        "messages": [
            {"role": roles[number % 2], "content": text} for number, text in enumerate(said)
        ]
    }


async def test_a_conversation_stays_at_the_dear_tier_that_has_read_it(
    run_router: Any, make_worker: Any
) -> None:
    async with run_router(await both(make_worker), predictor=ByWord(), threshold=0.1) as (
        client,
        _,
    ):
        other = await client.chat(**turn("easy"))
        first = await client.chat(**turn(LONG + "\nhard"))
        second = await client.chat(**turn(LONG + "\nhard", "yes", "\neasy"))
        row = (await client.get(f"/admin/decisions/{second.headers['x-request-id']}")).json

    assert other.headers["x-tandem-tier"] == "small"
    assert first.headers["x-tandem-tier"] == "large"
    assert second.headers["x-tandem-tier"] == "large"
    assert second.headers["x-tandem-reason"] == "prefix"
    held = {tier["tier"]: tier["held_tokens"] for tier in row["tiers"]}
    assert held["small"] == 0
    assert held["large"] > 4000
    assert row["threshold"] < 0.05  # where 0.1 is asked of a new conversation


async def test_one_that_goes_on_elsewhere_is_held_there_then(
    run_router: Any, make_worker: Any
) -> None:
    async with run_router(await both(make_worker), predictor=ByWord(), threshold=0.1) as (
        client,
        _,
    ):
        first = await client.chat(**turn(LONG + "\neasy"))
        second = await client.chat(**turn(LONG + "\neasy", "yes", "\nhard"))
        third = await client.chat(**turn(LONG + "\neasy", "yes", "\nhard", "no", "\neasy"))

    assert [r.headers["x-tandem-tier"] for r in (first, second)] == ["small", "large"]
    # Both hold it now: what was read twice need not be read again anywhere.
    assert third.headers["x-tandem-reason"] == "sufficient"


def test_what_a_provider_has_seen_counts_for_some_minutes() -> None:
    now = [1000.0]
    picker = Picker(PickingConfig(), random.Random(1), lambda: now[0])
    picker.set_table({"far": {"unified": ("http://p:80",)}})
    chain = picker.chain(LONG.encode())
    pick = picker.pick("far", chain, 4_700.0, frozenset())
    assert pick is not None
    picker.finished(pick)

    at_once = picker.held_tokens("far", chain, by_provider=True)
    now[0] += PROVIDER_KEEPS_S + 1.0
    later = picker.held_tokens("far", chain, by_provider=True)

    assert at_once == picker.held_tokens("far", chain) > 4_000
    assert later == 0.0


def test_a_worker_that_is_away_holds_nothing() -> None:
    picker = Picker(PickingConfig(), random.Random(1), lambda: 1000.0)
    picker.set_table({"near": {"unified": ("http://w:80",)}})
    chain = picker.chain(LONG.encode())
    pick = picker.pick("near", chain, 4_700.0, frozenset())
    assert pick is not None
    pick.decode.draining = True

    assert picker.held_tokens("near", chain) == 0.0
