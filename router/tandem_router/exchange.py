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
from dataclasses import dataclass
from typing import Any

from tandem_router.admission import Admission, Reservation
from tandem_router.config import RouterConfig, TierConfig
from tandem_router.control import Reservation as Budgeted
from tandem_router.decisions import DecisionLog, DecisionRecord
from tandem_router.errors import ApiError, UnreachableError, UpstreamError, overloaded
from tandem_router.events import (
    DONE,
    EventSplitter,
    StreamJournal,
    encode_event,
    event_data,
    split_events,
)
from tandem_router.metrics import Metrics
from tandem_router.picking import Pick, Picker
from tandem_router.policy import Decision, Reason, Score
from tandem_router.requests import InferenceRequest, RequestHeaders
from tandem_router.routing import Routing
from tandem_router.upstream import Response, UpstreamClient

logger = logging.getLogger("tandem.router")

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

FIRST_TOKEN = re.compile(rb'"token_ids":\s*\[\s*\d|"(?:content|text)":\s*"(?!")')
# How often a held request looks for a worker; it is also woken when a load report arrives.
LOOK_AGAIN_S = 0.1
MAX_SERVER_ERRORS = 2
# A whole reply sends nothing until it is complete, so silence says less than in a stream.
WHOLE_REPLY_PATIENCE = 10.0


@dataclass(eq=False)
class Services:
    """What an exchange works with; one set per router."""

    config: RouterConfig
    picker: Picker
    client: UpstreamClient
    routing: Routing
    admission: Admission
    metrics: Metrics
    decisions: DecisionLog
    clock: Callable[[], float]
    wall_clock: Callable[[], float]
    peer_token: str | None
    external_keys: Mapping[str, str]
    workers_changed: asyncio.Event


class PassedThrough(Exception):
    """A worker's own refusal (4xx), to be handed to the client as it is."""

    def __init__(self, status: int, body: bytes, retry_after: bytes | None) -> None:
        super().__init__(f"worker answered {status}")
        self.status = status
        self.body = body
        self.retry_after = retry_after


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
        self._chain = services.picker.chain(request.prefix_bytes)
        self._decision: Decision | None = None
        self._score: Score | None = None
        self._tier: TierConfig | None = None
        self._failed_tiers: frozenset[str] = frozenset()
        self._budgeted: Budgeted | None = None
        self._pick: Pick | None = None
        self._response: Response | None = None
        self._num_attempts = 0
        self._num_server_errors = 0
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
            if self._request.stream:
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
            self._release(close=True)
            self._account(status, error)

    # -- deciding ---------------------------------------------------------------------------

    async def _decide(self) -> None:
        services = self._services
        deadline = services.clock() + self._config.failover.wait_s
        while True:
            decision, score = await services.routing.choose(
                self._request,
                self._headers.overrides,
                self._reservation.tenant,
                self._failed_tiers,
            )
            if decision.tier is not None:
                self._budgeted = services.routing.decided(decision, self._request)
                if self._budgeted is not None or not services.routing.has_budget:
                    break
                # Concurrent requests took the money in between: ask again, soon.
                await asyncio.sleep(0.01)
                if services.clock() < deadline:
                    continue
            if not decision.queue or services.clock() >= deadline:
                raise self._refusal(decision)
            await asyncio.sleep(min(1.0, max(0.05, decision.retry_after_s or 0.5)))
        self._score = score
        self._decided(decision)

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
        self._decision = decision
        self._tier = self._config.tier(decision.tier)
        services.metrics.decisions[(decision.tier, str(decision.reason))].inc()
        if self.record is None:
            services.routing.state.record(decision.tier, self._request.num_prompt_tokens)
            services.admission.reserve_cost(self._reservation, decision.reserve_cost_usd)
            self.record = DecisionRecord(
                sequence=services.decisions.next_sequence(),
                request_id=self._request_id,
                time=services.wall_clock(),
                tenant=self._reservation.tenant.config.name,
                model=self._request.model,
                kind=self._request.kind,
                stream=self._request.stream,
                tier=decision.tier,
                reason=str(decision.reason),
                gain=decision.gain,
                threshold=decision.threshold,
                difficulty=decision.difficulty,
                quality=dict(self._score.quality) if self._score is not None else {},
                expected_cost_usd=decision.expected_cost_usd,
            )
            services.decisions.add(self.record)
        else:
            self.record.tier = decision.tier
            self.record.reason = str(decision.reason)
            self.record.expected_cost_usd = decision.expected_cost_usd

    async def _change_tier(self) -> bool:
        """Leave a tier that cannot serve, where the router may choose; False where it may not."""
        if self._forced is not None or self.headers_sent or self._tier is None:
            return False
        failed = self._failed_tiers | {self._tier.name}
        others = [
            tier.name
            for tier in self._config.tiers
            if tier.name not in failed and self._services.picker.num_usable(tier.name)
        ]
        if not others:
            return False
        self._failed_tiers = failed
        decision, _ = await self._services.routing.choose(
            self._request, self._headers.overrides, self._reservation.tenant, failed
        )
        if decision.tier is None or decision.tier in failed:
            return False
        if self._budgeted is not None:
            self._services.routing.settled(self._budgeted, 0.0)
            self._budgeted = self._services.routing.decided(decision, self._request)
        self._decided(decision)
        return True

    # -- reaching a worker ------------------------------------------------------------------

    async def _open(self, body: bytes) -> Response:
        """A 200 reply from some worker, its headers read.

        Raises ApiError when none can be had in time, PassedThrough when the request is refused.
        """
        services = self._services
        failover = self._config.failover
        deadline = services.clock() + failover.wait_s
        refused: set[str] = set()
        full: PassedThrough | None = None
        while True:
            pick = await self._acquire(refused, deadline, full)
            worker = pick.decode
            self._pick = pick
            assert self._tier is not None
            if self.record is not None:
                self.record.decode_worker = worker.url
                self.record.prefill_worker = pick.prefill.url if pick.prefill else None
            self._num_attempts += 1
            try:
                response = await services.client.request(
                    "POST",
                    self._target(worker.url),
                    headers=self._upstream_headers(pick),
                    body=self._external_body(body) if self._tier.kind == "external" else body,
                    stall_timeout_s=failover.stall_timeout_s
                    * (1.0 if self._request.stream else WHOLE_REPLY_PATIENCE),
                )
                self._response = response
                if response.status == 200:
                    services.picker.answered(worker)
                    return response
                payload = await response.read_all(4 * 2**20)
            except UpstreamError as error:
                if isinstance(error, UnreachableError):
                    # Waiting for a restart is bounded by time, not by knocks on its door.
                    self._num_attempts -= 1
                self._broken(error)
                continue
            retry_after = response.headers.get(b"retry-after")
            self._release()
            status = response.status
            if status == 429 or status == 503:
                services.metrics.upstream_errors[(self._tier.name, str(status))].inc()
                refused.add(worker.url)
                if b"x-tandem-draining" in response.headers:
                    worker.draining = True
                full = PassedThrough(status, payload, retry_after)
            elif status >= 500:
                services.picker.failed(worker, f"answered {status}")
                services.metrics.upstream_errors[(self._tier.name, str(status))].inc()
                self._num_server_errors += 1
                if self._num_server_errors >= MAX_SERVER_ERRORS:
                    raise PassedThrough(502, _checked_error(status, payload), None)
                refused.add(worker.url)
            else:
                raise PassedThrough(status, _checked_error(status, payload), retry_after)

    async def _acquire(
        self, refused: set[str], deadline: float, full: PassedThrough | None
    ) -> Pick:
        """Workers for this request; waits for one that restarts, changes tier where allowed."""
        services = self._services
        failover = self._config.failover
        assert self._tier is not None
        tier_deadline = services.clock() + failover.tier_wait_s
        if self._num_attempts >= failover.max_attempts:
            raise self._unavailable(f"{self._num_attempts} attempts failed")
        waiting = None
        try:
            while True:
                pick = services.picker.pick(
                    self._tier.name, self._chain, float(self._request.num_prompt_tokens), refused
                )
                if pick is not None:
                    services.metrics.tiers[self._tier.name].inflight.inc()
                    return pick
                now = services.clock()
                all_full = full is not None and services.picker.num_usable(self._tier.name) > 0
                if all_full and not self.headers_sent:
                    on_exhausted = self._config.budget.on_exhausted
                    if on_exhausted == "Downgrade" and await self._change_tier():
                        continue
                    if on_exhausted != "Queue" and full is not None:
                        raise PassedThrough(full.status, full.body, full.retry_after or b"1")
                if now >= tier_deadline and not all_full and await self._change_tier():
                    tier_deadline = services.clock() + failover.tier_wait_s
                    continue
                if now >= deadline:
                    raise self._unavailable(f"none came within {failover.wait_s:g} s")
                if waiting is None:
                    waiting = services.metrics.tiers[self._tier.name].waiting
                    waiting.inc()
                services.workers_changed.clear()
                try:
                    async with asyncio.timeout(LOOK_AGAIN_S):
                        await services.workers_changed.wait()
                except TimeoutError:
                    pass
                refused.clear()
        finally:
            if waiting is not None:
                waiting.dec()

    def _unavailable(self, why: str) -> ApiError:
        name = self._tier.name if self._tier is not None else ""
        return overloaded(
            f"tier {name!r} has no worker that can take the request: {why}; retry later",
            code="no_worker",
            retry_after_s=5.0,
            status=503,
        )

    def _target(self, base: str) -> str:
        assert self._tier is not None
        path = self._request.path
        return base + (path.removeprefix("/v1") if self._tier.kind == "external" else path)

    def _upstream_headers(self, pick: Pick) -> list[tuple[bytes, bytes]]:
        assert self._tier is not None
        headers = [
            (b"content-type", b"application/json"),
            (b"x-request-id", self._request_id.encode()),
        ]
        if self._tier.kind == "external":
            key = self._services.external_keys.get(self._tier.name)
            if key:
                headers.append((b"authorization", b"Bearer " + key.encode()))
            return headers
        headers += [
            (b"x-tandem-created", str(self._created).encode()),
            (b"x-tandem-model", self._tier.served_model.encode()),
            (b"x-tandem-seed", str(self._seed).encode()),
        ]
        if self._request.stream:
            headers += [(b"x-tandem-token-ids", b"1"), (b"x-tandem-usage", b"1")]
        if pick.prefill is not None:
            headers.append((b"x-tandem-prefill", pick.prefill.url.encode()))
        slo_s = self._headers.overrides.ttft_slo_s
        slo_ms = slo_s * 1000.0 if slo_s is not None else self._config.slo.ttft_ms
        if slo_ms is not None:
            elapsed_ms = (self._services.clock() - self._started_at) * 1000.0
            headers.append(
                (b"x-tandem-deadline-ms", str(max(1, round(slo_ms - elapsed_ms))).encode())
            )
        if self._headers.priority is not None:
            headers.append((b"x-tandem-priority", str(self._headers.priority).encode()))
        if self._services.peer_token:
            headers.append((b"x-tandem-peer-token", self._services.peer_token.encode()))
        return headers

    def _external_body(self, body: bytes) -> bytes:
        assert self._tier is not None
        fields = {**self._request.fields, "model": self._tier.served_model}
        if self._request.stream:
            options = dict(fields.get("stream_options") or {})
            fields["stream_options"] = {**options, "include_usage": True}
        return json.dumps(fields, ensure_ascii=False).encode()

    def _broken(self, error: UpstreamError) -> None:
        """The worker died or cannot be reached: back off from it and let go of it."""
        assert self._tier is not None
        if self._pick is not None:
            self._services.picker.failed(self._pick.decode, str(error))
            self._services.metrics.upstream_errors[(self._tier.name, "broken")].inc()
            logger.warning(
                "request %s: worker %s: %s", self._request_id, self._pick.decode.url, error
            )
        self._release(close=True)

    def _release(self, close: bool = False) -> None:
        if self._pick is not None:
            assert self._tier is not None
            self._services.picker.finished(self._pick)
            self._services.metrics.tiers[self._tier.name].inflight.dec()
            self._pick = None
        if self._response is not None and close:
            self._response.close()
            self._response = None

    # -- whole replies ----------------------------------------------------------------------

    async def _whole(self) -> None:
        while True:
            response = await self._open(self._request.body)
            try:
                body = await response.read_all()
            except UpstreamError as error:
                self._broken(error)
                self._failed_over("whole")
                continue
            break
        self._saw_first_token()
        self._usage = _usage_of(body)
        self._release()
        content_type = response.headers.get(b"content-type", b"application/json")
        headers = [
            (b"content-type", content_type),
            (b"content-length", str(len(body)).encode()),
            *self._reply_headers(self._cost()),
        ]
        self.headers_sent = True
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._send_last(body)

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
            (b"x-tandem-reason", str(decision.reason).encode()),
            (b"x-tandem-cost-usd", f"{cost_usd:.9f}".encode()),
        ]
        if decision.difficulty is not None:
            headers.append((b"x-tandem-difficulty", f"{decision.difficulty:.4f}".encode()))
        if decision.gain is not None:
            headers.append((b"x-tandem-gain", f"{decision.gain:.4f}".encode()))
        return headers

    # -- streams ----------------------------------------------------------------------------

    async def _stream(self) -> None:
        response = await self._open(self._request.body)
        assert self._decision is not None
        self.headers_sent = True
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
                self._broken(error)
            except _StreamError as error:
                if not error.retriable or self._num_server_errors >= MAX_SERVER_ERRORS:
                    await self._end_with(error.event)
                    return
                self._num_server_errors += 1
                self._broken(UpstreamError("ended its stream with an error event"))
            self._failed_over("stream")
            try:
                response = await self._open(self._resume_body())
            except ApiError as refusal:
                await self._end_with(b"data: " + refusal.body() + b"\n\n", refusal.message)
                return
            except (PassedThrough, UpstreamError) as refusal:
                message = f"the reply broke off and could not be carried on: {refusal}"
                failure = ApiError(502, message, type="server_error", code="stream_lost")
                await self._end_with(b"data: " + failure.body() + b"\n\n", message)
                return
        await self._send_last(DONE)
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
        if self._pick is not None:
            self._services.picker.first_token(self._pick)

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
        if usage is not None:
            prompt, output = usage.get("prompt_tokens"), usage.get("completion_tokens")
            if isinstance(prompt, int) and prompt >= 0:
                return prompt, output if isinstance(output, int) and output >= 0 else 0
        if not self.headers_sent and self._first_token_at is None:
            return 0, 0
        return self._request.num_prompt_tokens, self._journal.num_tokens()

    def _cost(self) -> float:
        assert self._tier is not None
        return self._services.routing.cost_usd(self._tier.name, *self._num_tokens())

    def _account(self, status: int, error: str | None) -> None:
        services = self._services
        record = self.record
        if record is None or self._tier is None:
            if self._budgeted is not None:
                services.routing.settled(self._budgeted, 0.0)
            services.admission.settle(self._reservation, 0.0, 0.0)
            return
        now = self._completed_at if self._completed_at is not None else services.clock()
        tier = self._tier.name
        prompt_tokens, output_tokens = self._num_tokens()
        cost = self._cost()
        services.admission.settle(self._reservation, float(prompt_tokens + output_tokens), cost)
        if self._budgeted is not None:
            services.routing.settled(self._budgeted, cost)
        record.status = status
        record.error = record.error or error
        record.e2e_s = now - self._started_at
        record.prompt_tokens = prompt_tokens
        record.output_tokens = output_tokens
        record.cost_usd = cost
        record.cost_all_large_usd = services.routing.cost_usd(
            services.routing.dearest,
            prompt_tokens,
            self._expected_output(services.routing.dearest, output_tokens),
        )
        metrics = services.metrics
        bound = metrics.tiers[tier]
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
        lengths = self._score.output_tokens if self._score is not None else None
        quantiles = lengths.get(tier) if lengths else None
        return float(quantiles[1]) if quantiles else float(output_tokens)


def _usage_of(body: bytes) -> Mapping[str, Any] | None:
    try:
        usage = json.loads(body).get("usage")
    except (ValueError, AttributeError):
        return None
    return usage if isinstance(usage, dict) else None


def _is_retriable(chunk: Mapping[str, Any]) -> bool:
    """An error about the request would come again; one about the server need not."""
    error = chunk.get("error")
    kind = error.get("type") if isinstance(error, dict) else None
    return kind not in ("invalid_request_error", "authentication_error", "not_found_error")


def _checked_error(status: int, payload: bytes) -> bytes:
    """The worker's error body when it is an OpenAI error object, else one that says so."""
    try:
        if isinstance(json.loads(payload)["error"]["message"], str):
            return payload
    except (ValueError, KeyError, TypeError):
        pass
    error = ApiError(
        status,
        f"the worker answered {status} without an error object",
        type="server_error" if status >= 500 else "invalid_request_error",
        code="worker_error",
    )
    return error.body()
