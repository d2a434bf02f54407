"""The worker's HTTP routes as one ASGI application.

Raw ASGI because each token is one write: nothing stands between the engine's event and the socket.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any
from urllib.parse import unquote

from tandem_worker.disaggregation.protocol import AbortOrder, LinkCheckOrder
from tandem_worker.errors import DOC_URL, RequestError, WorkerError, explanations
from tandem_worker.openai.body import DetokenizeBody, TokenizeBody
from tandem_worker.openai.context import RequestContext
from tandem_worker.openai.embeddings import EmbeddingsBody, embeddings_reply
from tandem_worker.openai.fields import read_object
from tandem_worker.openai.request import (
    CompletionRequest,
    parse_chat,
    parse_completion,
    salt_digest,
    with_defaults,
)
from tandem_worker.openai.response import DONE, ReplyWriter, error_chunk
from tandem_worker.server import browsers, ticket
from tandem_worker.server.call import Call, Receive, Scope, Send, read_body, unless_gone
from tandem_worker.server.description import RELEASE, document
from tandem_worker.server.embedding import embed
from tandem_worker.server.generation import Generation
from tandem_worker.server.preparation import (
    Prepared,
    check_vocabulary,
    encode,
    max_tokens,
    prepare,
    prepare_inputs,
    with_grammar,
)
from tandem_worker.server.request_headers import MAX_TENANT_CHARS, context_of, tenant_of
from tandem_worker.server.worker import Worker
from tandem_worker.telemetry.logs import REQUEST_ID

logger = logging.getLogger(__name__)


Handler = Callable[[Call], Awaitable[None]]


def _not_a_peer(why: str) -> RequestError:
    return RequestError(
        f"this worker serves the router and its peers only; {why}",
        status=401,
        type="authentication_error",
        code="invalid_peer_token",
        headers={"connection": "close"},
    )


class WorkerApp:
    """Routes of one worker; an ASGI application."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._routes: dict[tuple[str, str], Handler] = {
            ("GET", "/health"): self._health,
            ("GET", "/ready"): self._ready,
            ("GET", "/metrics"): self._metrics,
            ("GET", "/v1/models"): self._models,
            ("GET", "/v1/load"): self._load,
            ("GET", "/openapi.json"): self._openapi,
            ("GET", "/version"): self._version,
            ("POST", "/v1/chat/completions"): self._chat,
            ("POST", "/v1/completions"): self._completions,
            ("POST", "/v1/embeddings"): self._embeddings,
            ("POST", "/tokenize"): self._tokenize,
            ("POST", "/detokenize"): self._detokenize,
            ("POST", "/drain"): self._drain,
            ("POST", "/internal/prefill"): self._prefill,
            ("POST", "/internal/abort"): self._abort,
            ("POST", "/internal/kv-link"): self._kv_link,
        }
        self._open = {"/health", "/ready", "/metrics"}
        self._names = browsers.names_of(worker.host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            return
        headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
        method, path = scope["method"], scope["path"]
        call = Call(method, path, headers, b"", receive, send)
        started = False

        async def tracking_send(message: dict[str, Any]) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            handler = self._routes.get((method, path))
            if handler is None and method == "GET" and path.startswith("/v1/models/"):
                handler = self._model
            if handler is None and method == "GET" and path.startswith(DOC_URL):
                handler = self._explain
            if handler is None:
                raise _no_route(method, path, {known for _, known in self._routes})
            digest = None
            if path not in self._open and not path.startswith(DOC_URL):
                digest = self._check_sender(scope, headers)
            body = await read_body(receive) if method == "POST" else b""
            if digest is not None and hashlib.sha256(body).hexdigest() != digest:
                raise _not_a_peer("the body is not the one that the ticket was written for")
            call = Call(method, path, headers, body, receive, tracking_send)
            await handler(call)
        except RequestError as error:
            if not started:
                await call.reply(error.body(), status=error.status, headers=error.headers)
        except ConnectionResetError:
            pass  # the client went away while its body was read
        except asyncio.CancelledError:
            raise
        except Exception:
            logger.exception("%s %s failed", method, path)
            if not started:
                failure = RequestError(
                    "internal error; the worker's log has the details",
                    status=500,
                    type="server_error",
                )
                await call.reply(failure.body(), status=500)

    def _check_sender(self, scope: Scope, headers: Mapping[str, str]) -> str | None:
        """Raises RequestError; with a ticket, the digest that the body must have."""
        given = headers.get("x-tandem-peer-token", "").encode()
        tokens, digest = self._worker.peer_tokens(), None
        if tokens and not any(hmac.compare_digest(given, token) for token in tokens):
            if ticket.HEADER not in headers:
                raise _not_a_peer("send x-tandem-peer-token")
            digest = ticket.expected_digest(headers, scope["path"], tokens, time.time())
            if digest is None:
                raise _not_a_peer(
                    "the ticket is not good: for another path or other headers, out of date, or by "
                    "a router with another peer token"
                )
        browsers.check(headers, None if tokens else self._names)
        connection = scope.get("extensions", {}).get("tandem.connection")
        if tokens and connection is not None:
            connection.known()
        return digest

    # -- small routes ----------------------------------------------------------------------------

    async def _health(self, call: Call) -> None:
        failure = self._worker.failure
        if failure is not None:
            await call.reply({"status": "failed", "message": failure}, status=503)
        else:
            await call.reply({"status": "ok"})

    async def _ready(self, call: Call) -> None:
        worker = self._worker
        if worker.failure is not None:
            status = "failed"
        elif worker.is_draining:
            status = "draining"
        else:
            status = "ready" if worker.is_ready else "loading"
        await call.reply({"status": status}, status=200 if worker.is_ready else 503)

    async def _metrics(self, call: Call) -> None:
        text = self._worker.metrics.render()
        await call.reply(text, content_type="text/plain; version=0.0.4; charset=utf-8")

    async def _model(self, call: Call) -> None:
        name, served = unquote(call.path.removeprefix("/v1/models/")), self._described()
        if name != served["id"]:
            raise RequestError(
                f"the model {name!r} is not served here; this worker serves {served['id']!r}",
                status=404,
                param="model",
                code="model_not_found",
            )
        await call.reply(served)

    async def _models(self, call: Call) -> None:
        await call.reply({"object": "list", "data": [self._described()]})

    def _described(self) -> dict[str, Any]:
        worker = self._worker
        return {
            "id": worker.config.served_model,
            "object": "model",
            "created": worker.started_at,
            "owned_by": "tandem",
            "max_model_len": worker.max_model_len,
        }

    async def _openapi(self, call: Call) -> None:
        await call.reply(document(self._worker.config.served_model))

    async def _version(self, call: Call) -> None:
        await call.reply({"version": RELEASE})

    async def _explain(self, call: Call) -> None:
        code = call.path.removeprefix(DOC_URL)
        said = explanations().get(code)
        if said is None:
            known = ", ".join(explanations())
            raise RequestError(
                f"there is no code {code[:100]!r}; there are {known}", status=404, code="not_found"
            )
        await call.reply(said.encode(), content_type="text/plain; charset=utf-8")

    async def _load(self, call: Call) -> None:
        await call.reply(self._worker.load())

    async def _drain(self, call: Call) -> None:
        self._worker.start_draining()
        await call.reply({"draining": True, "num_requests": self._worker.num_requests})

    async def _tokenize(self, call: Call) -> None:
        worker = self._worker
        worker.check_loaded()
        data = read_object(call.body)
        async with worker.preparing.turn(tenant_of(call.headers)):
            if data.get("messages") is not None:
                (token_ids,) = (await prepare(worker, parse_chat(data))).prompts
            else:
                body = TokenizeBody.read(data)
                token_ids = await encode(worker, body.prompt, body)
        await call.reply(
            {
                "tokens": list(token_ids),
                "count": len(token_ids),
                "max_model_len": worker.max_model_len,
            }
        )

    async def _detokenize(self, call: Call) -> None:
        self._worker.check_loaded()
        tokens = tuple(DetokenizeBody.read(read_object(call.body)).tokens)
        check_vocabulary(self._worker, tokens, "tokens")
        text = self._worker.tokenizer.decode(tokens, skip_special_tokens=False)
        await call.reply({"prompt": text})

    # -- completions -----------------------------------------------------------------------------

    async def _chat(self, call: Call) -> None:
        await self._complete(call, parse_chat)

    async def _completions(self, call: Call) -> None:
        await self._complete(call, parse_completion)

    async def _complete(
        self, call: Call, parse: Callable[[Mapping[str, Any]], CompletionRequest]
    ) -> None:
        worker = self._worker
        worker.check_accepting()
        with worker.counted():
            data = with_defaults(read_object(call.body), worker.sampling_defaults)
            await self._answer(call, parse(data))

    async def _answer(self, call: Call, request: CompletionRequest) -> None:
        """Generate and send; aborts when the client leaves."""
        worker = self._worker
        context = context_of(
            call.headers, worker.config.served_model, model=request.model, seed=request.seed
        )
        REQUEST_ID.set(context.request_id)
        with worker.tracing.span(worker.config.role, call.headers, context.request_id):
            await self._traced(call, request, context)

    async def _traced(
        self, call: Call, request: CompletionRequest, context: RequestContext
    ) -> None:
        worker = self._worker
        with worker.places.hold(context.tenant, max(1, len(request.prompts)) * request.n):
            async with worker.preparing.turn(context.tenant):
                prepared = await with_grammar(worker, await prepare(worker, request))
            await self._generated(call, prepared, context)

    async def _generated(self, call: Call, prepared: Prepared, context: RequestContext) -> None:
        worker = self._worker
        request, prompts = prepared.request, prepared.prompts
        limit = max_tokens(worker, request, prompts)
        generation = worker.generate(
            request, prompts, context, limit, lambda: prepared.reader(worker)
        )
        echoed = request.prompts if request.echo else ()
        echo_texts = [
            given
            if isinstance(given, str)
            else worker.tokenizer.whole_text(given, skip_special_tokens=request.skip_special_tokens)
            for given in echoed
        ]
        writer = ReplyWriter(request, context, prompts, worker.tokenizer, echo_texts)
        answer = self._stream if request.stream else self._whole
        try:
            await unless_gone(call, answer(call, generation, writer))
        finally:
            generation.close()
            used = generation.usage()
            worker.tracing.note(
                context.request_id,
                {
                    "gen_ai.request.model": context.model,
                    "gen_ai.usage.input_tokens": used["prompt_tokens"],
                    "gen_ai.usage.output_tokens": used["completion_tokens"],
                    "tandem.prefill_worker": context.prefill_url,
                },
            )

    async def _embeddings(self, call: Call) -> None:
        worker = self._worker
        worker.check_accepting()
        with worker.counted():
            body = EmbeddingsBody.read(read_object(call.body))
            context = context_of(call.headers, worker.config.served_model, model=body.model, seed=0)
            own = worker.embedding
            if own.problem and body.pooling is None:
                raise RequestError(own.problem, param="pooling", code="unsupported_parameter")
            if body.dimensions not in (None, worker.hidden_size):
                raise RequestError(
                    f"dimensions={body.dimensions}: this model's vectors have {worker.hidden_size} "
                    "and were not made to be cut; leave it out",
                    param="dimensions",
                    code="unsupported_parameter",
                )
            with worker.places.hold(context.tenant, len(body.input)):
                async with worker.preparing.turn(context.tenant):
                    prompts = await prepare_inputs(worker, body)
                await unless_gone(call, self._embed(call, body, prompts, context))

    async def _embed(
        self,
        call: Call,
        body: EmbeddingsBody,
        prompts: list[tuple[int, ...]],
        context: RequestContext,
    ) -> None:
        salt, own = salt_digest(body.cache_salt), self._worker.embedding
        vectors = await embed(
            self._worker.engine, prompts, body.pooling or own.pooling, context, salt
        )
        reply = embeddings_reply(
            vectors,
            encoding=body.encoding_format,
            dimensions=body.dimensions,
            model=context.model,
            num_tokens=sum(map(len, prompts)),
            normalize=own.normalize,
        )
        await call.reply(reply, headers={"x-request-id": context.request_id})

    async def _whole(self, call: Call, generation: Generation, writer: ReplyWriter) -> None:
        for delta in generation.resumed_deltas():
            writer.collect(delta)
        async for delta in generation.deltas():
            writer.collect(delta)
        await call.reply(
            writer.body(generation.usage()),
            headers={"x-request-id": generation.context.request_id},
        )

    async def _stream(self, call: Call, generation: Generation, writer: ReplyWriter) -> None:
        for delta in generation.resumed_deltas():
            writer.skip(delta)
        await call.start(
            200,
            "text/event-stream; charset=utf-8",
            {"cache-control": "no-cache", "x-request-id": generation.context.request_id},
        )
        try:
            async for delta in generation.deltas():
                chunk = writer.chunk(delta)
                if chunk is not None:
                    await call.write(chunk)
            if generation.request.include_usage or generation.context.send_usage:
                await call.write(writer.usage_chunk(generation.usage()))
            await call.write(DONE, more=False)
        except RequestError as error:
            await call.write(error_chunk(error.body()), more=False)

    # -- peers -----------------------------------------------------------------------------------

    async def _prefill(self, call: Call) -> None:
        worker = self._worker
        worker.check_accepting()
        data = read_object(call.body)
        REQUEST_ID.set(str(data.get("request_id", ""))[:128])
        with worker.tracing.span("prefill", call.headers, REQUEST_ID.get()):
            await self._prefilled(call, data)

    async def _prefilled(self, call: Call, data: Mapping[str, Any]) -> None:
        worker = self._worker
        tenant = str(data.get("tenant") or "")[:MAX_TENANT_CHARS]
        work = asyncio.create_task(worker.prefill_service.prefill(data))
        gone = asyncio.create_task(call.disconnected())
        try:
            with worker.counted(), worker.places.hold(tenant, 1):
                await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
                if work.cancelled():
                    raise RequestError("aborted", status=499, code="aborted")
                if work.done():
                    await call.reply(work.result())
        finally:
            for task in (work, gone):
                task.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)

    async def _abort(self, call: Call) -> None:
        self._worker.check_loaded()
        order = AbortOrder.read(read_object(call.body))
        found = self._worker.prefill_service.abort(order.request_id, order.epoch)
        await call.reply({"ok": True, "found": found})

    async def _kv_link(self, call: Call) -> None:
        self._worker.check_loaded()
        order = LinkCheckOrder.read(read_object(call.body))
        await call.reply(await self._worker.check_kv_link(order.address))


def _no_route(method: str, path: str, known: set[str]) -> WorkerError:
    if path in known:
        return RequestError(f"{method} is not allowed on {path}", status=405)
    return RequestError(f"there is no route {path[:200]!r}", status=404, code="not_found")
