"""The gRPC port at which a gateway asks: Envoy's external processing, and health as gRPC has it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from tandem_router.errors import ConfigError
from tandem_router.gateway import messages
from tandem_router.gateway.certificate import CertificateFolder
from tandem_router.gateway.session import Front, ProtocolError, Session

try:
    import grpc
except ImportError as error:  # an extra of its own
    raise ConfigError(
        f"gateway_port needs gRPC ({error}); install tandem[gateway], or the router's own image"
    ) from error

logger = logging.getLogger("tandem.router")

# What a gateway asks the health of: the process, and whether it can pick.
LIVENESS, READINESS = "liveness", "readiness"
# Data planes send a body in pieces or, buffered, in one.
MESSAGE_BYTES_BEYOND_BODY = 2**20


@asynccontextmanager
async def serving(
    front: Front,
    host: str,
    port: int,
    ready: Callable[[], bool],
    drain_s: float,
    certificate: CertificateFolder | None = None,
) -> AsyncIterator[int]:
    """Serve until left, then let conversations end within `drain_s`; yields the port.

    certificate: by it gateways speak TLS, else in the clear.

    Raises ConfigError where the port cannot be had.
    """
    limit = front.services.config.limits.max_body_bytes + MESSAGE_BYTES_BEYOND_BODY
    server = grpc.aio.server(
        options=[("grpc.max_receive_message_length", limit), ("grpc.so_reuseport", 0)]
    )
    server.add_generic_rpc_handlers((_processor(front), _health(ready)))
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        bound = (
            server.add_insecure_port(address)
            if certificate is None
            else server.add_secure_port(address, certificate.credentials())
        )
    except RuntimeError as error:
        raise ConfigError(f"gateway_port: {address} cannot be listened on: {error}") from error
    await server.start()
    scheme = "grpc" if certificate is None else "grpcs"
    logger.info("gateways ask at %s://%s (%s)", scheme, address, messages.SERVICE)
    try:
        yield bound
    finally:
        await server.stop(drain_s)


def _processor(front: Front) -> Any:
    async def process(_: Any, context: Any) -> None:
        async def receive() -> Any:
            message = await context.read()
            return None if message is grpc.aio.EOF else message

        session = Session(front, receive, context.write)
        try:
            await session.run()
        except ProtocolError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except asyncio.CancelledError:
            raise
        except Exception:
            logger.exception("a gateway's request failed inside the router")
            await context.abort(
                grpc.StatusCode.INTERNAL, "the router failed on this request; its log says why"
            )

    handler = grpc.stream_stream_rpc_method_handler(
        process,
        request_deserializer=messages.ProcessingRequest.FromString,
        response_serializer=messages.ProcessingResponse.SerializeToString,
    )
    return grpc.method_handlers_generic_handler(messages.SERVICE, {"Process": handler})


def _health(ready: Callable[[], bool]) -> Any:
    async def check(request: Any, context: Any) -> Any:
        reply = messages.HealthCheckResponse()
        if request.service == LIVENESS:
            reply.status = messages.SERVING
        elif request.service in ("", READINESS, messages.SERVICE):
            reply.status = messages.SERVING if ready() else messages.NOT_SERVING
        else:
            known = ", ".join((LIVENESS, READINESS, messages.SERVICE))
            text = f"no service {request.service[:100]!r} here; ask for {known}"
            await context.abort(grpc.StatusCode.NOT_FOUND, text)
        return reply

    handler = grpc.unary_unary_rpc_method_handler(
        check,
        request_deserializer=messages.HealthCheckRequest.FromString,
        response_serializer=messages.HealthCheckResponse.SerializeToString,
    )
    return grpc.method_handlers_generic_handler(messages.HEALTH_SERVICE, {"Check": handler})
