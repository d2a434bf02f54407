"""One HTTP request to a worker: what was asked, and how it is answered."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

from tandem_worker.errors import RequestError

Scope = Mapping[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

MAX_BODY_BYTES = 32 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Call:
    """One HTTP request, body read."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes
    receive: Receive
    send: Send

    async def reply(
        self,
        body: bytes | dict[str, Any],
        *,
        status: int = 200,
        headers: Mapping[str, str] | None = None,
        content_type: str = "application/json",
    ) -> None:
        """Send a whole reply."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        await self.start(status, content_type, {"content-length": str(len(raw)), **(headers or {})})
        await self.send({"type": "http.response.body", "body": raw, "more_body": False})

    async def start(
        self, status: int, content_type: str, headers: Mapping[str, str] | None = None
    ) -> None:
        """Send status and headers."""
        pairs = {"content-type": content_type, **(headers or {})}
        await self.send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [(k.encode(), v.encode()) for k, v in pairs.items()],
            }
        )

    async def write(self, data: bytes, *, more: bool = True) -> None:
        """Send a piece of a streamed reply's body."""
        await self.send({"type": "http.response.body", "body": data, "more_body": more})

    async def disconnected(self) -> None:
        """Return when the client has gone."""
        while (await self.receive())["type"] != "http.disconnect":
            pass


async def read_body(receive: Receive) -> bytes:
    """The whole body. Raises RequestError (413), or ConnectionResetError when the client left."""
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionResetError("the client left")
        part = message.get("body", b"")
        size += len(part)
        if size > MAX_BODY_BYTES:
            raise RequestError(
                f"the body exceeds {MAX_BODY_BYTES} bytes", status=413, code="body_too_large"
            )
        parts.append(part)
        if not message.get("more_body"):
            return b"".join(parts)


async def unless_gone(call: Call, answering: Coroutine[Any, Any, None]) -> None:
    """Answer; cancelled when the client leaves."""
    work = asyncio.create_task(answering)
    gone = asyncio.create_task(call.disconnected())
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            work.result()
    finally:
        for task in (work, gone):
            task.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)
