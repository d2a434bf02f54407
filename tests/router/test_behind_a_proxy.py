"""Whose request it is where a proxy that is trusted says so."""

from __future__ import annotations

from typing import Any

import pytest
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from tandem_router.testing.asgi_client import Client


@pytest.mark.parametrize(
    ("headers", "client"),
    [({}, "test"), ({"x-forwarded-for": "203.0.113.7"}, "203.0.113.7")],
)
async def test_the_client_is_whom_the_proxy_names(headers: dict[str, str], client: str) -> None:
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["client"][0])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})

    reply = await Client(ProxyHeadersMiddleware(app, trusted_hosts="*")).get("/", headers=headers)

    assert reply.body == b"ok"
    assert seen == [client]
