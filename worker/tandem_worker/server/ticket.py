"""Checks the credential of a request that a gateway brought: good for that request, and not long.

The router's half is `tandem_router.engines.ticket`; docs/contract.md holds the format.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Mapping, Sequence

HEADER = "x-tandem-ticket"
# Routes that a ticket opens: answers, and nothing of the worker's own affairs.
PATHS = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/embeddings"})
# A ticket says until when it is good; one that says longer than routers ever do is not one of
# theirs. Clocks of machines differ by less than this.
MOST_VALID_S = 300


def expected_digest(
    headers: Mapping[str, str], path: str, tokens: Sequence[bytes], now: float
) -> str | None:
    """SHA-256 of the one body that may come with these headers; None where the ticket is not good.

    tokens: the peer tokens that hold. now: Unix seconds.
    """
    expires, _, rest = headers.get(HEADER, "").partition(".")
    digest, _, mac = rest.partition(".")
    if path not in PATHS or not expires.isdecimal() or len(expires) > 12:
        return None
    if not now <= int(expires) <= now + MOST_VALID_S:
        return None
    signed = _signed(path, headers, digest, expires)
    for token in tokens:
        own = hmac.new(token, signed, hashlib.sha256).hexdigest()
        if hmac.compare_digest(own.encode(), mac.encode()):
            return digest
    return None


def _signed(path: str, headers: Mapping[str, str], digest: str, expires: str) -> bytes:
    own: Iterable[str] = sorted(
        f"{name}:{value}"
        for name, value in headers.items()
        if name.startswith("x-tandem-") and name != HEADER
    )
    return "\n".join(("tandem-ticket-1", path, expires, digest, *own)).encode("latin-1", "replace")
