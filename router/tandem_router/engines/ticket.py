"""A credential for one request: what a gateway carries to a worker in place of the peer token.

It proves that a router of the namespace wrote the request's internal headers and body. Whoever
reads it on the way can send that very request once more, for two minutes, and nothing else: the
peer token, which opens every worker and the router's administration, never leaves for a gateway.
The worker's half is `tandem_worker.server.ticket`; docs/contract.md holds the format.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

HEADER = b"x-tandem-ticket"
VALID_S = 120


def ticket(
    peer_token: bytes,
    path: str,
    headers: Iterable[tuple[bytes, bytes]],
    body: bytes,
    now: float,
) -> bytes:
    """The header's value for a POST of `body`. now: Unix seconds."""
    expires = b"%d" % (now + VALID_S)
    digest = hashlib.sha256(body).hexdigest().encode()
    signed = _signed(path.encode(), headers, digest, expires)
    mac = hmac.new(peer_token, signed, hashlib.sha256).hexdigest().encode()
    return b".".join((expires, digest, mac))


def _signed(
    path: bytes, headers: Iterable[tuple[bytes, bytes]], digest: bytes, expires: bytes
) -> bytes:
    own = sorted(
        b"%b:%b" % (name, value)
        for name, value in headers
        if name.startswith(b"x-tandem-") and name != HEADER
    )
    return b"\n".join((b"tandem-ticket-1", path, expires, digest, *own))
