"""A ceiling is an upper bound: answers are shortened to it, and everything used is booked."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem_router.limits.prices import Prices
from tandem_router.openai.prompt_size import image_tokens, prompt_tokens
from tandem_router.openai.request import with_max_tokens
from tandem_router.openai.usage import read_usage
from tandem_router.policy import (
    Overrides,
    PolicySetPoints,
    RouteRequest,
    TenantCeilings,
    TierOption,
    decide,
)
from tandem_router.testing.fake_server import (
    FakeServer,
    Seen,
    begin_stream,
    plain_reply,
    write_chunk,
)

WORD = "word "


@dataclass(eq=False)
class Provider(FakeServer):
    """An OpenAI-compatible provider: says `num_words` words, at most max_tokens of them.

    usage: what it reports, computed when absent; None: nothing. cut_after: words of the next
    streams after which the connection is reset. cut_whole: how many whole replies are reset.
    """

    num_words: int = 2000
    usage: Any = "true"
    cut_after: list[int | None] = field(default_factory=list)
    cut_whole: int = 0
    hang: bool = False

    async def answer(self, seen: Seen, writer: asyncio.StreamWriter) -> bool:
        body = seen.json
        bound = body.get("max_tokens", body.get("max_completion_tokens"))
        words = min(self.num_words, bound if bound is not None else self.num_words)
        usage = {"prompt_tokens": 5, "completion_tokens": words} if self.usage == "true" else None
        usage = self.usage if self.usage != "true" else usage
        if not body.get("stream"):
            if self.hang:
                await asyncio.Event().wait()
            if self.cut_whole:
                self.cut_whole -= 1
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 900\r\n\r\nhalf")
                await writer.drain()
                return False
            message = {"role": "assistant", "content": WORD * words}
            reply = {"choices": [{"index": 0, "message": message}], "usage": usage}
            return await plain_reply(writer, 200, {}, json.dumps(reply).encode())
        await begin_stream(writer)
        cut = self.cut_after.pop(0) if self.cut_after else None
        for number in range(words):
            if cut is not None and number == cut:
                return False
            chunk = {"choices": [{"index": 0, "delta": {"content": WORD}}]}
            await write_chunk(writer, b"data: " + json.dumps(chunk).encode() + b"\n\n")
            if self.hang and number >= 30:
                await asyncio.Event().wait()
        last = {"choices": [], "usage": usage}
        await write_chunk(writer, b"data: " + json.dumps(last).encode() + b"\n\n")
        await write_chunk(writer, b"data: [DONE]\n\n")
        await write_chunk(writer, b"")
        return True


def tier(provider: Provider, **more: Any) -> dict[str, Any]:
    return {
        "name": "big",
        "served_model": "big-model",
        "kind": "external",
        "url": f"{provider.url}/v1",
        "usd_per_1m_input_tokens": 5.0,
        "usd_per_1m_output_tokens": 15.0,
        **more,
    }


def options(provider: Provider, **more: Any) -> dict[str, Any]:
    return {"tiers": [tier(provider)], "fallback_tier": "big", **more}


@pytest.fixture
async def provider() -> Any:
    found = await Provider().start()
    yield found
    await found.stop()


# What is forwarded.


async def test_a_small_budget_shortens_the_answer_and_is_never_exceeded(
    run_router: Any, provider: Provider
) -> None:
    """$0.24/h holds one cent at first: a 2,000-token answer at $15 a million would be three."""
    config = options(provider, budget={"usd_per_hour": 0.24})
    async with run_router({}, **config) as (client, app):
        replies = [await client.chat(max_tokens=2000) for _ in range(3)]
        ledger, now = app.services.ledger, app.services.clock()

    first = replies[0]
    assert first.status == 200
    forwarded = provider.inference[0].json["max_tokens"]
    assert forwarded < 2000
    assert first.headers["x-tandem-max-tokens"] == str(forwarded)
    assert ledger.budget.balance(now) >= 0.0
    assert replies[-1].status == 429
    assert "the budget has" in replies[-1].error["message"]
    assert 1 < int(replies[-1].headers["retry-after"]) < 3600


async def test_a_ceiling_of_a_request_and_of_a_tenant_shortens_too(
    run_router: Any, provider: Provider
) -> None:
    async with run_router({}, **options(provider)) as (client, _):
        free = await client.chat()
        capped = await client.chat(headers={"x-tandem-max-cost-usd": "0.003"})
        refused = await client.chat(headers={"x-tandem-max-cost-usd": "0.0003"})

    assert "x-tandem-max-tokens" not in free.headers
    assert "max_tokens" not in provider.inference[0].json
    forwarded = provider.inference[1].json["max_tokens"]
    assert 150 < forwarded < 200
    assert float(capped.headers["x-tandem-cost-usd"]) <= 0.003
    assert refused.status == 400
    assert "x-tandem-max-cost-usd allows 0.0003 USD" in refused.error["message"]


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
async def test_a_provider_gets_the_bound_under_the_name_that_it_reads(
    run_router: Any, provider: Provider, field: str
) -> None:
    big = {"tiers": [tier(provider, max_tokens_field=field)]}
    async with run_router({}, **{**options(provider), **big}) as (client, _):
        await client.chat(headers={"x-tandem-max-cost-usd": "0.003"})

    assert [name for name in provider.inference[0].json if name.startswith("max_")] == [field]


async def test_a_tenant_is_told_which_tiers_it_may_use(run_router: Any, provider: Provider) -> None:
    small = tier(provider, name="tiny", served_model="tiny-model")
    config = {
        "tiers": [small, tier(provider)],
        "fallback_tier": "big",
        "tenants": [{"name": "team-b", "allowed_tiers": ["tiny"]}],
    }
    async with run_router({}, **config) as (client, app):
        key, stored = app.keys.mint("team-b")
        await app.services.store.put_key(stored)
        refused = await client.chat(model="big", headers={"authorization": f"Bearer {key}"})

    assert refused.status == 403
    assert refused.error["message"] == "tenant 'team-b' may not use tier 'big'; allowed: tiny"


async def test_a_budget_that_workers_use_up_says_so_and_names_no_time(
    run_router: Any, provider: Provider
) -> None:
    async with run_router({}, **options(provider, budget={"usd_per_hour": 0})) as (client, _):
        refused = await client.chat()

    assert refused.status == 429
    assert (
        "workers use the whole budget, none is left for external tier 'big'"
        in (refused.error["message"])
    )
    assert "retry-after" not in refused.headers
    assert refused.headers["x-should-retry"] == "false"


async def test_a_budget_too_small_for_a_usual_answer_says_when_a_short_one_can_be_had(
    run_router: Any, provider: Provider
) -> None:
    """Five minutes of two cents an hour never pay 512 tokens; they pay 16 soon."""
    async with run_router({}, **options(provider, budget={"usd_per_hour": 0.02})) as (client, _):
        short = await client.chat()
        refused = await client.chat()

    assert short.status == 200
    assert refused.status == 429
    wait_s = int(refused.headers["retry-after"])
    assert 1 < wait_s < 200
    assert refused.error["message"].endswith(f"raise budget.usdPerHour; or retry in {wait_s} s")
    assert "x-should-retry" not in refused.headers


def test_the_clients_own_name_of_the_bound_is_kept() -> None:
    newer = with_max_tokens("chat", {"max_completion_tokens": 9}, 5, "max_tokens")
    unsaid = with_max_tokens("chat", {}, 5, "max_completion_tokens")
    plain = with_max_tokens("completions", {}, 5, "max_completion_tokens")

    assert newer == {"max_completion_tokens": 5}
    assert unsaid == {"max_completion_tokens": 5}
    assert plain == {"max_tokens": 5}


usd = st.floats(0.0, 0.2)


@given(
    prices=st.tuples(st.floats(0, 50), st.floats(0, 100)),
    prompt=st.integers(1, 20_000),
    choices=st.integers(1, 8),
    max_tokens=st.none() | st.integers(0, 100_000),
    ceilings=st.tuples(*(st.none() | usd for _ in range(4))),
)
def test_no_answer_that_is_let_through_can_cost_more_than_any_ceiling(
    prices: tuple[float, float],
    prompt: int,
    choices: int,
    max_tokens: int | None,
    ceilings: tuple[float | None, ...],
) -> None:
    header, per_request, tenant, budget = ceilings
    request = RouteRequest(
        prompt,
        max_tokens=max_tokens,
        num_choices=choices,
        overrides=Overrides(max_cost_usd=header),
        tenant=TenantCeilings(max_cost_usd=per_request, remaining_usd=tenant),
    )
    option = TierOption("t", usd_per_1m_input_tokens=prices[0], usd_per_1m_output_tokens=prices[1])

    decision = decide(request, [option], PolicySetPoints(budget_remaining_usd=budget))

    said = [each for each in ceilings if each is not None]
    if decision.tier is None or not said:
        return
    bound = decision.max_tokens if decision.max_tokens is not None else max_tokens
    assert bound is not None
    assert max_tokens is None or bound <= max_tokens
    worst = (prompt * prices[0] + choices * bound * prices[1]) / 1e6
    assert worst <= min(said) * (1 + 1e-9) + 1e-12
    assert worst == pytest.approx(decision.reserve_cost_usd)


# What is booked.


@pytest.mark.parametrize(
    ("usage", "booked"),
    [
        (None, (None, 250)),
        ({"prompt_tokens": 7.0, "completion_tokens": 500.0}, (7, 500)),
        ({"prompt_tokens": 7, "completion_tokens": "many"}, (7, 250)),
        ({"prompt_tokens": -1, "completion_tokens": 3}, (None, 3)),
        ({"prompt_tokens": 7, "total_tokens": 27}, (7, 20)),
        ([1], (None, 250)),
        ({"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}, (None, 250)),
        ({"prompt_tokens": 7, "completion_tokens": 0}, (7, 250)),
        ({"prompt_tokens": 7, "completion_tokens": 9, "total_tokens": 716}, (7, 709)),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_usage_that_is_missing_or_senseless_is_estimated(
    run_router: Any, provider: Provider, usage: Any, booked: tuple[int | None, int], stream: bool
) -> None:
    provider.usage, provider.num_words = usage, 200

    async with run_router({}, **options(provider)) as (client, app):
        await client.chat(stream=stream)
        record = next(iter(app.services.decisions.records()))

    prompt, output = booked
    assert record.prompt_tokens == (prompt if prompt is not None else record.prompt_tokens)
    assert record.prompt_tokens > 0
    # Five characters a word; a stream counts each event up.
    assert output <= record.output_tokens <= 2 * output
    assert record.cost_usd > 0.0


async def test_a_client_that_leaves_after_thirty_words_pays_for_thirty(
    run_router: Any, provider: Provider
) -> None:
    provider.hang = True

    async with run_router({}, **options(provider)) as (client, app):
        await client.chat(stream=True, leave_after=1)
        record = next(iter(app.services.decisions.records()))

    assert record.status == 499
    assert record.output_tokens >= 1
    assert record.cost_usd > record.output_tokens * 15e-6
    assert record.usage_estimated


async def test_a_client_that_leaves_a_whole_reply_leaves_its_bill(
    run_router: Any, provider: Provider
) -> None:
    provider.hang = True
    async with run_router({}, **options(provider)) as (client, app):
        task = asyncio.ensure_future(client.chat(max_tokens=100))
        await provider.asked.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        record = next(iter(app.services.decisions.records()))

    assert record.output_tokens == 100
    assert record.cost_usd >= 0.0015


async def test_every_attempt_that_reached_the_provider_is_booked(
    run_router: Any, provider: Provider
) -> None:
    provider.cut_whole, provider.num_words = 2, 10

    async with run_router({}, **options(provider, budget={"usd_per_hour": 36})) as (client, app):
        reply = await client.chat(max_tokens=10)
        ledger = app.services.ledger
        total = app.services.decisions.totals["big"].cost_usd

    assert reply.status == 200
    assert len(provider.inference) == 3
    assert ledger.budget.held == 0.0
    assert ledger.budget.spent == pytest.approx(total)
    # Two lost answers of ten tokens beside the one that came.
    assert total > 3 * 10 * 15e-6


def test_cached_and_reasoning_tokens_have_their_prices(make_config: Any) -> None:
    config = make_config(
        tiers=[
            {
                "name": "big",
                "served_model": "b",
                "usd_per_1m_input_tokens": 10.0,
                "usd_per_1m_output_tokens": 20.0,
                "usd_per_1m_cached_input_tokens": 1.0,
                "usd_per_1m_reasoning_tokens": 40.0,
            }
        ],
        fallback_tier="big",
    )
    usage = read_usage(
        {
            "prompt_tokens": 1000,
            "completion_tokens": 100,
            "prompt_tokens_details": {"cached_tokens": 900},
            "completion_tokens_details": {"reasoning_tokens": 60},
        },
        0,
        0,
    )

    cost = Prices(config).cost_usd(
        "big",
        usage.prompt_tokens,
        usage.output_tokens,
        usage.cached_tokens,
        usage.reasoning_tokens,
    )

    assert cost == pytest.approx((100 * 10 + 900 * 1 + 40 * 20 + 60 * 40) / 1e6)


# Images.


def png(width: int, height: int, num_bytes: int) -> str:
    head = b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sII", 13, b"IHDR", width, height)
    return "data:image/png;base64," + base64.b64encode(head.ljust(num_bytes, b"\0")).decode()


def test_an_image_counts_as_an_image_and_not_by_its_bytes() -> None:
    url = png(1024, 1024, 1_500_000)
    fields = {
        "messages": [
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}
        ]
    }

    expected, most = prompt_tokens(len(json.dumps(fields)), fields)

    assert image_tokens(url) == 765
    assert 765 < expected <= most < 900
    assert image_tokens(url, "low") == 85
    assert image_tokens(png(100, 100, 64)) == 255
    assert image_tokens("https://example.org/cat.png") == 765
    assert image_tokens("data:image/png;base64,!!!") == 765


@given(st.binary(max_size=200), st.sampled_from(["", "data:", "data:image/jpeg;base64,"]))
def test_senseless_images_are_large_ones(data: bytes, prefix: str) -> None:
    assert 85 <= image_tokens(prefix + base64.b64encode(b"\xff\xd8" + data).decode()) < 10_000
