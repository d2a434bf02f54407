"""One request from decision to last byte, whatever dies on the way.

Before the first byte a request can be tried on any worker, and on another tier where the client
let the router choose. After it the client's stream is carried on by another worker of the same
tier from the token ids already forwarded, so that the client sees one whole stream: only complete
events are forwarded, and what the next worker repeats is dropped. A worker that is restarting is
waited for.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import replace
from typing import Any

from tandem_router.admission import Reservation
from tandem_router.cache import CachedAnswer
from tandem_router.config import TierConfig
from tandem_router.connections import Response
from tandem_router.decisions import DecisionRecord
from tandem_router.dispatch import MAX_SERVER_ERRORS, Dispatch, PassedThrough
from tandem_router.errors import ApiError, UpstreamError, overloaded
from tandem_router.events import (
    DONE,
    EventSplitter,
    StreamJournal,
    encode_event,
    event_data,
    split_events,
)
from tandem_router.policy import Decision, Reason
from tandem_router.requests import InferenceRequest, RequestHeaders
from tandem_router.reuse import as_stream, assemble, with_new_id
from tandem_router.scoring import Scored
from tandem_router.services import Services
from tandem_router.steering import Counted

logger = logging.getLogger("tandem.router")

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

# A request whose latency SLO is this likely to be missed is shed where the Router says so.
SHED_ABOVE = 0.95
SHED_RETRY_AFTER_S = 2.0
FIRST_TOKEN = re.compile(rb'"token_ids":\s*\[\s*\d|"(?:content|text)":\s*"(?!")')


class _StreamError(Exception):
    """The worker ended its stream with an error event."""

    def __init__(self, event: bytes, retriable: bool) -> None:
        super().__init__("error event")
        self.event = event
        self.retriable = retriable


class Exchange:
    """Runs one inference request; `run` returns when the client has everything."""

    def __init__(
        self,
        services: Services,
        request: InferenceRequest,
        headers: RequestHeaders,
        reservation: Reservation,
        request_id: str,
        seed: int,
        send: Send,
        started_at: float,
    ) -> None:
        self._services = services
        self._config = services.config
        self._request = request
        self._headers = headers
        self._reservation = reservation
        self._request_id = request_id
        self._seed = seed
        self._send = send
        self._started_at = started_at
        self._created = int(services.wall_clock())
        self._forced = services.routing.forced_tier(request.model)
        self._decision: Decision | None = None
        self._scored: Scored | None = None
        self._tier: TierConfig | None = None
        self._failed_tiers: frozenset[str] = frozenset()
        self._cache_key = services.reuse.key(request, reservation.tenant.config.name)
        self._cached: CachedAnswer | None = None
        self._counted: Counted | None = None
        self._dispatch: Dispatch | None = None
        self._first_token_at: float | None = None
        self._usage: Mapping[str, Any] | None = None
        self._journal = StreamJournal(services.config.failover.max_kept_bytes)
        self.record: DecisionRecord | None = None
        self.headers_sent = False
        # Set just before the last bytes are sent: from then on a closed connection is normal.
        self.complete = False
        self._completed_at: float | None = None

    async def run(self) -> None:
        """Raises ApiError or PassedThrough while no header has been sent; never after."""
        status = 200
        error: str | None = None
        try:
            await self._decide()
            if self._cached is not None:
                await self._serve_cached(self._cached)
            elif self._request.stream:
                await self._stream()
            else:
                await self._whole()
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

    # -- deciding ---------------------------------------------------------------------------

    async def _decide(self) -> None:
        services = self._services
        deadline = services.clock() + self._config.failover.wait_s
        scored = self._scored = await services.routing.score(self._request)
        while True:
            set_points = services.steering.set_points
            decision = services.routing.choose(
                self._request,
                self._headers.overrides,
                self._reservation.tenant,
                scored,
                set_points,
                services.reuse.expected_uses(self._cache_key),
            )
            if decision.tier is not None:
                self._cached = self._find_cached(decision, set_points.lambda_per_usd)
                if self._cached is not None:
                    break
                self._shed_if_late(decision)
                self._counted = services.steering.count(decision, self._request, set_points)
                if self._counted is not None:
                    break
                # Concurrent requests took the money in between: ask again, soon.
                await asyncio.sleep(0.01)
                if services.clock() < deadline:
                    continue
            if not decision.queue or services.clock() >= deadline:
                raise self._refusal(decision)
            await asyncio.sleep(min(1.0, max(0.05, decision.retry_after_s or 0.5)))
        self._decided(decision)

    def _find_cached(self, decision: Decision, lambda_per_usd: float) -> CachedAnswer | None:
        if self._cache_key is None or self._headers.no_cache:
            return None
        return self._services.reuse.find(
            self._cache_key,
            decision,
            self._forced,
            self._headers.overrides.quality is not None,
            lambda_per_usd,
        )

    async def _serve_cached(self, answer: CachedAnswer) -> None:
        """A hit costs nothing and is said in `x-tandem-cache`."""
        request = self._request
        reply = with_new_id(answer.body, request.kind, self._request_id, self._created)
        if request.stream:
            body = as_stream(reply, request.kind, request.include_usage)
            content_type = b"text/event-stream; charset=utf-8"
        else:
            body = json.dumps(reply, ensure_ascii=False).encode()
            content_type = b"application/json"
        headers = [
            (b"content-type", content_type),
            (b"content-length", str(len(body)).encode()),
            (b"x-tandem-cache", b"hit"),
            *self._reply_headers(0.0),
        ]
        self.headers_sent = True
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._send_last(body)

    def _keep_answer(self, body: bytes | None) -> None:
        if self._cache_key is not None and body is not None and self._tier is not None:
            self._services.reuse.keep(self._cache_key, body, self._tier.name, self._cost())

    def _shed_if_late(self, decision: Decision) -> None:
        """429 where the Router prefers refusing to being late (`on_exhausted: Reject`).

        Predictions rest on the last seconds of traffic, so a router that sheds everything soon
        knows nothing of its latency and tries again.
        """
        rejects = self._config.budget.on_exhausted == "Reject"
        if rejects and decision.slo_miss_probability >= SHED_ABOVE:
            raise overloaded(
                f"tier {decision.tier!r} is too loaded to meet the latency SLO; retry later",
                code="slo",
                retry_after_s=SHED_RETRY_AFTER_S,
            )

    def _refusal(self, decision: Decision) -> ApiError:
        code = str(decision.reason)
        allowed = self._reservation.tenant.config.allowed_tiers
        forbidden = allowed is not None and self._forced is not None and self._forced not in allowed
        if decision.reason is Reason.TENANT and forbidden:
            return ApiError(403, decision.message, type="permission_error", code=code)
        if decision.reason is Reason.MAX_COST:
            return ApiError(400, decision.message, param="x-tandem-max-cost-usd", code=code)
        return overloaded(
            decision.message or "the budget was taken by other requests; retry later",
            code=code,
            retry_after_s=decision.retry_after_s or 1.0,
        )

    def _decided(self, decision: Decision) -> None:
        services = self._services
        assert decision.tier is not None
        if self._cached is not None:
            decision = replace(decision, tier=self._cached.tier)
        assert decision.tier is not None
        self._decision = decision
        self._tier = self._config.tier(decision.tier)
        reason = "cached" if self._cached is not None else str(decision.reason)
        if self._cached is None:
            services.admission.reserve_cost(self._reservation, decision.reserve_cost_usd)
        score = self._scored.score if self._scored is not None else None
        if self.record is None:
            self.record = DecisionRecord(
                sequence=services.decisions.next_sequence(),
                request_id=self._request_id,
                time=services.wall_clock(),
                tenant=self._reservation.tenant.config.name,
                model=self._request.model,
                kind=self._request.kind,
                stream=self._request.stream,
                tier=decision.tier,
                reason=reason,
                gain=decision.gain,
                threshold=decision.threshold,
                difficulty=decision.difficulty,
                quality=dict(score.quality) if score is not None else {},
                expected_cost_usd=decision.expected_cost_usd,
            )
            services.decisions.add(self.record)
            self._dispatch = Dispatch(
                services,
                self._request,
                self._headers,
                self.record,
                self._tier,
                seed=self._seed,
                created=self._created,
                started_at=self._started_at,
                change_tier=self._change_tier,
            )
        else:
            assert self._dispatch is not None
            self._dispatch.tier = self._tier
            self.record.tier = decision.tier
            self.record.reason = reason
            self.record.threshold = decision.threshold
            self.record.expected_cost_usd = decision.expected_cost_usd

    async def _change_tier(self) -> bool:
        """Leave a tier that cannot serve, where the router may choose; False where it may not."""
        counted, scored = self._counted, self._scored
        if self._forced is not None or self.headers_sent or self._tier is None:
            return False
        assert counted is not None
        assert scored is not None
        failed = self._failed_tiers | {self._tier.name}
        others = [
            tier.name
            for tier in self._config.tiers
            if tier.name not in failed and self._services.picker.num_usable(tier.name)
        ]
        if not others:
            return False
        self._failed_tiers = failed
        decision = self._services.routing.choose_again(
            counted,
            self._request,
            self._headers.overrides,
            self._reservation.tenant,
            scored,
            failed,
            self._services.reuse.expected_uses(self._cache_key),
        )
        if decision.tier is None or decision.tier in failed:
            return False
        if not self._services.steering.move(counted, decision):
            return False
        self._decided(decision)
        return True

    # -- whole replies ----------------------------------------------------------------------

    async def _whole(self) -> None:
        dispatch = self._dispatch
        assert dispatch is not None
        while True:
            response = await dispatch.open(self._request.body)
            try:
                body = await response.read_all()
            except UpstreamError as error:
                dispatch.broken(error)
                self._failed_over("whole")
                continue
            break
        self._saw_first_token()
        self._usage = _usage_of(body)
        dispatch.release()
        content_type = response.headers.get(b"content-type", b"application/json")
        headers = [
            (b"content-type", content_type),
            (b"content-length", str(len(body)).encode()),
            *self._reply_headers(self._cost()),
        ]
        self.headers_sent = True
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._send_last(body)
        if self._usage is not None:
            self._keep_answer(body)

    def _failed_over(self, kind: str) -> None:
        assert self._tier is not None
        self._services.metrics.failovers[(self._tier.name, kind)].inc()
        if self.record is not None:
            self.record.num_failovers += 1

    def _reply_headers(self, cost_usd: float) -> list[tuple[bytes, bytes]]:
        decision = self._decision
        assert decision is not None
        assert self._tier is not None
        headers = [
            (b"x-request-id", self._request_id.encode()),
            (b"x-tandem-tier", self._tier.name.encode()),
            (
                b"x-tandem-reason",
                b"cached" if self._cached is not None else str(decision.reason).encode(),
            ),
            (b"x-tandem-cost-usd", f"{cost_usd:.9f}".encode()),
        ]
        if decision.difficulty is not None:
            headers.append((b"x-tandem-difficulty", f"{decision.difficulty:.4f}".encode()))
        if decision.gain is not None:
            headers.append((b"x-tandem-gain", f"{decision.gain:.4f}".encode()))
        return headers

    # -- streams ----------------------------------------------------------------------------

    async def _stream(self) -> None:
        dispatch = self._dispatch
        assert dispatch is not None
        response = await dispatch.open(self._request.body)
        assert self._decision is not None
        self.headers_sent = dispatch.headers_sent = True
        await self._send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [
                    (b"content-type", b"text/event-stream; charset=utf-8"),
                    (b"cache-control", b"no-cache"),
                    (b"x-accel-buffering", b"no"),
                    *self._reply_headers(self._decision.expected_cost_usd),
                ],
            }
        )
        while True:
            try:
                await self._relay(response)
                break
            except UpstreamError as error:
                dispatch.broken(error)
            except _StreamError as error:
                if not error.retriable or dispatch.num_server_errors >= MAX_SERVER_ERRORS:
                    await self._end_with(error.event)
                    return
                dispatch.num_server_errors += 1
                dispatch.broken(UpstreamError("ended its stream with an error event"))
            self._failed_over("stream")
            try:
                response = await dispatch.open(self._resume_body())
            except ApiError as refusal:
                await self._end_with(b"data: " + refusal.body() + b"\n\n", refusal.message)
                return
            except (PassedThrough, UpstreamError) as refusal:
                message = f"the reply broke off and could not be carried on: {refusal}"
                failure = ApiError(502, message, type="server_error", code="stream_lost")
                await self._end_with(b"data: " + failure.body() + b"\n\n", message)
                return
        await self._send_last(DONE)
        if self._cache_key is not None and (events := self._journal.events) is not None:
            self._keep_answer(assemble(events, self._request.kind, self._usage))
        await self._drain(response)

    async def _end_with(self, event: bytes, message: str = "the worker reported an error") -> None:
        if self.record is not None:
            self.record.error = message
        await self._send_last(event)

    async def _send_last(self, body: bytes) -> None:
        self.complete = True
        self._completed_at = self._services.clock()
        await self._send({"type": "http.response.body", "body": body})

    async def _drain(self, response: Response) -> None:
        """Let the reply end by itself, so that its connection can be used again."""
        try:
            async with asyncio.timeout(0.05):
                while await response.read_some():
                    pass
        except (TimeoutError, UpstreamError):
            pass

    def _resume_body(self) -> bytes:
        """The request plus what was generated so far. Raises UpstreamError if it is not known."""
        token_ids = self._journal.resume_token_ids(self._request.num_choices)
        if token_ids is None:
            return self._request.body
        fields = {**self._request.fields, "tandem": {"resume_token_ids": token_ids}}
        return json.dumps(fields, ensure_ascii=False).encode()

    async def _relay(self, response: Response) -> None:
        """Forward events until [DONE]; it is left for the caller to send.

        Raises UpstreamError when the worker's reply ends before, _StreamError on an error event.
        """
        splitter = EventSplitter()
        while True:
            data = await response.read_some()
            if not data:
                raise UpstreamError("the stream ended before [DONE]")
            events = splitter.feed(data)
            if not events:
                continue
            done = False
            failure: _StreamError | None = None
            if b'"usage"' in events or b"[DONE]" in events or b'"error"' in events:
                events, done, failure = self._look_at(events)
            if self._journal.resumed and events:
                events = self._journal.without_repeats(events)
            if events:
                if self._first_token_at is None and FIRST_TOKEN.search(events):
                    self._saw_first_token()
                self._journal.forwarded(events)
                await self._send({"type": "http.response.body", "body": events, "more_body": True})
            if failure is not None:
                raise failure
            if done:
                return

    def _saw_first_token(self) -> None:
        if self._first_token_at is None:
            self._first_token_at = self._services.clock()
        if self._dispatch is not None:
            self._dispatch.first_token()

    def _look_at(self, events: bytes) -> tuple[bytes, bool, _StreamError | None]:
        """(events to forward, whether the stream is done, the error that ended it)."""
        kept: list[bytes] = []
        for event in split_events(events):
            payload = event_data(event)
            if payload == b"[DONE]":
                return b"".join(kept), True, None
            if b'"usage"' in payload or b'"error"' in payload:
                try:
                    chunk = json.loads(payload)
                except ValueError as error:
                    raise UpstreamError(f"a chunk is not JSON: {error}") from error
                if isinstance(chunk, dict) and "error" in chunk and "choices" not in chunk:
                    return b"".join(kept), False, _StreamError(event, _is_retriable(chunk))
                if isinstance(chunk, dict) and isinstance(chunk.get("usage"), dict):
                    self._usage = chunk["usage"]
                    if not chunk.get("choices"):
                        if self._request.include_usage:
                            kept.append(self._usage_event(chunk))
                        continue
            kept.append(event)
        return b"".join(kept), False, None

    def _usage_event(self, chunk: dict[str, Any]) -> bytes:
        """The usage chunk, with what the client could not know when the headers went out."""
        assert self._decision is not None
        assert self._tier is not None
        known = {
            "tier": self._tier.name,
            "reason": str(self._decision.reason),
            "cost_usd": self._cost(),
        }
        return encode_event({**chunk, "tandem": known})

    # -- accounting -------------------------------------------------------------------------

    def _num_tokens(self) -> tuple[int, int]:
        """(prompt, generated) from the worker's usage, else our estimate of what was used."""
        usage = self._usage
        if self._cached is not None:
            return 0, 0
        if usage is not None:
            return _tokens_of(usage)
        if not self.headers_sent and self._first_token_at is None:
            return 0, 0
        return self._request.num_prompt_tokens, self._journal.num_tokens()

    def _cost(self) -> float:
        assert self._tier is not None
        return self._services.prices.cost_usd(self._tier.name, *self._num_tokens())

    def _account(self, status: int, error: str | None) -> None:
        services = self._services
        record = self.record
        if record is None or self._tier is None:
            if self._counted is not None:
                services.steering.settle(self._counted, 0.0)
            services.admission.settle(self._reservation, 0.0, 0.0)
            return
        now = self._completed_at if self._completed_at is not None else services.clock()
        tier = self._tier.name
        prompt_tokens, output_tokens = self._num_tokens()
        cost = self._cost()
        served = (prompt_tokens, output_tokens)
        if self._cached is not None:
            # Nothing was computed or billed, but this much was answered.
            served = _tokens_of(json.loads(self._cached.body).get("usage"))
        services.admission.settle(self._reservation, float(prompt_tokens + output_tokens), cost)
        if self._counted is not None:
            services.steering.settle(self._counted, cost)
        record.status = status
        record.error = record.error or error
        record.e2e_s = now - self._started_at
        record.prompt_tokens, record.output_tokens = served
        record.cost_usd = cost
        record.cost_all_large_usd = services.prices.cost_usd(
            services.prices.dearest,
            served[0],
            self._expected_output(services.prices.dearest, served[1]),
        )
        metrics = services.metrics
        bound = metrics.tiers[tier]
        metrics.decisions[(tier, record.reason)].inc()
        broke_off = status == 200 and record.error is not None
        metrics.requests[(tier, "broke_off" if broke_off else str(status))].inc()
        bound.prompt_tokens.inc(prompt_tokens)
        bound.output_tokens.inc(output_tokens)
        bound.cost.inc(cost)
        metrics.cost_all_large.inc(record.cost_all_large_usd)
        metrics.tenant_cost[(record.tenant,)].inc(cost)
        if status == 200:
            bound.e2e.observe(record.e2e_s)
            bound.prompt_length.observe(prompt_tokens)
            bound.output_length.observe(output_tokens)
        if self._first_token_at is not None and self._request.stream:
            record.ttft_s = self._first_token_at - self._started_at
            bound.ttft.observe(record.ttft_s)
            if output_tokens > 1:
                record.tpot_s = (now - self._first_token_at) / (output_tokens - 1)
                bound.tpot.observe(record.tpot_s)
            services.routing.latency[tier].saw(record.ttft_s, record.tpot_s, now)
        services.decisions.finished(record)

    def _expected_output(self, tier: str, output_tokens: int) -> float:
        """Tokens `tier` would have generated: its predicted median, else as many as were."""
        if self._tier is not None and tier == self._tier.name:
            return output_tokens
        score = self._scored.score if self._scored is not None else None
        lengths = score.output_tokens if score is not None else None
        quantiles = lengths.get(tier) if lengths else None
        return float(quantiles[1]) if quantiles else float(output_tokens)


def _usage_of(body: bytes) -> Mapping[str, Any] | None:
    try:
        usage = json.loads(body).get("usage")
    except (ValueError, AttributeError):
        return None
    return usage if isinstance(usage, dict) else None


def _tokens_of(usage: Any) -> tuple[int, int]:
    """(prompt, generated) tokens; 0 for what is missing or senseless."""
    numbers = []
    for name in ("prompt_tokens", "completion_tokens"):
        value = usage.get(name) if isinstance(usage, dict) else None
        numbers.append(value if isinstance(value, int) and value >= 0 else 0)
    return numbers[0], numbers[1]


def _is_retriable(chunk: Mapping[str, Any]) -> bool:
    """An error about the request would come again; one about the server need not."""
    error = chunk.get("error")
    kind = error.get("type") if isinstance(error, dict) else None
    return kind not in ("invalid_request_error", "authentication_error", "not_found_error")
