"""What finished requests add up to is the same whenever somebody asks, and however often."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tandem_router.openai.usage import NOTHING_USED, Usage
from tandem_router.proxy.tally import FOLDED_EVERY, Tally
from tandem_router.routing.decision_log import DecisionLog, DecisionRecord
from tandem_router.store.writer import Store
from tandem_router.telemetry.metrics import Metrics


def ended(tier: str, status: int, tenant: str, usage: Usage, cost_usd: float) -> DecisionRecord:
    record = DecisionRecord(
        1, "id", 0.0, tenant, "m", "chat", False, tier, "gain", None, None, None, {}, 0.0
    )
    record.status, record.e2e_s, record.cost_usd = status, 0.25, cost_usd
    record.prompt_tokens, record.output_tokens = usage.prompt_tokens, usage.output_tokens
    record.cost_all_large_usd = 2.0 * cost_usd
    return record


requests = st.lists(
    st.tuples(
        st.sampled_from(["small", "large"]),
        st.sampled_from([200, 200, 499, 502]),
        st.sampled_from(["a", "b"]),
        st.integers(0, 9),
        st.booleans(),
    ),
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(requests, st.integers(1, 7))
async def test_every_sum_holds_every_request_once(
    given_requests: list[tuple[str, int, str, int, bool]], asked_every: int
) -> None:
    metrics, decisions = Metrics(["small", "large"]), DecisionLog(10)
    store = Store(None, wall_clock=lambda: 0.0)
    tally = Tally(metrics, decisions, store)

    for number, (tier, status, tenant, tokens, booked) in enumerate(given_requests):
        usage = Usage(tokens, 2 * tokens)
        record = ended(tier, status, tenant, usage, float(tokens))
        # Booked already, as where a first answer was read: its tier's counters have it.
        billed, billed_usd = (NOTHING_USED, 0.0) if booked else (usage, float(tokens))
        tally.note(record, usage, billed, billed_usd)
        if number % asked_every == 0:
            assert sum(each.num_requests for each in decisions.totals.values()) == number + 1

    spend = await store.spend()
    text = metrics.render().decode()
    for tier in ("small", "large"):
        own = [each for each in given_requests if each[0] == tier]
        total = sum(each[3] for each in own)
        assert sum(row.prompt_tokens for row in spend if row.tier == tier) == total
        assert sum(row.num_requests for row in spend if row.tier == tier) == len(own)
        assert metrics.tiers[tier].cost.value == sum(each[3] for each in own if not each[4])
        assert sum(metrics.tiers[tier].e2e.counts) == sum(each[1] == 200 for each in own)
        if own:
            assert decisions.totals[tier].output_tokens == 2 * total
    if given_requests:
        assert "tandem_requests_total{" in text
    assert decisions.cost_all_large_usd == sum(2.0 * each[3] for each in given_requests)


def test_what_nobody_asks_for_is_counted_once_in_so_many_requests() -> None:
    metrics, decisions = Metrics(["small"]), DecisionLog(10)
    tally = Tally(metrics, decisions, Store(None, wall_clock=lambda: 0.0))

    for _ in range(FOLDED_EVERY):
        tally.note(ended("small", 200, "a", Usage(1, 1), 1.0), Usage(1, 1), Usage(1, 1), 1.0)

    assert metrics.requests[("small", "200")].value == FOLDED_EVERY
