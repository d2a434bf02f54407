"""One request's conversation with a gateway, message by message.

A data plane tells its body modes in the first message. In full duplex, which the endpoint picker
protocol asks for, headers are answered once the body is here, and what goes on is what is sent
back. A request's body may also come buffered; other modes are refused by name.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import msgspec

from tandem_router.config import TenantConfig
from tandem_router.errors import ApiError, RouterError
from tandem_router.gateway import replies
from tandem_router.gateway.carried import CarriedAnswer
from tandem_router.gateway.messages import BODY_MODES
from tandem_router.gateway.placement import Placed, place
from tandem_router.gateway.replies import DESTINATION, NAMESPACE
from tandem_router.limits.bodies import HeldBodies
from tandem_router.openai.body import Bodies
from tandem_router.openai.headers import parse_headers
from tandem_router.openai.request import PATHS, Kind, parse_inference
from tandem_router.proxy.arrival import admit
from tandem_router.proxy.context import Services
from tandem_router.proxy.faults import RequestRefused
from tandem_router.proxy.random_ids import new_request_id
from tandem_router.telemetry.logs import REQUEST_ID

logger = logging.getLogger("tandem.router")

KINDS: dict[str, Kind] = {path: kind for kind, path in PATHS.items()}
DUPLEX = "FULL_DUPLEX_STREAMED"
REQUEST_MODES = (DUPLEX, "BUFFERED")
RESPONSE_MODES = (DUPLEX,)
SUBSET_NAMESPACE, SUBSET = "envoy.lb.subset_hint", "x-gateway-destination-endpoint-subset"
SERVED = "x-gateway-destination-endpoint-served"
# Who a request is from, and what a client may have invented, is nothing for a worker.
_NOT_FOR_WORKERS = frozenset(
    {"accept-encoding", "authorization", "x-api-key", "cookie", SUBSET, DESTINATION}
)
# What browsers send is looked at by the router's own address, which knows the allowed origins.
_OF_BROWSERS = frozenset({b"origin", b"sec-fetch-site"})

Headers = list[tuple[bytes, bytes]]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]


class ProtocolError(RouterError):
    """What a data plane sends is not the protocol."""


class ClientLeft(Exception):
    """Nobody waits for an answer any more."""


class Caller(Protocol):
    """Who asks."""

    @property
    def tenant(self) -> TenantConfig: ...

    @property
    def key(self) -> str | None: ...


class Front(msgspec.Struct, frozen=True):
    """What all conversations of a router share.

    caller: whose an API key is; raises ApiError (401). declared: what bodies may hold now. home:
    the router's own address, host:port.
    """

    services: Services
    caller: Callable[[str | None], Caller | None]
    bodies: HeldBodies
    declared: Callable[[], Bodies]
    home: str


class Session:
    """receive: the next message, None after the last one."""

    def __init__(self, front: Front, receive: Receive, send: Send) -> None:
        self._front = front
        self._services = front.services
        self._receive = receive
        self._send = send
        self._request_id = new_request_id()
        self._duplex = True  # of the request's body
        self._trailers = False

    async def run(self) -> None:
        """Until the exchange is over. Raises ProtocolError."""
        REQUEST_ID.set(self._request_id)
        started_at = self._services.clock()
        first = await self._receive()
        if first is None:
            return
        if first.WhichOneof("request") != "request_headers":
            raise ProtocolError("request headers come first; set request_header_mode to SEND")
        if first.observability_mode:
            raise ProtocolError("observability_mode asks nothing; an endpoint picker has to answer")
        answer: CarriedAnswer | None = None
        refused: str | None = None
        try:
            self._read_modes(first)
            answer = await self._asked(first, started_at)
            if answer is None:
                await self._echo()
            else:
                await self._carry(answer)
        except ClientLeft:
            pass
        except ApiError as error:
            self._services.metrics.rejected[(error.code or str(error.status),)].inc()
            word, refused = error.code or "refused", error.message
            await self._instead(error.status, error.body(), error.headers(), word)
        except RequestRefused as refusal:
            extra, refused = [(b"x-should-retry", b"false")], str(refusal)
            await self._instead(refusal.status, refusal.body, extra, "refused_by_worker")
        finally:
            if answer is not None:
                answer.end()
            if self._services.tracing is not None:
                self._services.tracing.end(self._request_id, refused)

    async def _instead(self, status: int, body: bytes, extra: Headers, why: str) -> None:
        await self._send(replies.instead(status, body, extra, self._request_id, why))

    # -- the request ------------------------------------------------------------------------

    def _read_modes(self, first: Any) -> None:
        """Raises ApiError for a mode in which an answer cannot be picked or read."""
        if not first.HasField("protocol_config"):
            return  # as the endpoint picker protocol has it
        told = first.protocol_config
        for side, number, known in (
            ("request", told.request_body_mode, REQUEST_MODES),
            ("response", told.response_body_mode, RESPONSE_MODES),
        ):
            mode = BODY_MODES[number] if 0 <= number < len(BODY_MODES) else str(number)
            if mode not in known:
                raise ApiError(
                    500,
                    f"the gateway's external processor has {side}_body_mode {mode}; a Tandem "
                    f"router needs {' or '.join(known)}: set its processing_mode",
                    type="server_error",
                    code="gateway_body_mode",
                )
            if side == "request":
                self._duplex = mode == DUPLEX

    async def _asked(self, first: Any, started_at: float) -> CarriedAnswer | None:
        """Answer the request's messages; None where the router's own address has it now."""
        received, services = first.request_headers, self._services
        headers = _headers(received.headers)
        named = dict(headers)
        kind = KINDS.get(named.get(b":path", b"").partition(b"?")[0].decode("latin-1"))
        plain = named.get(b"content-encoding", b"identity") == b"identity"
        by_browser = not _OF_BROWSERS.isdisjoint(named)
        subset = _subset(first)
        if (
            kind is None
            or received.end_of_stream
            or named.get(b":method") != b"POST"
            or not plain
            or by_browser
        ):
            self._check_home(subset)
            await self._send(replies.headers("request", endpoints=self._front.home))
            return None
        limits = services.config.limits
        plain_headers = [(name, value) for name, value in headers if not name.startswith(b":")]
        read = parse_headers(plain_headers, limits)
        caller = self._front.caller(read.api_key)
        tenant = caller.tenant.name if caller is not None else "anonymous"
        key = caller.key if caller is not None else None
        services.ledger.check(tenant, 0.0, key)
        held = self._front.bodies.hold(tenant if caller is not None else "a gateway")
        try:
            if not self._duplex:
                await self._send(replies.headers("request"))
            body = await self._body(held.grow)
            request = parse_inference(kind, body, self._front.declared())
            if services.tracing is not None:
                name = f"{kind} {services.config.name}"
                services.tracing.begin(self._request_id, name, plain_headers)
            arrival = admit(services, request, read, tenant, key, self._request_id, started_at)
            placed = await place(services, arrival, subset)
            if placed is None:
                self._check_home(subset)
                await self._pass_on(self._front.home, [], [], body, changed=False)
                return None
            answer = CarriedAnswer(services, arrival, placed)
            try:
                await self._to_worker(placed, named, body)
            except BaseException:
                answer.end()
                raise
            return answer
        finally:
            held.release()

    async def _body(self, grow: Callable[[int], None]) -> bytes:
        """All of the body. Raises ApiError (408, 413, 429, 503), ClientLeft."""
        limits, parts, size = self._services.config.limits, [], 0
        try:
            async with asyncio.timeout(limits.body_timeout_s):
                while True:
                    message = await self._receive()
                    which = message.WhichOneof("request") if message is not None else None
                    if which == "request_trailers":
                        self._trailers = True
                        break
                    if which != "request_body":
                        raise ClientLeft
                    part = message.request_body.body
                    size += len(part)
                    if size > limits.max_body_bytes:
                        raise ApiError(
                            413,
                            f"the request body is larger than {limits.max_body_bytes} bytes",
                            code="body_too_large",
                        )
                    grow(len(part))
                    parts.append(part)
                    if message.request_body.end_of_stream or not self._duplex:
                        break
        except TimeoutError:
            raise ApiError(
                408, f"the request body did not arrive within {limits.body_timeout_s:g} s"
            ) from None
        return b"".join(parts)

    async def _to_worker(self, placed: Placed, named: dict[bytes, bytes], body: bytes) -> None:
        setting = [*placed.headers, (b"content-length", b"%d" % len(placed.body))]
        removing = [
            name
            for name in (each.decode("latin-1") for each in named)
            if name in _NOT_FOR_WORKERS or name.startswith("x-tandem-")
        ]
        changed = placed.body != body
        await self._pass_on(placed.endpoints, setting, removing, placed.body, changed)

    async def _pass_on(
        self, endpoints: str, setting: Headers, removing: list[str], body: bytes, changed: bool
    ) -> None:
        if not self._duplex:
            new = body if changed else None
            await self._send(replies.whole_body("request", new, setting, removing, endpoints))
            return
        await self._send(replies.headers("request", setting, removing, endpoints))
        for part in replies.streamed_body("request", body, last=not self._trailers):
            await self._send(part)
        if self._trailers:
            await self._send(replies.trailers("request"))

    def _check_home(self, subset: frozenset[str] | None) -> None:
        home = self._front.home
        host = home.rpartition(":")[0].strip("[]")
        if subset is not None and subset.isdisjoint((home, host)):
            raise ApiError(
                503,
                "this request needs the router itself, and the gateway can reach only "
                f"{len(subset)} endpoints that {home} is not among; take the router's pods into "
                "the pool",
                type="service_unavailable",
                code="router_not_in_pool",
                retry=True,
                retry_after_s=5.0,
            )

    # -- the answer -------------------------------------------------------------------------

    async def _carry(self, answer: CarriedAnswer) -> None:
        """Pass the worker's answer on. Raises ApiError, RequestRefused to say instead of it."""
        while (message := await self._receive()) is not None:
            which = message.WhichOneof("request")
            if which == "response_headers":
                received = message.response_headers
                named = _headers(received.headers)
                status = dict(named).get(b":status", b"")
                answer.began(int(status) if status.isdigit() else 0, named, _served(message))
                if received.end_of_stream:
                    await self._part(answer, b"", last=True)
            elif which == "response_body":
                part = message.response_body
                await self._part(answer, part.body, part.end_of_stream)
            elif which == "response_trailers":
                await self._part(answer, b"", last=True, trailers=True)
                await self._send(replies.trailers("response"))
            else:
                await self._echoed(message)

    async def _part(
        self, answer: CarriedAnswer, data: bytes, last: bool, trailers: bool = False
    ) -> None:
        """Headers wait for the first token, or for the whole of what is no stream."""
        shown, headers = answer.read(data, last)
        if headers is not None:
            await self._send(replies.headers("response", headers, answer.hidden()))
        if shown or (last and not trailers):
            for part in replies.streamed_body("response", shown, last and not trailers):
                await self._send(part)

    async def _echo(self) -> None:
        """What the router's own address serves goes by unread."""
        while (message := await self._receive()) is not None:
            await self._echoed(message)

    async def _echoed(self, message: Any) -> None:
        which = message.WhichOneof("request") or ""
        side, _, part = which.partition("_")
        if part == "headers":
            await self._send(replies.headers(side))
        elif part == "trailers":
            await self._send(replies.trailers(side))
        elif part == "body":
            body = getattr(message, which)
            if side == "request" and not self._duplex:
                await self._send(replies.whole_body(side))
                return
            for each in replies.streamed_body(side, body.body, body.end_of_stream):
                await self._send(each)
        else:
            raise ProtocolError("a message that holds nothing known")


def _headers(map_: Any) -> Headers:
    """Newer data planes send bytes, older ones text."""
    return [(each.key.encode(), each.raw_value or each.value.encode()) for each in map_.headers]


def _metadata(message: Any, namespace: str, key: str) -> Any:
    for entry in message.metadata_context.filter_metadata:
        # A value may be there and hold nothing, which reading it would raise for.
        fields = entry.value.fields
        if entry.key == namespace and key in fields and fields[key].WhichOneof("kind"):
            return entry.value[key]
    return None


def _subset(message: Any) -> frozenset[str] | None:
    """The endpoints that the gateway can reach, as a list or as text with commas; None: any."""
    told = _metadata(message, SUBSET_NAMESPACE, SUBSET)
    if told is None:
        return None
    texts = [told] if isinstance(told, str) else [each for each in told if isinstance(each, str)]
    return frozenset(each.strip() for text in texts for each in text.split(",") if each.strip())


def _served(message: Any) -> str | None:
    told = _metadata(message, NAMESPACE, SERVED)
    return told if isinstance(told, str) and told else None
