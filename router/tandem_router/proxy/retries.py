"""A request's way to its workers: pick, ask, be refused, wait, ask another.

Nothing here reads a reply beyond its status: `open` returns a reply that began well, and the
exchange tells back whether it broke.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable

from prometheus_client import Gauge

from tandem_router.balancing.endpoint_picker import Pick
from tandem_router.config import TierConfig
from tandem_router.errors import ApiError, UnreachableError, UpstreamError, overloaded
from tandem_router.http.connection_pool import Response
from tandem_router.openai.request import InferenceRequest, RequestHeaders, with_max_tokens
from tandem_router.proxy.context import Services
from tandem_router.routing.decision_log import DecisionRecord

logger = logging.getLogger("tandem.router")

# How often a held request looks for a worker; it is also woken when a load report arrives.
LOOK_AGAIN_S = 0.1
MAX_SERVER_ERRORS = 2
CONTEXT_EXCEEDED = b'"context_length_exceeded"'
# A whole reply sends nothing until it is complete, so silence says less than in a stream.
WHOLE_REPLY_PATIENCE = 10.0


class PassedThrough(Exception):
    """A worker's own refusal (4xx), to be handed to the client as it is."""

    def __init__(self, status: int, body: bytes, retry_after: bytes | None) -> None:
        super().__init__(f"worker answered {status}")
        self.status = status
        self.body = body
        self.retry_after = retry_after


class Dispatch:
    """The workers of one request, one after the other.

    change_tier: moves the request to another tier where that is allowed and sets `tier`; False
    where it is not. lost: books an attempt that broke, where that has to be done before the next.
    seed and created travel with the request, so that every worker gives the same answer.
    """

    def __init__(
        self,
        services: Services,
        request: InferenceRequest,
        headers: RequestHeaders,
        record: DecisionRecord,
        tier: TierConfig,
        *,
        seed: int,
        created: int,
        started_at: float,
        change_tier: Callable[[], bool],
        lost: Callable[[], bool],
    ) -> None:
        self._services = services
        self._config = services.config
        self._request = request
        self._headers = headers
        self._record = record
        self._request_id = record.request_id
        self._seed = seed
        self._created = created
        self._started_at = started_at
        self._change_tier = change_tier
        self._lost = lost
        self._chain = services.picker.chain(request.prefix_bytes)
        self._pick: Pick | None = None
        self._response: Response | None = None
        self._num_attempts = 0
        self._deadline = 0.0
        self.tier = tier
        # What the ceilings of money leave of an answer; None: as the client said.
        self.max_tokens: int | None = None
        # Whether a worker or provider has the request, or answered it: it may have used tokens.
        self.asked = False
        self.num_server_errors = 0
        # Once the client has headers, the tier they name stays.
        self.headers_sent = False

    def first_token(self) -> None:
        if self._pick is not None:
            self._services.picker.first_token(self._pick)

    async def open(self, body: bytes) -> Response:
        """A 200 reply from some worker, its headers read.

        Raises ApiError when none can be had in time, PassedThrough when the request is refused.
        """
        services = self._services
        failover = self._config.failover
        self._deadline = services.clock() + failover.wait_s
        refused: set[str] = set()
        full: PassedThrough | None = None
        while True:
            pick = await self._acquire(refused, full)
            worker = pick.decode
            self._pick = pick
            self._record.decode_worker = worker.url
            self._record.prefill_worker = pick.prefill.url if pick.prefill else None
            self._num_attempts += 1
            self.asked = True
            try:
                response = await services.client.request(
                    "POST",
                    self._target(worker.url),
                    headers=self._upstream_headers(pick),
                    body=self._body(body),
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
                self.broken(error)
                continue
            retry_after = response.headers.get(b"retry-after")
            self.release()
            self.asked = False  # refused: nothing was generated
            status = response.status
            if status == 429 or status == 503:
                services.metrics.upstream_errors[(self.tier.name, str(status))].inc()
                # Refusals are waited out by time; only broken attempts are counted.
                self._num_attempts -= 1
                refused.add(worker.url)
                if b"x-tandem-draining" in response.headers:
                    worker.draining = True
                elif status == 503 and self.tier.kind == "pool":
                    # Starting, or about to stop: another one, or this one a little later.
                    services.picker.failed(worker, "answered 503")
                else:
                    full = PassedThrough(status, payload, retry_after)
            elif status >= 500:
                services.picker.failed(worker, f"answered {status}")
                services.metrics.upstream_errors[(self.tier.name, str(status))].inc()
                self.num_server_errors += 1
                if self.num_server_errors >= MAX_SERVER_ERRORS:
                    raise PassedThrough(502, _checked_error(status, payload), None)
                refused.add(worker.url)
            elif CONTEXT_EXCEEDED in payload and self._change_tier():
                # Another tier may have the longer context; the client named none.
                continue
            else:
                raise PassedThrough(status, _checked_error(status, payload), retry_after)

    async def _acquire(self, refused: set[str], full: PassedThrough | None) -> Pick:
        """Workers for this request; waits for one that restarts, changes tier where allowed."""
        services = self._services
        failover = self._config.failover
        began = services.clock()
        tier_deadline = began + failover.tier_wait_s
        if self._num_attempts >= failover.max_attempts:
            raise self._unavailable(f"{self._num_attempts} attempts failed")
        waiting: Gauge | None = None
        asleep = False
        try:
            while True:
                pick = services.picker.pick(
                    self.tier.name, self._chain, float(self._request.num_prompt_tokens), refused
                )
                if pick is not None:
                    services.metrics.tiers[self.tier.name].inflight.inc()
                    return pick
                now = services.clock()
                all_full = full is not None and services.picker.num_usable(self.tier.name) > 0
                if all_full and not self.headers_sent:
                    on_exhausted = self._config.budget.on_exhausted
                    if on_exhausted == "Downgrade" and self._change_tier():
                        _end_wait(waiting)
                        waiting = None
                        continue
                    if on_exhausted != "Queue" and full is not None:
                        raise PassedThrough(full.status, full.body, full.retry_after or b"1")
                if now >= tier_deadline and not all_full and self._change_tier():
                    tier_deadline = services.clock() + failover.tier_wait_s
                    _end_wait(waiting)
                    waiting = None
                    continue
                if services.picker.num_listed(self.tier.name) == 0:
                    asleep, limit = True, max(self._deadline, began + failover.wake_s)
                else:
                    if asleep:
                        # It woke up: from here it is a worker like any other that starts.
                        asleep, self._deadline = False, now + failover.wait_s
                    limit = self._deadline
                if now >= limit:
                    raise self._unavailable(f"none came within {now - began:.3g} s")
                if waiting is None:
                    waiting = services.metrics.tiers[self.tier.name].waiting
                    waiting.inc()
                services.workers_changed.clear()
                try:
                    async with asyncio.timeout(LOOK_AGAIN_S):
                        await services.workers_changed.wait()
                except TimeoutError:
                    pass
                refused.clear()
        finally:
            _end_wait(waiting)

    def _unavailable(self, why: str) -> ApiError:
        name = self.tier.name
        return overloaded(
            f"tier {name!r} has no worker that can take the request: {why}; retry later",
            code="no_worker",
            retry_after_s=5.0,
            status=503,
        )

    def _target(self, base: str) -> str:
        path = self._request.path
        return base + (path.removeprefix("/v1") if self.tier.kind == "external" else path)

    def _upstream_headers(self, pick: Pick) -> list[tuple[bytes, bytes]]:
        headers = [
            (b"content-type", b"application/json"),
            (b"x-request-id", self._request_id.encode()),
        ]
        if self.tier.kind == "external":
            key = self._services.external_keys.get(self.tier.name)
            if key:
                headers.append((b"authorization", b"Bearer " + key.encode()))
            return headers
        headers += [
            (b"x-tandem-created", str(self._created).encode()),
            (b"x-tandem-model", self.tier.served_model.encode()),
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

    def _body(self, body: bytes) -> bytes:
        if self.tier.kind == "external":
            body = self._external_body(body)
        if self.max_tokens is not None:
            name = self.tier.max_tokens_field
            body = with_max_tokens(self._request.kind, body, self.max_tokens, name)
        return body

    def _external_body(self, body: bytes) -> bytes:
        fields = {**self._request.fields, "model": self.tier.served_model}
        if self._request.stream:
            options = dict(fields.get("stream_options") or {})
            fields["stream_options"] = {**options, "include_usage": True}
        return json.dumps(fields, ensure_ascii=False).encode()

    def broken(self, error: UpstreamError) -> None:
        """The worker died or cannot be reached: back off from it and let go of it."""
        if self._pick is not None:
            self._services.picker.failed(self._pick.decode, str(error))
            self._services.metrics.upstream_errors[(self.tier.name, "broken")].inc()
            logger.warning(
                "request %s: worker %s: %s", self._request_id, self._pick.decode.url, error
            )
        self.release(close=True)
        if self.asked and (isinstance(error, UnreachableError) or self._lost()):
            self.asked = False

    def release(self, close: bool = False) -> None:
        if self._pick is not None:
            self._services.picker.finished(self._pick)
            self._services.metrics.tiers[self.tier.name].inflight.dec()
            self._pick = None
        if self._response is not None and close:
            self._response.close()
            self._response = None


def _end_wait(waiting: Gauge | None) -> None:
    """The request no longer waits for the tier it waited for."""
    if waiting is not None:
        waiting.dec()


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
