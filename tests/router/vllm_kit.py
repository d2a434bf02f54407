"""Asks a fake vLLM as a router's reader of load does."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import httpx

from tandem_router.testing.fake_vllm import FakeVLLM


def asker(server: FakeVLLM) -> Callable[..., Awaitable[tuple[int, bytes]]]:
    """`ask(path, body)` gives status and body; without a body it is a GET."""

    async def ask(path: str, body: bytes = b"") -> tuple[int, bytes]:
        async with httpx.AsyncClient(base_url=server.url) as client:
            reply = await (client.post(path, content=body) if body else client.get(path))
            return reply.status_code, reply.content

    return ask
