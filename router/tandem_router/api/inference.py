"""The raw ASGI path of `/v1/*`: read, check, admit, then hand over to an handler.

No framework in between: a request here costs the router's own work and the server's, and bytes
of a stream are forwarded as they come. Every refusal is an OpenAI error object.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets

from tandem_router.api.api_keys import Authenticator, Caller
from tandem_router.api.feedback import PATH as FEEDBACK
from tandem_router.api.feedback import Feedback
from tandem_router.api.origin import foreign, is_foreign
from tandem_router.api.request_body import ClientGone, Receive, Scope, read_body
from tandem_router.asgi import NOSNIFF, Send
from tandem_router.balancing.prefix_index import BYTES_PER_TOKEN
from tandem_router.config import RouterConfig
from tandem_router.errors import ApiError, UpstreamError
from tandem_router.limits.bodies import HeldBodies
from tandem_router.limits.ledger import Used
from tandem_router.openai.request import (
    Kind,
    RequestHeaders,
    parse_headers,
    parse_inference,
    parse_json,
)
from tandem_router.openai.responses_api import ResponsesSend, to_chat
from tandem_router.prices import list_price
from tandem_router.proxy.arrival import admit
from tandem_router.proxy.context import Services
from tandem_router.proxy.faults import RequestRefused
from tandem_router.proxy.request_handler import RequestHandler

logger = logging.getLogger("tandem.router")

INFERENCE: dict[str, Kind] = {"/v1/chat/completions": "chat", "/v1/completions": "completions"}
TOKENIZING = frozenset({"/tokenize", "/detokenize", "/v1/tokenize", "/v1/detokenize"})
# Known paths of the OpenAI API that no tier serves: named, so that a client sees it is not a typo.
NOT_SERVED = (
    "assistants",
    "audio",
    "batches",
    "conversations",
    "embeddings",
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


class DataPath:
    """ASGI application for the paths that `handles` accepts."""

    def __init__(self, services: Services, authenticator: Authenticator) -> None:
        self._services = services
        self._authenticator = authenticator
        self._created = int(services.wall_clock())
        self._feedback = Feedback(services)
        limits = services.config.limits
        self.bodies = HeldBodies(limits.max_held_body_bytes, limits.max_held_body_bytes_per_sender)

    def reconfigure(self, config: RouterConfig) -> None:
        """Other bounds of bodies from now on; those that are held stay counted."""
        self.bodies.max_bytes = config.limits.max_held_body_bytes
        self.bodies.max_bytes_per_sender = config.limits.max_held_body_bytes_per_sender

    @staticmethod
    def handles(path: str) -> bool:
        return path.startswith("/v1/") or path == "/v1" or path in TOKENIZING

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = secrets.token_hex(16)
        try:
            await self._handle(scope, receive, send, request_id)
        except ApiError as error:
            self._services.metrics.rejected[(error.code or str(error.status),)].inc()
            await respond_error(send, error, request_id)
        except RequestRefused as refusal:
            headers = [(b"x-should-retry", b"false")]
            await respond(send, refusal.status, refusal.body, request_id, headers)
        except ClientGone:
            pass

    async def _handle(self, scope: Scope, receive: Receive, send: Send, request_id: str) -> None:
        started_at = self._services.clock()
        limits = self._services.config.limits
        path: str = scope["path"]
        headers = parse_headers(scope["headers"], limits)
        caller = self._authenticator.caller(headers.api_key)
        if path == "/v1/models" or path.startswith("/v1/models/"):
            _require_method(scope, "GET")
            body = self._models(path.removeprefix("/v1/models").removeprefix("/"))
            await respond(send, 200, body, request_id)
            return
        kind = INFERENCE.get(path)
        if kind is None and path not in TOKENIZING and path not in ("/v1/responses", FEEDBACK):
            raise _unknown_path(path)
        _require_method(scope, "POST")
        if caller is None and is_foreign(
            scope["headers"], self._services.config.access.cors_origins
        ):
            raise foreign(scope["headers"])
        # Whoever is above a limit is told so before a byte of the body is read for it.
        tenant = caller.tenant.name if caller is not None else "anonymous"
        self._services.ledger.check(tenant, 0.0, caller.key if caller is not None else None)
        held = self.bodies.hold(tenant if caller is not None else _address(scope))
        try:
            body = await read_body(scope, receive, limits, held)
            if path in TOKENIZING:
                await self._tokenize(path.removeprefix("/v1"), body, caller, send, request_id)
                return
            if path == FEEDBACK:
                key = caller.key if caller is not None else None
                await respond(send, 200, await self._feedback.take(body, tenant, key), request_id)
                return
            if kind is None:
                fields = parse_json(body, limits.max_json_depth)
                body = json.dumps(to_chat(fields), ensure_ascii=False).encode()
                send = ResponsesSend(send, fields, request_id)
                kind = "chat"
            await self._infer(
                kind, body, headers, caller, scope, receive, send, request_id, started_at
            )
        finally:
            held.release()

    async def _infer(
        self,
        kind: Kind,
        body: bytes,
        headers: RequestHeaders,
        caller: Caller | None,
        scope: Scope,
        receive: Receive,
        send: Send,
        request_id: str,
        started_at: float,
    ) -> None:
        services = self._services
        request = parse_inference(kind, body, services.config.limits)
        arrival = admit(
            services,
            request,
            headers,
            caller.tenant.name if caller is not None else "anonymous",
            caller.key if caller is not None else None,
            request_id,
            started_at,
        )
        handler = RequestHandler(services, arrival, send)
        task = asyncio.current_task()
        assert task is not None
        gone = False

        def leave() -> None:
            nonlocal gone
            if not handler.complete:
                gone = True
                task.cancel()

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            leave()

        # Our own server calls; any other has to be asked.
        exchange = scope.get("extensions", {}).get("tandem.exchange")
        watcher: asyncio.Future[None] | None = None
        if exchange is not None:
            exchange.on_gone = leave
        else:
            watcher = asyncio.ensure_future(watch())
        try:
            await handler.run()
        except asyncio.CancelledError:
            if not gone:
                raise
            task.uncancel()
            raise ClientGone from None
        except (ApiError, RequestRefused):
            raise
        except Exception:
            logger.exception("request %s failed inside the router", request_id)
            error = ApiError(
                500,
                f"the router failed on this request; its log names {request_id}",
                type="server_error",
                code="internal_error",
            )
            if not handler.headers_sent:
                raise error from None
            await send({"type": "http.response.body", "body": b"data: " + error.body() + b"\n\n"})
        finally:
            if watcher is not None:
                watcher.cancel()
            else:
                exchange.on_gone = None

    def _models(self, name: str) -> bytes:
        config = self._services.config
        names = [config.name, *(tier.name for tier in config.tiers)]
        names += [tier.served_model for tier in config.tiers if tier.served_model not in names]
        entries = [
            {"id": each, "object": "model", "created": self._created, "owned_by": "tandem"}
            for each in names
        ]
        if not name:
            return json.dumps({"object": "list", "data": entries}).encode()
        for entry in entries:
            if entry["id"] == name:
                return json.dumps(entry).encode()
        raise ApiError(
            404, f"the model {name[:100]!r} does not exist", param="model", code="model_not_found"
        )

    async def _tokenize(
        self, path: str, body: bytes, caller: Caller | None, send: Send, request_id: str
    ) -> None:
        """Admitted like any request, by as many tokens as its body may stand for."""
        ledger = self._services.ledger
        tokens = len(body) / BYTES_PER_TOKEN
        tenant = caller.tenant.name if caller is not None else "anonymous"
        hold = ledger.hold(tenant, tokens, caller.key if caller is not None else None)
        try:
            await self._ask_tokenizer(path, body, send, request_id)
        finally:
            ledger.settle(hold, Used(tokens))

    async def _ask_tokenizer(self, path: str, body: bytes, send: Send, request_id: str) -> None:
        """Proxied to a worker of the named tier; the router's own name means the dearest pool.

        Never to a provider: it has no such path, and what goes to workers is not for it to see.
        """
        services = self._services
        fields = parse_json(body, services.config.limits.max_json_depth)
        model = fields.get("model", services.config.name)
        if not isinstance(model, str):
            raise ApiError(400, "`model` must be a string", param="model")
        pools = [tier for tier in services.config.tiers if tier.kind == "pool"]
        forced = services.routing.forced_tier(model)
        served = [tier for tier in pools if forced in (None, tier.name)]
        if not served:
            which = f"tier {forced!r} is a provider's" if forced else "every tier is a provider's"
            names = ", ".join(tier.name for tier in pools) or "none"
            raise ApiError(
                404,
                f"{which}, which has no tokenizer here; tiers that have: {names}",
                param="model",
                code="unsupported_by_tier",
            )
        tier = max(reversed(served), key=list_price).name
        headers = [(b"content-type", b"application/json"), (b"x-request-id", request_id.encode())]
        if services.peer_token:
            headers.append((b"x-tandem-peer-token", services.peer_token.encode()))
        for worker in services.picker.usable(tier):
            try:
                response = await services.client.request(
                    "POST", worker.url + path, headers=headers, body=body
                )
                payload = await response.read_all()
            except UpstreamError as error:
                services.picker.failed(worker, str(error))
                continue
            await respond(send, response.status, payload, request_id)
            return
        raise ApiError(
            503,
            f"tier {tier!r} has no worker now; retry later",
            type="service_unavailable",
            code="no_worker",
            retry=True,
            retry_after_s=5.0,
        )


def _address(scope: Scope) -> str:
    client = scope.get("client")
    return str(client[0]) if client else ""


def _require_method(scope: Scope, method: str) -> None:
    if scope["method"] != method:
        raise ApiError(
            405, f"{scope['path']} takes {method}, not {scope['method']}", code="method_not_allowed"
        )


def _unknown_path(path: str) -> ApiError:
    family = path.removeprefix("/v1/").split("/")[0]
    if family in NOT_SERVED:
        return ApiError(
            404,
            f"/v1/{family} is not served here; /v1/chat/completions, /v1/completions and "
            "/v1/responses are",
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
