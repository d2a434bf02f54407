"""What a finished request used, and everything that is told of it: record, budgets, metrics."""

from __future__ import annotations

import logging
from functools import partial

from msgspec import Struct

from tandem_router.limits.ledger import NOTHING, Used
from tandem_router.openai.usage import (
    NOTHING_USED,
    Usage,
    answer_chars,
    read_usage,
    text_tokens,
    usage_of,
)
from tandem_router.policy import Reason
from tandem_router.proxy.arrival import Arrival
from tandem_router.proxy.context import Services
from tandem_router.proxy.tier_assignment import TierAssignment
from tandem_router.routing.decision_log import DecisionRecord, explained
from tandem_router.telemetry.logs import REQUESTS


class Outcome(Struct, frozen=True):
    """How a request ended; times are of the router's clock."""

    status: int
    error: str | None
    usage: Usage  # of the attempt that ended it
    first_token_at: float | None
    ended_at: float
    booked: bool = False  # `usage` is in the ledger and the tier's counters already


def account(services: Services, assignment: TierAssignment, outcome: Outcome) -> None:
    """Settle what was set aside, complete the record and count the request; once per request."""
    record, arrival, tier = assignment.record, assignment.arrival, assignment.name
    status, usage, ended_at = outcome.status, outcome.usage, outcome.ended_at
    num_prompt, num_output = usage.prompt_tokens, usage.output_tokens  # of what was served
    if assignment.cached is not None:
        # Nothing was computed or billed, but this much was answered.
        body = assignment.cached.body
        answered = read_usage(usage_of(body), 0, text_tokens(answer_chars(body)))
        num_prompt, num_output = answered.prompt_tokens, answered.output_tokens
    if outcome.booked:
        used, usage, last_cost = NOTHING, NOTHING_USED, 0.0
    else:
        last_cost = assignment.cost_usd(usage)
        used = Used(float(usage.prompt_tokens + usage.output_tokens), last_cost)
    # What attempts elsewhere used is part of what the request cost.
    cost = services.ledger.settle(arrival.hold, used).usd
    if assignment.counted is not None:
        services.steering.answered(assignment.counted, cost)
    record.status = status
    if record.error is None:
        record.error = outcome.error
    e2e_s = record.e2e_s = ended_at - arrival.started_at
    record.prompt_tokens, record.output_tokens = num_prompt, num_output
    record.cost_usd = cost
    if outcome.usage.estimated:
        record.usage_estimated = True
    dearest = services.prices.dearest
    is_plain = not usage.cached_tokens and not usage.reasoning_tokens
    if tier == dearest and used is not NOTHING and is_plain and assignment.cached is None:
        all_large = last_cost
    else:
        expected = _expected_output(assignment, dearest, num_output)
        all_large = services.prices.cost_usd(dearest, num_prompt, expected)
    record.cost_all_large_usd = all_large
    services.tally.note(record, outcome.usage, usage, last_cost)
    alone = record.read is None or record.reason == Reason.VERIFIED
    if status == 200 and alone and assignment.cached is None and not record.attempts:
        # How quick the tier is, without the wait for a judge.
        judge_s = (record.read or {}).get("judge_s", 0.0)
        services.routing.latency[tier].last_whole.saw(e2e_s - judge_s, ended_at)
    if record.stream and outcome.first_token_at is not None:
        _account_stream(services, assignment, outcome.first_token_at, ended_at)
    store = services.store
    if store.backend is not None:
        store.add_decision(partial(explained, record))
    if services.tracing is not None or REQUESTS.isEnabledFor(logging.INFO):
        _tell(services, record, arrival)


def _account_stream(
    services: Services, assignment: TierAssignment, first_token_at: float, ended_at: float
) -> None:
    """The times of a stream, as its client saw them."""
    record, tier = assignment.record, assignment.name
    bound, latency = services.metrics.tiers[tier], services.routing.latency[tier]
    output_tokens = record.output_tokens or 0
    ttft_s = record.ttft_s = first_token_at - assignment.arrival.started_at
    bound.ttft.observe(ttft_s)
    if output_tokens > 1:
        record.tpot_s = (ended_at - first_token_at) / (output_tokens - 1)
        bound.tpot.observe(record.tpot_s)
    if record.read is not None:
        # Two answers' time, or a whole one's: what clients waited, not how quick the tier is.
        latency.last_ttft.saw(ttft_s, ended_at)
    elif not record.attempts:
        # Of a request that failed elsewhere first, the wait says nothing of this tier.
        latency.saw(ttft_s, record.tpot_s, ended_at, assignment.queue_wait_s)


def _tell(services: Services, record: DecisionRecord, arrival: Arrival) -> None:
    """The span and the log line of a request, where either is wanted; no text of it."""
    said = {
        "status": record.status,
        "tier": record.tier,
        "reason": record.reason,
        "tenant": record.tenant,
        "cost_usd": record.cost_usd,
        "num_failovers": record.num_failovers,
        "decode_worker": record.decode_worker,
        "prefill_worker": record.prefill_worker,
    }
    if services.tracing is not None:
        standard = {
            "gen_ai.operation.name": "chat" if record.kind == "chat" else "text_completion",
            "gen_ai.request.model": record.model,
            "gen_ai.usage.input_tokens": record.prompt_tokens,
            "gen_ai.usage.output_tokens": record.output_tokens,
        }
        own = {f"tandem.{name}": value for name, value in said.items()}
        services.tracing.note(arrival.request_id, {**standard, **own, "error.type": record.error})
    tokens = {"prompt_tokens": record.prompt_tokens, "output_tokens": record.output_tokens}
    times = {"ttft_s": record.ttft_s, "e2e_s": record.e2e_s, "error": record.error}
    named = {"request_id": arrival.request_id, "model": record.model}
    REQUESTS.info("request", extra={**named, **said, **tokens, **times})


def _expected_output(assignment: TierAssignment, tier: str, output_tokens: int) -> float:
    """Tokens `tier` would have generated: its predicted median, else as many as were."""
    if tier == assignment.name:
        return output_tokens
    score = assignment.scored.score
    lengths = score.output_tokens if score is not None else None
    quantiles = lengths.get(tier) if lengths else None
    return float(quantiles[1]) if quantiles else float(output_tokens)
