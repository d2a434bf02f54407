"""Reads an answer that a gateway carries from a worker to the client, and books it.

What the client gets is what the router's HTTP path would send: the worker's internal events and
headers stay out, our headers are added, a failure is told in our words. What cannot be done here is
to ask another worker: once a worker has the request, the gateway's own retries are all there is.
"""

from __future__ import annotations

import json
import logging
from typing import Any

from tandem_router.errors import ApiError
from tandem_router.gateway.placement import Placed, endpoint
from tandem_router.openai.answer import MAX_UNPACKED_BYTES, NotAnAnswer, answer_of, unpacked
from tandem_router.openai.asgi import NOSNIFF
from tandem_router.openai.sse import DONE, event_data
from tandem_router.proxy.arrival import Arrival
from tandem_router.proxy.context import Services
from tandem_router.proxy.faults import (
    Fault,
    FaultKind,
    Refusal,
    RequestRefused,
    of_error,
    of_refusal,
    refusal_of,
)
from tandem_router.proxy.seen_answer import SeenAnswer
from tandem_router.proxy.stream import Relay, StreamEnded
from tandem_router.proxy.tier_assignment import TierAssignment

logger = logging.getLogger("tandem.router")

Headers = list[tuple[bytes, bytes]]


class CarriedAnswer:
    """One request's answer, from its headers to its books; `end` is called whatever happens."""

    def __init__(self, services: Services, arrival: Arrival, placed: Placed) -> None:
        self._services = services
        self._arrival = arrival
        self._retries = placed.retries
        self._assignment: TierAssignment = placed.assignment
        self._seen = SeenAnswer(services, arrival)
        self._seen.retries = placed.retries
        self._status = 499
        self._error: str | None = "the gateway ended the exchange before the answer was complete"
        self._upstream = 0
        self._upstream_headers: dict[bytes, bytes] = {}
        self._held: list[bytes] = []  # not the client's yet
        self._num_bytes = 0
        self._ended = False  # the stream's last event has been passed on

    # -- headers ----------------------------------------------------------------------------

    def began(self, status: int, headers: list[tuple[bytes, bytes]], served: str | None) -> None:
        """The worker's headers are here. served: the endpoint, where the gateway says it."""
        self._upstream, self._upstream_headers = status, dict(headers)
        worker = self._assignment.record.decode_worker or ""
        if served and served != worker.partition("://")[2]:
            self._stood_in(served)
        if status == 200 and self._arrival.request.stream:
            self._seen.relay = Relay(
                self._arrival.request,
                self._services.config.failover.max_kept_bytes,
                _nowhere,
                lambda: self._assignment.tier,
                self._told,
            )

    def hidden(self) -> list[str]:
        """Names of the worker's headers that are not for the client."""
        names = [name.decode("latin-1") for name in self._upstream_headers]
        hidden = [name for name in names if name.startswith("x-tandem-")]
        return [*hidden, "content-length"] if self._seen.relay is not None else hidden

    # -- bodies -----------------------------------------------------------------------------

    def read(self, data: bytes, last: bool) -> tuple[bytes, Headers | None]:
        """What the client gets after these bytes, and its headers where they are due now.

        Raises ApiError or RequestRefused where the client has nothing yet and gets that instead.
        """
        if self._seen.relay is None:
            self._num_bytes += len(data)
            if self._num_bytes <= MAX_UNPACKED_BYTES:
                self._held.append(data)
            return self._whole() if last else (b"", None)
        self._held.append(self._events(self._seen.relay, data, last))
        if not (self._seen.relay.begun or last):
            return b"", None
        shown = b"".join(self._held)
        self._held.clear()
        if self._seen.headers_sent:
            return shown, None
        self._seen.headers_sent = self._assignment.committed = True
        own = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            NOSNIFF,
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
        ]
        expected_usd = self._assignment.decision.expected_cost_usd
        return shown, [*own, *self._assignment.reply_headers(expected_usd)]

    def _events(self, relay: Relay, data: bytes, last: bool) -> bytes:
        was_begun, shown = relay.begun, b""
        try:
            if data and not self._ended:
                shown = relay.passed(data)
            if relay.begun and not was_begun:
                self._first_token()
            if last and not relay.done and not self._ended:
                shown += relay.passed(b"")
        except StreamEnded as ended:
            return shown + self._worker_ended(ended)
        except Fault as fault:
            return shown + self._broke(fault)
        if relay.done and not self._ended:
            self._ended = True
            self._seen.completed()
            shown += DONE
            self._ends(200, None)
            self._seen.keep_stream(self._assignment)
        return shown

    def _whole(self) -> tuple[bytes, Headers]:
        """The answer, now that all of it is here. Raises ApiError, RequestRefused."""
        body = b"".join(self._held)
        try:
            if self._num_bytes > MAX_UNPACKED_BYTES:
                raise Fault(FaultKind.BAD_ANSWER, "the reply is too large", status=self._upstream)
            if self._upstream != 200:
                said = Refusal(self._upstream, self._upstream_headers, body, external=False)
                raise of_refusal(said)
            packing = self._upstream_headers.get(b"content-encoding")
            plain = unpacked(body, packing)
            reply = answer_of(plain, self._arrival.request.kind)
        except NotAnAnswer as error:
            raise self._given_up(_of_reply(error)) from error
        except (Fault, RequestRefused) as refusal:
            raise self._given_up(refusal) from refusal
        self._first_token()
        self._seen.saw_whole(reply)
        self._seen.headers_sent = True
        self._seen.completed()
        self._ends(200, None)
        if isinstance(reply.get("usage"), dict):
            self._seen.keep(self._assignment, plain)
        told = self._assignment.reply_headers(self._seen.cost_usd(self._assignment))
        length = (b"content-length", b"%d" % len(body))
        return body, [(b"content-type", b"application/json"), NOSNIFF, length, *told]

    # -- the end ----------------------------------------------------------------------------

    def end(self) -> None:
        """Let go of the worker and book what was seen."""
        self._retries.release()
        self._seen.account(self._assignment, self._status, self._error)

    def _ends(self, status: int, error: str | None) -> None:
        self._status, self._error = status, error

    def _first_token(self) -> None:
        self._retries.answered()
        self._seen.saw_first_token()

    def _given_up(self, why: Fault | RequestRefused) -> ApiError | RequestRefused:
        """What the client is told of a try that gave no answer; a gateway asks nobody else."""
        if isinstance(why, Fault):
            self._retries.lost(why)
            if why.kind is not FaultKind.INCAPABLE:
                error = refusal_of({self._assignment.tier.name: why})
                self._ends(error.status, error.message)
                return error
            why = RequestRefused(why.status or 400, why.body)
        self._retries.release()
        self._retries.asked = False  # refused: nothing was generated
        self._ends(why.status, "refused by the worker")
        return why

    def _worker_ended(self, ended: StreamEnded) -> bytes:
        """The worker's error event, which ends the client's stream."""
        if not self._seen.headers_sent:
            error = json.loads(event_data(ended.event)).get("error")
            raise self._given_up(of_error(error, external=False)) from ended
        self._ended = True
        self._assignment.record.error = "the worker reported an error"
        self._ends(200, None)
        return ended.event

    def _broke(self, fault: Fault) -> bytes:
        """Where the client has headers an event says it; else raises ApiError, RequestRefused."""
        error = self._given_up(fault)
        if not self._seen.headers_sent:
            raise error from fault
        self._ended = True
        message = f"the reply broke off, and no gateway carries it on: {fault}"
        told = ApiError(502, message, type="server_error", code="stream_lost")
        self._assignment.record.error = message
        self._ends(200, None)
        return b"data: " + told.body() + b"\n\n"

    def _stood_in(self, served: str) -> None:
        """The gateway reached another of the named endpoints than the first."""
        tier = self._assignment.tier.name
        for worker in self._services.picker.workers:
            if worker.tier == tier and endpoint(worker) == served:
                self._retries.stood_in(worker)
                return
        logger.warning("the gateway says that %s served a request for tier %s", served, tier)

    def _told(self) -> dict[str, Any]:
        assignment = self._assignment
        cost_usd = self._seen.cost_usd(assignment)
        return {"tier": assignment.tier.name, "reason": assignment.reason, "cost_usd": cost_usd}


async def _nowhere(_: Any) -> None:
    """A relay whose bytes somebody else sends."""


def _of_reply(error: NotAnAnswer) -> Fault | RequestRefused:
    """A 200 whose body is no answer; it may say that the request is at fault."""
    said = error.error
    if isinstance(said, dict) and said.get("type") == "invalid_request_error":
        return of_error(said, external=False)
    return Fault(FaultKind.BAD_ANSWER, str(error), status=200)
