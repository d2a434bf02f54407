"""Which hosts and web pages may speak to a router: its own, and those that are configured.

A browser sends requests to any address for any page. `Host` tells a name that was made to point
here (DNS rebinding); `Origin` and `Sec-Fetch-Site` tell a page of somebody else's. Programs send
neither of the latter.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, MutableMapping
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from tandem_router.errors import ApiError
from tandem_router.openai.asgi import Send

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
_TOKEN = re.compile(r"[A-Za-z0-9-]{1,64}")
_OF_BROWSERS = frozenset({b"origin", b"sec-fetch-site"})
Headers = Iterable[tuple[bytes, bytes]]


def loopback_names(listens_on: Iterable[str]) -> tuple[str, ...] | None:
    """What a router that only this machine reaches is called; None where others reach it."""
    names = list(LOOPBACK_NAMES)
    for host in listens_on:
        if host == "localhost":
            continue
        try:
            address = ip_address(host)
        except ValueError:
            return None
        if not address.is_loopback:
            return None
        names.append(f"[{address}]" if address.version == 6 else str(address))
    return tuple(names)


def header(headers: Headers, name: bytes) -> str | None:
    for each, value in headers:
        if each == name:
            return value.decode("latin-1")
    return None


def check_host(headers: Headers, allowed: Collection[str] | None) -> None:
    """Raises ApiError (421) for a Host that is not allowed; None allows every one."""
    if allowed is None:
        return
    host = (header(headers, b"host") or "").lower()
    name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
    if name not in allowed:
        raise ApiError(
            421,
            f"host {host[:100]!r} is not served here; add it to access.allowed_hosts",
            code="host_not_allowed",
        )


def is_foreign(headers: Headers, cors_origins: Collection[str]) -> bool:
    """Whether a page of another site, that nobody allowed, sends this."""
    if _OF_BROWSERS.isdisjoint([name for name, _ in headers]):
        return False
    origin = header(headers, b"origin")
    if origin is None:
        return header(headers, b"sec-fetch-site") == "cross-site"
    if origin in cors_origins or "*" in cors_origins:
        return False
    return urlsplit(origin).netloc.lower() != (header(headers, b"host") or "").lower()


def check_writes(method: str, headers: Headers) -> None:
    """Raises ApiError: a change comes as JSON (415) and not from another site's page (403)."""
    if method in ("GET", "HEAD"):
        return
    if is_foreign(headers, ()):
        raise foreign(headers)
    kind = (header(headers, b"content-type") or "").partition(";")[0].strip().lower()
    if kind not in ("", "application/json"):
        raise ApiError(415, f"content-type {kind[:60]!r} is not read here; send application/json")


def readable_by(headers: Headers, cors_origins: Collection[str]) -> str | None:
    """The page's origin where `cors_origins` lets its scripts read replies; else None."""
    if not cors_origins:
        return None
    origin = header(headers, b"origin")
    allowed = origin is not None and (origin in cors_origins or "*" in cors_origins)
    return origin if allowed else None


def for_page(send: Send, origin: str) -> Send:
    """Replies that the browser hands to the page; no cookies, keys travel in headers."""

    async def named(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            said = [
                (b"access-control-allow-origin", origin.encode("latin-1")),
                (b"access-control-expose-headers", b"*"),
                (b"vary", b"origin"),
            ]
            message = {**message, "headers": [*message["headers"], *said]}
        await send(message)

    return named


async def answer_preflight(headers: Headers, send: Send) -> None:
    """What a browser asks before it sends a page's request: any method and header served here."""
    wanted = header(headers, b"access-control-request-headers") or ""
    names = [name for name in wanted.split(",") if _TOKEN.fullmatch(name.strip())]
    said = [
        (b"access-control-allow-methods", b"GET, HEAD, POST"),
        (b"access-control-allow-headers", ",".join(names).encode()),
        (b"access-control-max-age", b"600"),
        (b"content-length", b"0"),
    ]
    await send({"type": "http.response.start", "status": 204, "headers": said})
    await send({"type": "http.response.body", "body": b""})


def foreign(headers: Headers) -> ApiError:
    origin = header(headers, b"origin") or "of another site"
    return ApiError(
        403,
        f"origin {origin[:100]} may not send this; add it to access.cors_origins",
        type="permission_error",
        code="origin_not_allowed",
    )
