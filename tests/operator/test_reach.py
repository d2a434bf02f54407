"""A cluster counts as ready when its routers can reach a worker of every tier."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable

from tandem_operator.local.wait_reachable import reach_every_tier

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def router_that_says(answers: list[dict[str, int] | str | None]) -> Handler:
    """A router whose /ready gives these counts or texts one after the other; None breaks off."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        usable = answers.pop(0)
        if usable is not None:
            said = usable if isinstance(usable, str) else json.dumps({"usable_workers": usable})
            body = said.encode()
            head = f"HTTP/1.1 503 X\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
            writer.write(head.encode() + body)
            await writer.drain()
        writer.close()

    return handle


async def test_a_router_is_asked_until_no_tier_is_without_a_worker() -> None:
    answers: list[dict[str, int] | str | None] = [None, "Internal Server Error", {}]
    answers += [{"small": 1, "large": 0}, {"small": 1, "large": 1}, {"never": 0}]
    server = await asyncio.start_server(router_that_says(answers), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]

    async with server, asyncio.timeout(30):
        await reach_every_tier(f"http://127.0.0.1:{port}")

    assert answers == [{"never": 0}]
