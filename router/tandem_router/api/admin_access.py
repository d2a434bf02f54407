"""Who may see the page, /admin and /metrics: anybody until tenants exist, then a token holder.

The peer token opens everything, as `Authorization: Bearer`, as the password of a browser's login,
or in x-tandem-peer-token as the operator sends it. The metrics token opens /metrics alone.
"""

from __future__ import annotations

import base64
import binascii
import hmac
from collections.abc import Callable, Iterable, Sequence

from tandem_router.errors import DOC_URL, ApiError
from tandem_router.openai.asgi import Send

Secrets = Callable[[], Sequence[bytes]]

OPEN_PATHS = frozenset({"/health", "/ready"})


class AdminAccess:
    def __init__(self, peer_tokens: Secrets, metrics_tokens: Secrets) -> None:
        self._peer_tokens = peer_tokens
        self._metrics_tokens = metrics_tokens

    def allows(self, path: str, headers: Iterable[tuple[bytes, bytes]]) -> bool:
        """Whether a request with these headers may see `path`."""
        if path in OPEN_PATHS or path.startswith(DOC_URL):
            return True  # what a code means is for whoever got the error, a missing key included
        accepted = [*self._peer_tokens()]
        if path == "/metrics":
            accepted += self._metrics_tokens()
        presented = list(_presented(headers))
        return any(hmac.compare_digest(each, token) for each in presented for token in accepted)

    async def refuse(self, path: str, send: Send) -> None:
        """401 that makes a browser ask for the password and tells everybody else what to send."""
        if not self._peer_tokens():
            how = "start the router with --peer-token-file to have one"
        elif path == "/metrics":
            how = "send the metrics or the peer token as `Authorization: Bearer`"
        else:
            how = "send the peer token as `Authorization: Bearer`, or log in with it as password"
        error = ApiError(
            401,
            f"{path[:100]} needs a token, because tenants exist; {how}",
            type="authentication_error",
            code="missing_token",
        )
        headers = [
            (b"content-type", b"application/json"),
            (b"www-authenticate", b'Basic realm="Tandem", charset="UTF-8"'),
            *error.headers(),
        ]
        await send({"type": "http.response.start", "status": 401, "headers": headers})
        await send({"type": "http.response.body", "body": error.body()})


def _presented(headers: Iterable[tuple[bytes, bytes]]) -> Iterable[bytes]:
    """Every token that a request carries."""
    for name, value in headers:
        if name == b"x-tandem-peer-token":
            yield value
        elif name == b"authorization":
            scheme, _, rest = value.partition(b" ")
            if scheme.lower() == b"bearer":
                yield rest.strip()
            elif scheme.lower() == b"basic":
                try:
                    login = base64.b64decode(rest.strip(), validate=True)
                except (binascii.Error, ValueError):
                    continue
                yield login.partition(b":")[2]
