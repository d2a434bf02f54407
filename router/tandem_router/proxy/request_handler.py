"""One request from decision to last byte, whatever dies on the way.

Before the first byte a request can be tried on any worker, and on another tier where the client
let the router choose. After it the client's stream is carried on by another worker of the same
tier from the token ids already forwarded, so that the client sees one whole stream
(`tandem_router.proxy.stream`). A worker that is restarting is waited for.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

from tandem_router.asgi import Send
from tandem_router.cache import CachedAnswer
from tandem_router.cache.response_cache import as_stream, assemble, with_new_id
from tandem_router.errors import ApiError, UpstreamError
from tandem_router.http.connection_pool import Response
from tandem_router.limits.ledger import NOTHING, Hold
from tandem_router.openai.request import DEFAULT_OUTPUT_TOKENS, InferenceRequest, RequestHeaders
from tandem_router.openai.sse import DONE
from tandem_router.openai.usage import (
    NOTHING_USED,
    Usage,
    answer_chars,
    read_usage,
    text_tokens,
    usage_of,
)
from tandem_router.proxy.accounting import Outcome, account
from tandem_router.proxy.context import Services
from tandem_router.proxy.retries import MAX_SERVER_ERRORS, Dispatch, PassedThrough
from tandem_router.proxy.stream import Relay, StreamError
from tandem_router.proxy.tier_assignment import Arrival, Placement, place


class Exchange:
    """Runs one inference request; `run` returns when the client has everything."""

    def __init__(
        self,
        services: Services,
        request: InferenceRequest,
        headers: RequestHeaders,
        hold: Hold,
        request_id: str,
        seed: int,
        send: Send,
        started_at: float,
    ) -> None:
        self._services = services
        self._request = request
        self._send = send
        self._arrival = Arrival(
            request,
            headers,
            hold,
            request_id,
            seed,
            started_at,
            created=int(services.wall_clock()),
            forced=services.routing.forced_tier(request.model),
            cache_key=services.reuse.key(request, hold.tenant.name),
        )
        self._placement: Placement | None = None
        self._dispatch: Dispatch | None = None
        self._relay: Relay | None = None
        self._body: bytes | None = None  # a whole reply
        self._usage: Mapping[str, Any] | None = None  # its usage
        self._first_token_at: float | None = None
        self._completed_at: float | None = None
        self.headers_sent = False
        # Set just before the last bytes are sent: from then on a closed connection is normal.
        self.complete = False

    async def run(self) -> None:
        """Raises ApiError or PassedThrough while no header has been sent; never after."""
        status = 200
        error: str | None = None
        try:
            placement = self._placement = await place(self._services, self._arrival)
            if placement.cached is not None:
                await self._serve_cached(placement, placement.cached)
            elif self._request.stream:
                await self._stream(placement, self._dispatched(placement))
            else:
                await self._whole(placement, self._dispatched(placement))
        except ApiError as refusal:
            status, error = refusal.status, refusal.message
            raise
        except PassedThrough as refusal:
            status, error = refusal.status, "refused by the worker"
            raise
        except asyncio.CancelledError:
            status, error = 499, "the client went away"
            raise
        except Exception:
            status, error = 500, "the router failed"
            raise
        finally:
            if self._dispatch is not None:
                self._dispatch.release(close=True)
            self._account(status, error)

    def _dispatched(self, placement: Placement) -> Dispatch:
        def change_tier() -> bool:
            if self.headers_sent or not placement.change():
                return False
            dispatch.tier = placement.tier
            dispatch.max_tokens = placement.decision.max_tokens
            return True

        arrival = self._arrival
        dispatch = self._dispatch = Dispatch(
            self._services,
            arrival.request,
            arrival.headers,
            placement.record,
            placement.tier,
            seed=arrival.seed,
            created=arrival.created,
            started_at=arrival.started_at,
            change_tier=change_tier,
            lost=lambda: self._lost(placement),
        )
        dispatch.max_tokens = placement.decision.max_tokens
        return dispatch

    # -- whole replies ----------------------------------------------------------------------

    async def _whole(self, placement: Placement, dispatch: Dispatch) -> None:
        while True:
            response = await dispatch.open(self._request.body)
            try:
                body = await response.read_all()
            except UpstreamError as error:
                dispatch.broken(error)
                self._failed_over(placement, "whole")
                continue
            break
        self._saw_first_token()
        self._body = body
        self._usage = usage_of(body)
        dispatch.release()
        content_type = response.headers.get(b"content-type", b"application/json")
        await self._send_whole(placement, body, content_type)
        if self._usage is not None:
            self._keep_answer(placement, body)

    async def _serve_cached(self, placement: Placement, answer: CachedAnswer) -> None:
        """A hit costs nothing and is said in `x-tandem-cache`."""
        request, arrival = self._request, self._arrival
        reply = with_new_id(answer.body, request.kind, arrival.request_id, arrival.created)
        if request.stream:
            body = as_stream(reply, request.kind, request.include_usage)
            content_type = b"text/event-stream; charset=utf-8"
        else:
            body = json.dumps(reply, ensure_ascii=False).encode()
            content_type = b"application/json"
        await self._send_whole(placement, body, content_type, (b"x-tandem-cache", b"hit"))

    async def _send_whole(
        self,
        placement: Placement,
        body: bytes,
        content_type: bytes,
        *extra: tuple[bytes, bytes],
    ) -> None:
        headers = [
            (b"content-type", content_type),
            (b"content-length", str(len(body)).encode()),
            *extra,
            *placement.reply_headers(placement.cost_usd(self._used(placement))),
        ]
        self.headers_sent = True
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._send_last(body)

    # -- streams ----------------------------------------------------------------------------

    async def _stream(self, placement: Placement, dispatch: Dispatch) -> None:
        def told() -> dict[str, Any]:
            cost_usd = placement.cost_usd(self._used(placement))
            return {"tier": placement.tier.name, "reason": placement.reason, "cost_usd": cost_usd}

        relay = self._relay = Relay(
            self._request,
            self._services.config.failover.max_kept_bytes,
            self._send,
            self._saw_first_token,
            told,
        )
        response = await dispatch.open(self._request.body)
        self.headers_sent = dispatch.headers_sent = True
        await self._send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [
                    (b"content-type", b"text/event-stream; charset=utf-8"),
                    (b"cache-control", b"no-cache"),
                    (b"x-accel-buffering", b"no"),
                    *placement.reply_headers(placement.decision.expected_cost_usd),
                ],
            }
        )
        while True:
            try:
                await relay.forward(response)
                break
            except UpstreamError as error:
                dispatch.broken(error)
            except StreamError as error:
                if not error.retriable or dispatch.num_server_errors >= MAX_SERVER_ERRORS:
                    await self._end_with(placement, error.event)
                    return
                dispatch.num_server_errors += 1
                dispatch.broken(UpstreamError("ended its stream with an error event"))
            self._failed_over(placement, "stream")
            try:
                response = await dispatch.open(relay.resume_body())
            except ApiError as refusal:
                await self._end_with(
                    placement, b"data: " + refusal.body() + b"\n\n", refusal.message
                )
                return
            except (PassedThrough, UpstreamError) as refusal:
                message = f"the reply broke off and could not be carried on: {refusal}"
                failure = ApiError(502, message, type="server_error", code="stream_lost")
                await self._end_with(placement, b"data: " + failure.body() + b"\n\n", message)
                return
        await self._send_last(DONE)
        if self._arrival.cache_key is not None and (events := relay.journal.events) is not None:
            self._keep_answer(placement, assemble(events, self._request.kind, relay.usage))
        await self._drain(response)

    async def _end_with(
        self, placement: Placement, event: bytes, message: str = "the worker reported an error"
    ) -> None:
        placement.record.error = message
        await self._send_last(event)

    async def _drain(self, response: Response) -> None:
        """Let the reply end by itself, so that its connection can be used again."""
        try:
            async with asyncio.timeout(0.05):
                while await response.read_some():
                    pass
        except (TimeoutError, UpstreamError):
            pass

    # -- both -------------------------------------------------------------------------------

    async def _send_last(self, body: bytes) -> None:
        self.complete = True
        self._completed_at = self._services.clock()
        await self._send({"type": "http.response.body", "body": body})

    def _saw_first_token(self) -> None:
        if self._first_token_at is None:
            self._first_token_at = self._services.clock()
        if self._dispatch is not None:
            self._dispatch.first_token()

    def _failed_over(self, placement: Placement, kind: str) -> None:
        self._services.metrics.failovers[(placement.tier.name, kind)].inc()
        placement.record.num_failovers += 1

    def _keep_answer(self, placement: Placement, body: bytes | None) -> None:
        cache_key = self._arrival.cache_key
        if cache_key is not None and body is not None:
            cost_usd = placement.cost_usd(self._used(placement))
            self._services.reuse.keep(cache_key, body, placement.tier.name, cost_usd)

    def _used(self, placement: Placement) -> Usage:
        """What the attempt that ended it used: the provider's usage, else by what was seen."""
        dispatch, relay = self._dispatch, self._relay
        if placement.cached is not None or dispatch is None or not dispatch.asked:
            return NOTHING_USED
        prompt = self._request.num_prompt_tokens
        if relay is not None:
            usage = read_usage(relay.usage, prompt, 0)
            if usage.estimated:
                usage = read_usage(relay.usage, prompt, relay.journal.num_tokens())
        elif self._body is not None:
            usage = read_usage(self._usage, prompt, text_tokens(answer_chars(self._body)))
        else:
            return self._unseen(placement)
        if not usage.output_tokens and not self.headers_sent:
            return self._unseen(placement)
        return usage

    def _unseen(self, placement: Placement) -> Usage:
        """An answer that was asked for and never read: ours stops with us, a provider bills it."""
        if placement.tier.kind != "external":
            return NOTHING_USED
        request, output = self._request, 0
        if not request.stream:
            bounds = (placement.decision.max_tokens, request.max_tokens, DEFAULT_OUTPUT_TOKENS)
            output = min(each for each in bounds if each is not None) * request.num_choices
        return Usage(request.num_prompt_tokens, output, estimated=True)

    def _lost(self, placement: Placement) -> bool:
        """Book an attempt that broke; False where the answer's end books it with what was sent."""
        if placement.tier.kind != "external":
            return False
        if self._relay is not None and self._relay.journal.num_tokens():
            return False
        placement.lost(self._unseen(placement))
        return True

    def _account(self, status: int, error: str | None) -> None:
        services, placement = self._services, self._placement
        if placement is None:
            services.ledger.settle(self._arrival.hold, NOTHING)
            return
        ended_at = self._completed_at if self._completed_at is not None else services.clock()
        outcome = Outcome(status, error, self._used(placement), self._first_token_at, ended_at)
        account(services, placement, outcome)
