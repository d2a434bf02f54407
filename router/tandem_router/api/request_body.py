"""A request's body as bytes: bounded in size, time and what a sender may hold at once.

`content-encoding: gzip` and `deflate` are undone within the same bound; others are refused.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from tandem_router.config import LimitsConfig
from tandem_router.errors import ApiError, bad_request
from tandem_router.limits.bodies import HeldBody

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

_ZLIB_OR_GZIP = 47


class ClientGone(Exception):
    """The client closed its connection before the reply was complete."""


async def read_body(
    scope: Scope, receive: Receive, limits: LimitsConfig, held: HeldBody | None = None
) -> bytes:
    """The whole body. Raises ApiError (400, 408, 413, 415, 429) or ClientGone."""
    exchange = scope.get("extensions", {}).get("tandem.exchange")
    if exchange is not None and b"content-encoding" not in exchange.names:
        whole: bytes | None = exchange.whole_body()
        if whole is not None:  # its bytes are here: what the headers announce is of no interest
            check_size(len(whole), limits)
            if held is not None:
                held.grow(len(whole))
            return whole
    encoding = b""
    for name, value in scope["headers"]:
        if name == b"content-length":
            # Parsed digits beyond any size are no number worth making.
            if value.isdigit() and (len(value) > 15 or int(value) > limits.max_body_bytes):
                raise _too_large(limits)
        elif name == b"content-encoding":
            # Named twice it was packed twice, which is read as little as any other list.
            encoding += (b", " if encoding else b"") + value.strip().lower()
    if encoding not in (b"", b"identity", b"gzip", b"x-gzip", b"deflate"):
        raise ApiError(
            415,
            f"content-encoding {encoding[:40].decode('latin-1')!r} is not read here; send the body "
            "plain, or with gzip or deflate",
            code="unsupported_encoding",
        )
    body: bytes | None = exchange.whole_body() if exchange is not None else None
    if body is None:
        body = await _read(receive, limits, held)
    elif held is not None:
        held.grow(len(body))
    check_size(len(body), limits)
    if encoding in (b"", b"identity"):
        return body
    plain = _unpacked(body, limits)
    if held is not None:
        held.grow(len(plain))
    return plain


async def _read(receive: Receive, limits: LimitsConfig, held: HeldBody | None) -> bytes:
    parts = []
    size = 0
    try:
        async with asyncio.timeout(limits.body_timeout_s):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                part = message.get("body", b"")
                size += len(part)
                if size > limits.max_body_bytes:
                    raise _too_large(limits)
                if held is not None:
                    held.grow(len(part))
                parts.append(part)
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError:
        raise ApiError(
            408, f"the request body did not arrive within {limits.body_timeout_s:g} s"
        ) from None


def _unpacked(body: bytes, limits: LimitsConfig) -> bytes:
    inflater = zlib.decompressobj(_ZLIB_OR_GZIP)
    try:
        plain = inflater.decompress(body, limits.max_body_bytes + 1)
    except zlib.error as error:
        raise bad_request(f"the request body is not what content-encoding says: {error}") from error
    if len(plain) > limits.max_body_bytes:
        raise _too_large(limits)
    if not inflater.eof:
        raise bad_request("the compressed request body ends too early")
    if inflater.unused_data:
        raise bad_request("bytes follow the end of the compressed request body")
    return plain


def check_size(num_bytes: int, limits: LimitsConfig) -> None:
    """Raises ApiError (413)."""
    if num_bytes > limits.max_body_bytes:
        raise _too_large(limits)


def _too_large(limits: LimitsConfig) -> ApiError:
    return ApiError(
        413,
        f"the request body is larger than {limits.max_body_bytes} bytes",
        code="body_too_large",
    )
