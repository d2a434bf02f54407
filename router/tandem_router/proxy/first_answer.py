"""The first answer of a cascade: asked for whole, read, and kept until another one has begun."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec.structs import replace

from tandem_router.cache.response_cache import as_stream, with_new_id
from tandem_router.openai.sse import encode_json
from tandem_router.openai.usage import Usage
from tandem_router.policy import Reason
from tandem_router.predictor.cascade import TokenStatistics, Verdict
from tandem_router.proxy.arrival import Arrival, answer_s
from tandem_router.proxy.context import Services
from tandem_router.proxy.tier_assignment import TierAssignment
from tandem_router.quality.answer_judge import Asked
from tandem_router.routing.answer_reading import text_of

INTERNAL = "tandem"


@dataclass(frozen=True, slots=True)
class FirstAnswer:
    """A whole reply of the cheaper tier, as its client may get it."""

    reply: Mapping[str, Any]
    usage: Usage
    text: str | None
    tokens: TokenStatistics | None

    def body(self, arrival: Arrival) -> tuple[bytes, bytes]:
        """Bytes and content type in the form that the client asked for."""
        request = arrival.request
        if not request.stream:
            return encode_json(self.reply), b"application/json"
        whole = with_new_id(
            encode_json(self.reply), request.kind, arrival.request_id, arrival.created
        )
        events = as_stream(whole, request.kind, request.include_usage)
        return events, b"text/event-stream; charset=utf-8"


def asked_whole(services: Services, arrival: Arrival) -> Arrival:
    """The same request without `stream`: an answer is read once all of it is there."""
    request = arrival.request
    if not request.stream:
        return arrival
    fields = {name: value for name, value in request.fields.items() if name != "stream_options"}
    fields["stream"] = False
    body = msgspec.json.encode(fields)
    whole = replace(request, stream=False, include_usage=False, body=body, fields=fields)
    return replace(arrival, request=whole, answer_s=answer_s(whole, services.config.failover))


def first_answer(reply: dict[str, Any], kind: str, usage: Usage, is_ours: bool) -> FirstAnswer:
    """is_ours: whether a worker of ours gave it; what was asked of it is taken out again."""
    if not is_ours:
        return FirstAnswer(reply, usage, text_of(reply, kind), None)
    told = reply.pop(INTERNAL, None)
    tokens = TokenStatistics.parse(told.get("token_statistics") if isinstance(told, dict) else None)
    for choice in reply["choices"]:
        # No client that asks for them has its answer read.
        if said := choice.get("logprobs"):
            tokens = tokens or TokenStatistics.of_logprobs(said)
            choice["logprobs"] = None
    return FirstAnswer(reply, usage, text_of(reply, kind), tokens)


async def wants_another(
    services: Services, assignment: TierAssignment, answer: FirstAnswer
) -> bool:
    """Have the answer read; True where the verdict is to ask the dearer tier.

    The record tells what was said. An answer that nobody could judge is sent.
    """
    middle, reader = assignment.middle, services.routing.answers
    prompt = assignment.arrival.request.prompt
    assert middle is not None
    assert prompt is not None
    assert assignment.counted is not None
    said: dict[str, Any] = {
        "tier": middle.first,
        "cost_usd": assignment.cost_usd(answer.usage),
        "prompt_tokens": answer.usage.prompt_tokens,
        "output_tokens": answer.usage.output_tokens,
    }
    assignment.record.read = said
    verdict = None
    if answer.text is None:
        reader.count("no_text")
    else:
        started = time.perf_counter()
        verdict = await reader.read(middle, prompt, answer.text, answer.tokens)
        said["reading_s"] = time.perf_counter() - started
    if verdict is None:
        services.steering.read(assignment.counted, None)
        assignment.was_read(Reason.UNVERIFIED)
        return False
    if services.answer_judge.judge is not None:
        verdict = await _judged(services, assignment, verdict, answer.text or "", said)
    said |= {"probability": verdict.quality_small, "probability_other": verdict.quality_large}
    services.steering.read(
        assignment.counted,
        {middle.first: verdict.quality_small, middle.second: verdict.quality_large},
    )
    if reader.wants_another(middle, verdict):
        return True
    reader.count("verified")
    assignment.was_read(Reason.VERIFIED)
    return False


async def _judged(
    services: Services,
    assignment: TierAssignment,
    verdict: Verdict,
    text: str,
    said: dict[str, Any],
) -> Verdict:
    """The verdict together with the external judge's word, if that can be had in time."""
    middle, reader, arrival = assignment.middle, services.routing.answers, assignment.arrival
    assert middle is not None
    now, escalates = services.clock(), reader.wants_another(middle, verdict)
    slack_s = middle.terms.slo_slack_s - (now - arrival.started_at)
    asked = Asked(
        assignment.record.request_id,
        middle.first,
        arrival.request.prompt or "",
        text,
        arrival.hold.tenant.learning,
        min(slack_s, arrival.deadline - now),
        lambda other: reader.wants_another(middle, other) != escalates,
    )
    word = await services.answer_judge.weigh(verdict, asked)
    said |= {"judge": word.outcome, "judge_usd": word.cost_usd}
    said |= {"judge_s": services.clock() - now, "probability_unjudged": verdict.quality_small}
    return word.verdict
