"""What an endpoint picker says back, message by message."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from tandem_router.gateway.messages import OVERWRITE_IF_EXISTS_OR_ADD, ProcessingResponse
from tandem_router.openai.asgi import NOSNIFF

Headers = Sequence[tuple[bytes, bytes]]

DESTINATION = "x-gateway-destination-endpoint"
NAMESPACE = "envoy.lb"
# Data planes take up to 64 KiB of a body in one message.
CHUNK_BYTES = 62_000


def headers(
    side: str,
    setting: Headers = (),
    removing: Iterable[str] = (),
    endpoints: str | None = None,
) -> Any:
    """side: request or response. endpoints: where the request goes, first choice first."""
    reply = ProcessingResponse()
    common = getattr(reply, f"{side}_headers").response
    common.SetInParent()
    _mutate(common.header_mutation, setting, removing)
    if endpoints is not None:
        _send_to(reply, common, endpoints)
    return reply


def whole_body(
    side: str,
    body: bytes | None = None,
    setting: Headers = (),
    removing: Iterable[str] = (),
    endpoints: str | None = None,
) -> Any:
    """To a body that came in one piece, or a piece that is answered one by one; None: as it is."""
    reply = ProcessingResponse()
    common = getattr(reply, f"{side}_body").response
    common.SetInParent()
    _mutate(common.header_mutation, setting, removing)
    if body:
        common.body_mutation.body = body
    elif body is not None:
        common.body_mutation.clear_body = True
    if endpoints is not None:
        _send_to(reply, common, endpoints)
    return reply


def streamed_body(side: str, body: bytes, last: bool) -> list[Any]:
    """Pieces of a body in full duplex, where what is sent here is all that goes on."""
    replies = []
    for start in range(0, max(1, len(body)), CHUNK_BYTES):
        reply = ProcessingResponse()
        part = getattr(reply, f"{side}_body").response.body_mutation.streamed_response
        part.body = body[start : start + CHUNK_BYTES]
        part.end_of_stream = last and start + CHUNK_BYTES >= len(body)
        replies.append(reply)
    return replies


def trailers(side: str) -> Any:
    reply = ProcessingResponse()
    getattr(reply, f"{side}_trailers").SetInParent()
    return reply


def instead(status: int, body: bytes, extra: Headers, request_id: str, why: str) -> Any:
    """A reply of our own in place of any other; why: a word for the gateway's log."""
    reply = ProcessingResponse()
    immediate = reply.immediate_response
    immediate.status.code = status
    immediate.body = body
    immediate.details = f"tandem_{why}"
    own = [
        (b"content-type", b"application/json"),
        NOSNIFF,
        (b"x-request-id", request_id.encode()),
    ]
    _mutate(immediate.headers, [*own, *extra], ())
    return reply


def _mutate(mutation: Any, setting: Headers, removing: Iterable[str]) -> None:
    named = {name.decode("latin-1") for name, _ in setting}
    for name, value in setting:
        option = mutation.set_headers.add()
        option.header.key = name.decode("latin-1")
        option.header.raw_value = value
        option.append_action = OVERWRITE_IF_EXISTS_OR_ADD
    mutation.remove_headers.extend(name for name in removing if name not in named)


def _send_to(reply: Any, common: Any, endpoints: str) -> None:
    """Header and metadata say the same: data planes read either."""
    _mutate(common.header_mutation, [(DESTINATION.encode(), endpoints.encode())], ())
    # Routes may look at what was just set.
    common.clear_route_cache = True
    reply.dynamic_metadata.update({NAMESPACE: {DESTINATION: endpoints}})
