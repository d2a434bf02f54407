"""The raw ASGI path of `/v1/*`: read, check, admit, then hand over to an handler.

No framework in between: a request here costs the router's own work and the server's, and bytes
of a stream are forwarded as they come. Every refusal is an OpenAI error object, or Anthropic's
under /v1/messages.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Sequence
from typing import Any

import msgspec

from tandem_router.anthropic import reply as anthropic_reply
from tandem_router.anthropic import request as anthropic_request
from tandem_router.api import description
from tandem_router.api.api_keys import Authenticator, Caller
from tandem_router.api.feedback import PATH as FEEDBACK
from tandem_router.api.feedback import Feedback
from tandem_router.api.origin import answer_preflight, for_page, foreign, is_foreign, readable_by
from tandem_router.api.request_body import ClientGone, Receive, Scope, check_size, read_body
from tandem_router.api.tokenizing import COUNT_TOKENS, TOKENIZING, Tokenizing
from tandem_router.config import RouterConfig
from tandem_router.errors import ApiError
from tandem_router.http.exchange import Exchange
from tandem_router.http.known_heads import Head
from tandem_router.limits.bodies import HeldBodies
from tandem_router.openai import responses_api
from tandem_router.openai.asgi import NOSNIFF, Send
from tandem_router.openai.body import Bodies
from tandem_router.openai.headers import RequestHeaders, parse_headers
from tandem_router.openai.json_body import parse_json
from tandem_router.openai.request import PATHS, InferenceRequest, Kind, parse_inference
from tandem_router.proxy.arrival import admit
from tandem_router.proxy.context import Services
from tandem_router.proxy.faults import RequestRefused
from tandem_router.proxy.random_ids import new_request_id
from tandem_router.proxy.request_handler import RequestHandler
from tandem_router.telemetry.logs import REQUEST_ID

logger = logging.getLogger("tandem.router")

INFERENCE: dict[str, Kind] = {path: kind for kind, path in PATHS.items()}
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
ABOUT = frozenset({"/openapi.json", "/version"})
POSTS = frozenset({*INFERENCE, *TOKENIZING, RESPONSES, MESSAGES, COUNT_TOKENS, FEEDBACK})
# Known paths of the OpenAI API that no tier serves: named, so that a client sees it is not a typo.
NOT_SERVED = (
    "assistants",
    "audio",
    "batches",
    "conversations",
    "files",
    "fine_tuning",
    "images",
    "moderations",
    "realtime",
    "threads",
    "uploads",
    "vector_stores",
    "videos",
)


class Reading(msgspec.Struct, frozen=True):
    """What the head of an ordinary request for an answer says."""

    kind: Kind
    headers: RequestHeaders


class Asked(msgspec.Struct, frozen=True):
    """Who asks for an answer, on what terms, and where it goes."""

    headers: RequestHeaders
    caller: Caller | None
    client: Exchange | Scope  # the exchange of our own server, another server's scope
    receive: Receive
    send: Send
    request_id: str
    started_at: float


class DataPath:
    """ASGI application for the paths that `handles` accepts."""

    def __init__(self, services: Services, authenticator: Authenticator) -> None:
        self._services = services
        self._authenticator = authenticator
        self._created = int(services.wall_clock())
        self._feedback = Feedback(services)
        self._tokenizing = Tokenizing(services)
        self._description = description.document(services.config)
        limits = services.config.limits
        self.declared = Bodies(limits)
        self.bodies = HeldBodies(limits.max_held_body_bytes, limits.max_held_body_bytes_per_sender)

    def reconfigure(self, config: RouterConfig) -> None:
        """Other bounds of bodies from now on; those that are held stay counted."""
        self._description = description.document(config)
        self.declared = Bodies(config.limits)
        self.bodies.max_bytes = config.limits.max_held_body_bytes
        self.bodies.max_bytes_per_sender = config.limits.max_held_body_bytes_per_sender

    @staticmethod
    def handles(path: str) -> bool:
        return path.startswith("/v1/") or path == "/v1" or path in TOKENIZING or path in ABOUT

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = new_request_id()
        REQUEST_ID.set(request_id)
        page = readable_by(scope["headers"], self._services.config.access.cors_origins)
        if page is not None:
            send = for_page(send, page)
            if scope["method"] == "OPTIONS":
                await answer_preflight(scope["headers"], send)
                return
        if scope["path"].startswith(MESSAGES):
            send = anthropic_reply.MessagesSend(send, request_id)
        # Where the page is not the router's own, nor an allowed one's: only a key may speak for it.
        stranger = is_foreign(scope["headers"], self._services.config.access.cors_origins)
        try:
            await self._handle(scope, receive, send, request_id, stranger)
        except (ApiError, RequestRefused) as refusal:
            await self._refused(refusal, send, request_id)
        except ClientGone:
            pass

    def read(self, head: Head) -> Reading | None:
        """What `answer` needs of a head; None where requests with it go the general way.

        The general way's own checks, made once for all requests with this head and configuration.
        """
        scope, headers = head.scope, head.headers
        config = self._services.config
        kind = INFERENCE.get(scope["path"])
        if kind is None or scope["method"] != "POST" or b"content-encoding" in head.names:
            return None
        origins = config.access.cors_origins
        if readable_by(headers, origins) is not None or is_foreign(headers, origins):
            return None
        try:
            return Reading(kind, parse_headers(headers, config.limits))
        except ApiError:
            return None

    async def answer(self, exchange: Exchange, reading: Reading) -> None:
        """As `__call__`, for a request that is here whole and whose head has been read."""
        request_id = new_request_id()
        REQUEST_ID.set(request_id)
        services, send = self._services, exchange.send
        started_at = services.clock()
        try:
            caller = self._authenticator.caller(reading.headers.api_key)
            if caller is None:
                tenant, key, sender = "anonymous", None, exchange.connection.address
            else:
                tenant, key, sender = caller.tenant.name, caller.key, caller.tenant.name
            services.ledger.check(tenant, 0.0, key)
            body = exchange.whole_body()
            assert body is not None
            if len(body) > self.declared.limits.max_body_bytes:
                check_size(len(body), services.config.limits)
            held = self.bodies.hold(sender, len(body))
            try:
                asked = Asked(
                    reading.headers,
                    caller,
                    exchange,
                    exchange.receive,
                    send,
                    request_id,
                    started_at,
                )
                if services.tracing is None:
                    await self._admitted(asked, parse_inference(reading.kind, body, self.declared))
                else:
                    await self._infer(asked, reading.kind, body)
            finally:
                held.release()
        except (ApiError, RequestRefused) as refusal:
            await self._refused(refusal, send, request_id)
        except ClientGone:
            pass

    async def _refused(
        self, refusal: ApiError | RequestRefused, send: Send, request_id: str
    ) -> None:
        if isinstance(refusal, ApiError):
            code = refusal.code or str(refusal.status)
            self._services.metrics.rejected[(code,)].inc()
            await respond_error(send, refusal, request_id)
        else:
            headers = [(b"x-should-retry", b"false")]
            await respond(send, refusal.status, refusal.body, request_id, headers)

    async def _handle(
        self, scope: Scope, receive: Receive, send: Send, request_id: str, stranger: bool
    ) -> None:
        started_at = self._services.clock()
        limits = self._services.config.limits
        path: str = scope["path"]
        headers = parse_headers(scope["headers"], limits)
        caller = self._authenticator.caller(headers.api_key)
        if path == "/v1/models" or path.startswith("/v1/models/"):
            _require_method(scope["method"], "GET", path)
            body = self._models(path.removeprefix("/v1/models").removeprefix("/"))
            await respond(send, 200, body, request_id)
            return
        if path in ABOUT:
            _require_method(scope["method"], "GET", path)
            said = description.VERSION if path == "/version" else self._description
            await respond(send, 200, said, request_id)
            return
        if path not in POSTS:
            raise _unknown_path(path)
        _require_method(scope["method"], "POST", path)
        if caller is None and stranger:
            raise foreign(scope["headers"])
        # Whoever is above a limit is told so before a byte of the body is read for it.
        tenant = caller.tenant.name if caller is not None else "anonymous"
        self._services.ledger.check(tenant, 0.0, caller.key if caller is not None else None)
        held = self.bodies.hold(tenant if caller is not None else _address(scope.get("client")))
        try:
            body = await read_body(scope, receive, limits, held)
            if path in TOKENIZING:
                bare = path.removeprefix("/v1")
                status, reply = await self._tokenizing.ask(bare, body, caller, request_id)
                await respond(send, status, reply, request_id)
                return
            if path == COUNT_TOKENS:
                status, reply = await self._tokenizing.count(body, caller, request_id)
                await respond(send, status, reply, request_id)
                return
            if path == FEEDBACK:
                key = caller.key if caller is not None else None
                await respond(send, 200, await self._feedback.take(body, tenant, key), request_id)
                return
            kind = INFERENCE.get(path, "chat")
            if path in (RESPONSES, MESSAGES):
                fields = parse_json(body, limits.max_json_depth)
                if path == RESPONSES:
                    body = msgspec.json.encode(responses_api.to_chat(fields))
                    send = responses_api.ResponsesSend(send, fields, request_id)
                else:
                    body = msgspec.json.encode(anthropic_request.to_chat(fields))
            client = scope.get("extensions", {}).get("tandem.exchange") or scope
            asked = Asked(headers, caller, client, receive, send, request_id, started_at)
            await self._infer(asked, kind, body)
        finally:
            held.release()

    async def _infer(self, asked: Asked, kind: Kind, body: bytes) -> None:
        services = self._services
        request = parse_inference(kind, body, self.declared)
        tracing = services.tracing
        if tracing is None:
            await self._admitted(asked, request)
            return
        refused = None
        client = asked.client
        scope = client.scope if isinstance(client, Exchange) else client
        tracing.begin(asked.request_id, f"{kind} {services.config.name}", scope["headers"])
        try:
            await self._admitted(asked, request)
        except (ApiError, RequestRefused) as error:
            refused = str(error) or type(error).__name__
            raise
        finally:
            tracing.end(asked.request_id, refused)

    async def _admitted(self, asked: Asked, request: InferenceRequest) -> None:
        services, caller, client = self._services, asked.caller, asked.client
        arrival = admit(
            services,
            request,
            asked.headers,
            caller.tenant.name if caller is not None else "anonymous",
            caller.key if caller is not None else None,
            asked.request_id,
            asked.started_at,
        )
        # Our own server calls; any other has to be asked.
        exchange = client if isinstance(client, Exchange) else None
        task = exchange.task if exchange is not None else asyncio.current_task()
        assert task is not None
        handler = RequestHandler(services, arrival, asked.send, task)
        watcher: asyncio.Future[None] | None = None
        if exchange is not None:
            exchange.on_gone = handler.leave
        else:
            watcher = asyncio.ensure_future(_watch(asked.receive, handler))
        try:
            await handler.run()
        except asyncio.CancelledError:
            if not handler.left:
                raise
            task.uncancel()
            raise ClientGone from None
        except (ApiError, RequestRefused):
            raise
        except Exception:
            logger.exception("request %s failed inside the router", asked.request_id)
            error = ApiError(
                500,
                f"the router failed on this request; its log names {asked.request_id}",
                type="server_error",
                code="internal_error",
            )
            if not handler.headers_sent:
                raise error from None
            body = b"data: " + error.body() + b"\n\n"
            await asked.send({"type": "http.response.body", "body": body})
        finally:
            if exchange is not None:
                exchange.on_gone = None
            if watcher is not None:
                watcher.cancel()

    def _models(self, name: str) -> bytes:
        config = self._services.config
        names = [config.name, *(tier.name for tier in config.tiers)]
        names += [tier.served_model for tier in config.tiers if tier.served_model not in names]
        entries = [
            {"id": each, "object": "model", "created": self._created, "owned_by": "tandem"}
            for each in names
        ]
        entries += [
            {**entries[0], "id": adapter, "parent": config.tier(tier).served_model}
            for adapter, tier in self._services.routing.adapters().items()
        ]
        if not name:
            return json.dumps({"object": "list", "data": entries}).encode()
        for entry in entries:
            if entry["id"] == name:
                return json.dumps(entry).encode()
        raise ApiError(
            404, f"the model {name[:100]!r} does not exist", param="model", code="model_not_found"
        )


async def _watch(receive: Receive, handler: RequestHandler) -> None:
    """Tell that the client has left, where the server has to be asked for it."""
    while (await receive())["type"] != "http.disconnect":
        pass
    handler.leave()


def _address(client: Sequence[Any] | None) -> str:
    return str(client[0]) if client else ""


def _require_method(given: str, wanted: str, path: str) -> None:
    if given != wanted:
        raise ApiError(405, f"{path} takes {wanted}, not {given}", code="method_not_allowed")


def _unknown_path(path: str) -> ApiError:
    family = path.removeprefix("/v1/").split("/")[0]
    if family in NOT_SERVED:
        return ApiError(
            404,
            f"/v1/{family} is not served here; GET /openapi.json says what is",
            code="unsupported_endpoint",
        )
    return ApiError(404, f"there is no {path[:200]}", code="unknown_url")


async def respond(
    send: Send,
    status: int,
    body: bytes,
    request_id: str,
    headers: list[tuple[bytes, bytes]] | None = None,
) -> None:
    """One complete JSON reply."""
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
                NOSNIFF,
                (b"x-request-id", request_id.encode()),
                *(headers or ()),
            ],
        }
    )
    await send({"type": "http.response.body", "body": body})


async def respond_error(send: Send, error: ApiError, request_id: str) -> None:
    await respond(send, error.status, error.body(), request_id, error.headers())
