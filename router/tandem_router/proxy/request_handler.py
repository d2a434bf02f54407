"""One request from decision to last byte, whatever dies on the way.

Before the first token a request can be tried on any worker, and on another tier where the client
let the router choose. After it the client's stream is carried on by another worker of the same
tier from the token ids already forwarded, so that the client sees one whole stream
(`tandem_router.proxy.stream`). A worker that is restarting is waited for.
"""

from __future__ import annotations

import asyncio
from typing import Any

from tandem_router.cache import CachedAnswer
from tandem_router.cache.response_cache import as_stream, with_new_id
from tandem_router.errors import ApiError, UpstreamError
from tandem_router.http.eager import EagerRun
from tandem_router.http.exchange import Exchange
from tandem_router.http.response import Response
from tandem_router.openai.answer import NotAnAnswer, answer_of, unpacked
from tandem_router.openai.asgi import NOSNIFF, Send
from tandem_router.openai.sse import DONE, encode_json
from tandem_router.policy import Reason
from tandem_router.proxy.arrival import Arrival
from tandem_router.proxy.context import Services
from tandem_router.proxy.faults import Fault, FaultKind, RequestRefused, of_error, of_transport
from tandem_router.proxy.first_answer import (
    FirstAnswer,
    asked_whole,
    first_answer,
    wants_another,
)
from tandem_router.proxy.retries import Retries
from tandem_router.proxy.seen_answer import SeenAnswer
from tandem_router.proxy.stream import Relay, StreamEnded
from tandem_router.proxy.tier_assignment import TierAssignment, assign, assign_now

# Said by us: what a provider calls its reply may make a browser run it.
JSON = b"application/json"
_STREAM_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    NOSNIFF,
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)
_JSON_LINES = b"content-type: %b\r\n%b: %b\r\n" % (JSON, *NOSNIFF)
_STREAM_LINES = b"".join([b"%b: %b\r\n" % header for header in _STREAM_HEADERS])


class RequestHandler:
    """Runs one inference request; `run` returns when the client has everything."""

    _assignment: TierAssignment | None = None
    # Set just before the last bytes are sent: from then on a closed connection is normal.
    complete = False
    left = False  # the client went away before

    def __init__(
        self,
        services: Services,
        arrival: Arrival,
        send: Send,
        task: asyncio.Task[Any] | EagerRun,
    ) -> None:
        """task: what runs it, to be cancelled when the client leaves."""
        self._services = services
        self._task = task
        self._arrival = arrival
        self._request = arrival.request
        self._send = send
        self._exchange = Exchange.of(send)
        self._seen = SeenAnswer(services, arrival)

    def leave(self) -> None:
        """The client is gone."""
        if not self.complete:
            self.left = True
            self._task.cancel()

    @property
    def headers_sent(self) -> bool:
        return self._seen.headers_sent

    async def run(self) -> None:
        """Raises ApiError or RequestRefused while no header has been sent; never after."""
        status = 200
        error: str | None = None
        try:
            found = assign_now(self._services, self._arrival)
            if isinstance(found, TierAssignment):
                assignment = found
            else:
                assignment = await assign(self._services, self._arrival, found=found)
            self._assignment = assignment
            if assignment.cached is not None:
                await self._serve_cached(assignment, assignment.cached)
            elif assignment.middle is not None:
                await self._read_first(assignment)
            else:
                retries = self._seen.retries = Retries(self._services, assignment)
                if self._request.stream:
                    await self._stream(assignment, retries)
                else:
                    await self._whole(assignment, retries)
        except ApiError as refusal:
            status, error = refusal.status, refusal.message
            raise
        except RequestRefused as refusal:
            status, error = refusal.status, "refused by the worker"
            raise
        except asyncio.CancelledError:
            status, error = 499, "the client went away"
            raise
        except Exception:
            status, error = 500, "the router failed"
            raise
        finally:
            retries_left = self._seen.retries
            if retries_left is not None and retries_left.holds:
                retries_left.release(close=True)
            self._seen.account(self._assignment, status, error)

    async def _directly(self, assignment: TierAssignment, retries: Retries) -> None:
        if self._request.stream:
            await self._stream(assignment, retries)
        else:
            await self._whole(assignment, retries)

    # -- answers that are read before they are sent ------------------------------------------

    async def _read_first(self, assignment: TierAssignment) -> None:
        """Get the cheaper tier's answer, have it read, and send it or ask the dearer tier."""
        services, arrival = self._services, self._arrival
        assignment.arrival = asked_whole(services, arrival)
        retries = self._seen.retries = Retries(services, assignment)
        _, reply = await self._whole_answer(assignment, retries)
        retries.release()
        assignment.arrival = arrival
        assert self._seen.whole_usage is not None
        is_ours = assignment.tier.kind == "pool"
        answer = first_answer(reply, self._request.kind, self._seen.whole_usage, is_ours)
        # Another tier may have had to answer: there is nothing to weigh it against.
        if assignment.middle is not None and await wants_another(services, assignment, answer):
            if await self._escalated(assignment, answer):
                return
            services.routing.answers.count("not_escalated")
            assignment.was_read(Reason.UNVERIFIED)
        if assignment.record.read is not None:
            assignment.record.read = {**assignment.record.read, "outcome": assignment.reason}
        await self._send_first(assignment, answer)

    async def _escalated(self, assignment: TierAssignment, answer: FirstAnswer) -> bool:
        """Answer by the dearer tier; False where it may not be asked or fails before its start."""
        late = self._services.clock() >= self._arrival.deadline
        if late or not assignment.escalate(answer.usage, answer.text or ""):
            return False
        assert assignment.record.read is not None
        assignment.record.read = {**assignment.record.read, "outcome": "escalated"}
        first, self._seen.whole_usage = self._seen.retries, None
        retries = self._seen.retries = Retries(self._services, assignment)
        try:
            await self._directly(assignment, retries)
        except (ApiError, RequestRefused):
            if self.headers_sent:
                raise
            retries.release(close=True)
            assignment.go_back()
            self._seen.retries, self._seen.relay = first, None
            return False
        self._services.routing.answers.count("escalated")
        return True

    async def _send_first(self, assignment: TierAssignment, answer: FirstAnswer) -> None:
        self._seen.whole_usage = answer.usage
        self._seen.saw_first_token()
        body, content_type = answer.body(self._arrival)
        await self._send_whole(assignment, body, content_type)
        if isinstance(answer.reply.get("usage"), dict):
            self._seen.keep(assignment, encode_json(answer.reply))

    # -- whole replies ----------------------------------------------------------------------

    async def _whole(self, assignment: TierAssignment, retries: Retries) -> None:
        body, reply = await self._whole_answer(assignment, retries)
        retries.release()
        seen, exchange = self._seen, self._exchange
        if exchange is not None and not exchange.connection.writing_paused:
            cost_usd = seen.cost_usd(assignment)
            seen.headers_sent = self.complete = True
            seen.completed()
            exchange.reply(_JSON_LINES + assignment.reply_lines(cost_usd), body)
        else:
            await self._send_whole(assignment, body, JSON)
        if self._arrival.cache_key is not None and isinstance(reply.get("usage"), dict):
            seen.keep(assignment, body)

    async def _whole_answer(
        self, assignment: TierAssignment, retries: Retries
    ) -> tuple[bytes, dict[str, Any]]:
        """The reply of whichever worker gives one, and what it used in `_whole_usage`."""
        while True:
            response = await retries.open(assignment.arrival.request.body)
            try:
                body = response.whole()
                if body is None:
                    body = await _rest_of(response)
                body, reply = self._answer(assignment, response, body)
            except Fault as fault:
                retries.failed(fault)
                self._failed_over(assignment, "whole")
                continue
            break
        retries.answered()
        self._seen.saw_whole(reply)
        return body, reply

    def _answer(
        self, assignment: TierAssignment, response: Response, body: bytes
    ) -> tuple[bytes, dict[str, Any]]:
        """The body of a reply that is an answer, and what it says; read once.

        Raises Fault, RequestRefused.
        """
        try:
            if response.encoding is not None:
                body = unpacked(body, response.encoding)
            return body, answer_of(body, self._request.kind)
        except NotAnAnswer as error:
            if isinstance(error.error, dict) and error.error.get("type") == "invalid_request_error":
                raise of_error(error.error, assignment.tier.kind == "external") from error
            raise Fault(FaultKind.BAD_ANSWER, str(error), status=200) from error

    async def _serve_cached(self, assignment: TierAssignment, answer: CachedAnswer) -> None:
        """A hit costs nothing and is said in `x-tandem-cache`."""
        request, arrival = self._request, self._arrival
        reply = with_new_id(answer.body, request.kind, arrival.request_id, arrival.created)
        if request.stream:
            body = as_stream(reply, request.kind, request.include_usage)
            content_type = b"text/event-stream; charset=utf-8"
        else:
            body = encode_json(reply)
            content_type = JSON
        await self._send_whole(assignment, body, content_type, (b"x-tandem-cache", b"hit"))

    async def _send_whole(
        self,
        assignment: TierAssignment,
        body: bytes,
        content_type: bytes,
        *extra: tuple[bytes, bytes],
    ) -> None:
        cost_usd = self._seen.cost_usd(assignment)
        self._seen.headers_sent = True
        headers = [
            (b"content-type", content_type),
            NOSNIFF,
            *extra,
            *assignment.reply_headers(cost_usd),
            (b"content-length", b"%d" % len(body)),
        ]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._send_last(body)

    # -- streams ----------------------------------------------------------------------------

    async def _stream(self, assignment: TierAssignment, retries: Retries) -> None:
        def told() -> dict[str, Any]:
            cost_usd = self._seen.cost_usd(assignment)
            return {"tier": assignment.name, "reason": assignment.reason, "cost_usd": cost_usd}

        relay = self._seen.relay = Relay(
            self._request,
            self._services.config.failover.max_kept_bytes,
            self._send,
            lambda: assignment.tier,
            told,
        )
        while True:
            response = await retries.open(self._request.body)
            try:
                await relay.begin(response)
                break
            except Fault as fault:
                relay.forget()
                retries.failed(fault)
                self._failed_over(assignment, "stream")
        retries.answered()
        self._seen.saw_first_token()
        self._seen.headers_sent = assignment.committed = True
        expected_usd = assignment.decision.expected_cost_usd
        if self._exchange is not None and not self._exchange.connection.writing_paused:
            self._exchange.begin_stream(_STREAM_LINES + assignment.reply_lines(expected_usd))
        else:
            headers = [*_STREAM_HEADERS, *assignment.reply_headers(expected_usd)]
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        await relay.flush()
        while True:
            try:
                rest = await relay.forward(response)
                break
            except StreamEnded as ended:
                await self._end_with(assignment, self._checked(assignment, ended.event))
                return
            except Fault as fault:
                self._failed_over(assignment, "stream")
                try:
                    # Where it ends here, `_account` books what came of it.
                    retries.failed(fault)
                    going_on = relay.resumption(assignment.decision.max_tokens)
                    response = await retries.open(self._request.body, going_on)
                    relay.take_over()
                    exact = "exact" if going_on.exact else "continued"
                    self._services.metrics.resumptions[(assignment.name, exact)].inc()
                except (ApiError, RequestRefused, UpstreamError) as refusal:
                    await self._end_with(assignment, *_lost(refusal))
                    return
        await self._send_last(rest + DONE)
        self._seen.keep_stream(assignment)
        retries.let_end()

    def _checked(self, assignment: TierAssignment, event: bytes) -> bytes:
        """An error event as it may be shown: a provider's words are not."""
        if assignment.tier.kind != "external":
            return event
        message = f"tier {assignment.name!r} gave up on this request"
        return b"data: " + ApiError(400, message, code="stream_lost").body() + b"\n\n"

    async def _end_with(
        self,
        assignment: TierAssignment,
        event: bytes,
        message: str = "the worker reported an error",
    ) -> None:
        assignment.record.error = message
        await self._send_last(event)

    # -- both -------------------------------------------------------------------------------

    async def _send_last(self, body: bytes) -> None:
        self.complete = True
        self._seen.completed()
        if self._exchange is not None and not self._exchange.connection.writing_paused:
            self._exchange.write(body, False)
        else:
            await self._send({"type": "http.response.body", "body": body})

    def _failed_over(self, assignment: TierAssignment, kind: str) -> None:
        self._services.metrics.failovers[(assignment.name, kind)].inc()
        assignment.record.num_failovers += 1
        if self._services.tracing is not None:
            what = {"tandem.tier": assignment.name, "tandem.kind": kind}
            self._services.tracing.event(self._arrival.request_id, "failed over", what)


async def _rest_of(response: Response) -> bytes:
    """All of a reply that is still arriving. Raises Fault."""
    try:
        return await response.read_all()
    except UpstreamError as error:
        raise of_transport(error) from error


def _lost(refusal: ApiError | RequestRefused | UpstreamError) -> tuple[bytes, str]:
    """(event, message) for a stream that nobody could carry on."""
    failure = refusal
    if not isinstance(failure, ApiError):
        message = f"the reply broke off and could not be carried on: {refusal}"
        failure = ApiError(502, message, type="server_error", code="stream_lost")
    return b"data: " + failure.body() + b"\n\n", failure.message
