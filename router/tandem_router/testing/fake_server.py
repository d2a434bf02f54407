"""A small HTTP/1.1 server on a real socket; subclasses say what it answers, well or badly."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import struct
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Seen:
    """One request as the server got it."""

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> dict[str, Any]:
        fields: dict[str, Any] = json.loads(self.body)
        return fields


@dataclass(eq=False)
class FakeServer(ABC):
    """Remembers every request; `answer` says what comes back."""

    seen: list[Seen] = field(default_factory=list)
    num_disconnects: int = 0
    left: asyncio.Event = field(default_factory=asyncio.Event)  # a client broke off
    asked: asyncio.Event = field(default_factory=asyncio.Event)
    host: str = "127.0.0.1"
    port: int = 0
    num_answering: int = 0
    _server: asyncio.Server | None = None
    _answered: asyncio.Event = field(default_factory=asyncio.Event)
    _writers: set[asyncio.StreamWriter] = field(default_factory=set)

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def inference(self) -> list[Seen]:
        return [one for one in self.seen if one.path != "/v1/load"]

    async def start(self) -> Any:
        """Listen, on the same port as before where it was stopped; returns itself."""
        self._server = await asyncio.start_server(self._serve, self.host, self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
            for writer in list(self._writers):
                writer.transport.abort()
            self._server = None
            await asyncio.sleep(0)

    async def drain(self) -> None:
        """Take no new connection, and stop once what was asked is answered."""
        if self._server is not None:
            self._server.close()
        while self.num_answering:
            self._answered.clear()
            await self._answered.wait()
        await self.stop()

    @abstractmethod
    async def answer(self, seen: Seen, writer: asyncio.StreamWriter) -> bool:
        """Write a reply; False where the connection is to be reset."""

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                first, *lines = head.decode().split("\r\n")
                headers = dict(line.lower().split(": ", 1) for line in lines if line)
                if headers.get("transfer-encoding") == "chunked":
                    body = await _read_chunks(reader)
                else:
                    body = await reader.readexactly(int(headers.get("content-length", 0)))
                seen = Seen(first.split(" ")[1], headers, body)
                self.seen.append(seen)
                if seen.path != "/v1/load":
                    self.asked.set()
                self.num_answering += 1
                try:
                    whole = await self.answer(seen, writer)
                finally:
                    self.num_answering -= 1
                    self._answered.set()
                if not whole:
                    writer.transport.abort()
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            self.num_disconnects += 1
            self.left.set()
        finally:
            self._writers.discard(writer)
            writer.close()


async def _read_chunks(reader: asyncio.StreamReader) -> bytes:
    parts = []
    while size := int((await reader.readline()).split(b";")[0], 16):
        parts.append(await reader.readexactly(size))
        await reader.readexactly(2)
    await reader.readexactly(2)
    return b"".join(parts)


async def plain_reply(
    writer: asyncio.StreamWriter,
    status: int,
    headers: dict[str, str],
    body: bytes,
    content_type: str = "application/json",
) -> bool:
    """One whole reply with its length."""
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    writer.write(
        f"HTTP/1.1 {status} X\r\ncontent-type: {content_type}\r\n{lines}"
        f"content-length: {len(body)}\r\n\r\n".encode()
        + body
    )
    await writer.drain()
    return True


async def begin_stream(writer: asyncio.StreamWriter, encoding: str | None = None) -> None:
    """The head of a reply in chunks of server-sent events; encoding: one that it claims."""
    named = f"content-encoding: {encoding}\r\n" if encoding else ""
    head = f"content-type: text/event-stream\r\n{named}transfer-encoding: chunked\r\n\r\n"
    writer.write(b"HTTP/1.1 200 OK\r\n" + head.encode())
    await writer.drain()


async def write_chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    """One chunk of such a reply; an empty one ends it."""
    writer.write(b"%x\r\n%b\r\n" % (len(data), data))
    await writer.drain()


def embedded(body: dict[str, Any], size: int = 4) -> dict[str, Any]:
    """A reply of /v1/embeddings: vectors by the text alone, in the encoding that was asked for."""
    given = body["input"]
    parts = [given] if isinstance(given, str) or isinstance(given[0], int) else given
    data: list[dict[str, Any]] = []
    for index, part in enumerate(parts):
        digest = hashlib.sha256(json.dumps(part).encode()).digest()
        vector = [byte / 256.0 for byte in digest[: body.get("dimensions") or size]]
        coded: Any = vector
        if body.get("encoding_format") == "base64":
            coded = base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
        data.append({"object": "embedding", "index": index, "embedding": coded})
    tokens = sum(len(part) for part in parts)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": body.get("model"), "usage": usage}
