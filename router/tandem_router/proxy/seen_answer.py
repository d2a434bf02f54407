"""What has been seen of a request's answer: what it used and cost, its words, how it ended.

The same for a reply that this router carries and for one that a gateway carries.
"""

from __future__ import annotations

import json
from typing import Any

from tandem_router.cache.response_cache import assemble
from tandem_router.limits.ledger import NOTHING
from tandem_router.openai.usage import NOTHING_USED, Usage, read_usage, reply_chars, text_tokens
from tandem_router.policy import Reason
from tandem_router.proxy.accounting import Outcome, account
from tandem_router.proxy.arrival import Arrival
from tandem_router.proxy.context import Services
from tandem_router.proxy.retries import Retries
from tandem_router.proxy.shadow import offer
from tandem_router.proxy.stream import Relay
from tandem_router.proxy.tier_assignment import TierAssignment
from tandem_router.routing.answer_reading import text_of


class SeenAnswer:
    """Filled in while an answer comes; `account` ends it, once."""

    # What most answers leave as it is, so that making one costs little.
    retries: Retries | None = None  # of the tier that answers
    relay: Relay | None = None  # of a stream
    whole_usage: Usage | None = None  # of a whole reply
    whole_reply: dict[str, Any] | None = None
    first_token_at: float | None = None
    completed_at: float | None = None
    headers_sent = False

    def __init__(self, services: Services, arrival: Arrival) -> None:
        self._services = services
        self._arrival = arrival
        self._request = arrival.request

    def saw_first_token(self) -> None:
        self.first_token_at = self._services.clock()

    def completed(self) -> None:
        self.completed_at = self._services.clock()

    def saw_whole(self, reply: dict[str, Any]) -> None:
        """All of a reply that is not a stream."""
        self.whole_reply = reply
        prompt, said = self._request.num_prompt_tokens, reply.get("usage")
        usage = read_usage(said, prompt, 0)
        if usage.estimated or not usage.output_tokens:
            usage = read_usage(said, prompt, text_tokens(reply_chars(reply)))
        self.whole_usage = usage

    def used(self, assignment: TierAssignment) -> Usage:
        """What the try that ended it used: the provider's usage, else by what was seen."""
        retries, relay, whole = self.retries, self.relay, self.whole_usage
        if assignment.cached is not None or retries is None or not retries.asked:
            return NOTHING_USED
        if relay is not None:
            prompt = self._request.num_prompt_tokens
            usage = read_usage(relay.usage, prompt, 0)
            if usage.estimated or not usage.output_tokens:
                usage = read_usage(relay.usage, prompt, relay.journal.num_tokens())
        elif whole is None:
            return assignment.unseen()
        elif whole.output_tokens:
            return whole
        else:
            usage = whole
        generates = self._request.kind != "embeddings"
        if generates and not usage.output_tokens and not self.headers_sent:
            return assignment.unseen()
        return usage

    def cost_usd(self, assignment: TierAssignment) -> float:
        """What the client is told: of a first answer that was not sent, too."""
        sent_usd = assignment.cost_usd(self.used(assignment))
        if assignment.decision.reason is Reason.ESCALATED:
            return sent_usd + assignment.first_cost_usd
        return sent_usd

    def keep(self, assignment: TierAssignment, body: bytes | None) -> None:
        """Let the cache have a whole answer."""
        cache_key = self._arrival.cache_key
        if cache_key is not None and body is not None:
            cost_usd = assignment.cost_usd(self.used(assignment))
            self._services.reuse.keep(cache_key, body, assignment.tier.name, cost_usd)

    def keep_stream(self, assignment: TierAssignment) -> None:
        """Let the cache have a stream that has come to its end."""
        relay = self.relay
        if relay is None or self._arrival.cache_key is None:
            return
        if (events := relay.journal.events) is not None:
            self.keep(assignment, assemble(events, self._request.kind, relay.usage))

    def account(self, assignment: TierAssignment | None, status: int, error: str | None) -> None:
        """Book it, count it, and let the learner look at it."""
        services = self._services
        if assignment is None:
            services.ledger.settle(self._arrival.hold, NOTHING)
            return
        ended_at = self.completed_at if self.completed_at is not None else services.clock()
        outcome = Outcome(
            status,
            error,
            self.used(assignment),
            self.first_token_at,
            ended_at,
            # Escalating has booked it, also where it is sent after all.
            booked=assignment.has_answer and assignment.decision.reason is not Reason.ESCALATED,
        )
        account(services, assignment, outcome)
        if status == 200 and assignment.record.error is None:
            offer(services, assignment, self._text)

    def _text(self) -> str | None:
        """What the client was answered; None where it is no text, or was not kept."""
        reply, relay = self.whole_reply, self.relay
        if relay is not None:
            events = relay.journal.events
            kind, usage = self._request.kind, relay.usage or {}
            body = assemble(events, kind, usage) if events is not None else None
            reply = json.loads(body) if body is not None else None
        return text_of(reply, self._request.kind) if reply is not None else None
