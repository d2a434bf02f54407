"""Which web pages may speak to a worker: none of another site.

A browser sends requests to any address for any page. `Host` tells a name that was made to point
here (DNS rebinding), `Origin` and `Sec-Fetch-Site` a page of somebody else's. Programs send neither
of the latter.
"""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import ip_address
from urllib.parse import urlsplit

from tandem_worker.errors import RequestError

_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")


def names_of(listens_on: str) -> tuple[str, ...] | None:
    """What a worker that only this machine reaches is called; None for any other address."""
    if listens_on == "localhost":
        return _LOOPBACK_NAMES
    try:
        address = ip_address(listens_on)
    except ValueError:
        return None
    if not address.is_loopback:
        return None
    return (*_LOOPBACK_NAMES, f"[{address}]" if address.version == 6 else str(address))


def check(headers: Mapping[str, str], names: tuple[str, ...] | None) -> None:
    """Refuse what a page of another site sends, and a Host that is none of the names.

    Raises:
        RequestError: 403, or 421.
    """
    host = headers.get("host", "").lower()
    name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
    if names is not None and name and name not in names:
        raise RequestError(
            f"host {host[:100]!r} is not served here; use {' or '.join(names)}",
            status=421,
            code="host_not_allowed",
        )
    origin = headers.get("origin")
    if origin is None:
        is_foreign = headers.get("sec-fetch-site") == "cross-site"
    else:
        is_foreign = urlsplit(origin).netloc.lower() != host
    if is_foreign:
        raise RequestError(
            f"a page of {(origin or 'another site')[:100]} may not send this; ask from a program, "
            "or put a router with access.cors_origins before this worker",
            status=403,
            type="permission_error",
            code="origin_not_allowed",
        )
