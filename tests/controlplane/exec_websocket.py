"""The server's half of a WebSocket (RFC 6455), as much as `kubectl exec` needs: no extensions."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import struct
from collections.abc import Mapping

_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_CONTINUATION, _TEXT, _BINARY, _CLOSE, _PING, _PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA
MAX_MESSAGE_BYTES = 4 * 2**20


class WebSocketError(Exception):
    """The other side does not speak the protocol."""


def accept_head(headers: Mapping[str, str], protocol: str) -> bytes:
    """The 101 reply to an upgrade request; headers by lower-case name."""
    key = headers["sec-websocket-key"].strip().encode()
    accept = base64.b64encode(hashlib.sha1(key + _GUID).digest()).decode()
    return (
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Accept: {accept}\r\nSec-WebSocket-Protocol: {protocol}\r\n\r\n"
    ).encode()


class WebSocket:
    """Messages over an upgraded connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def receive(self) -> bytes | None:
        """The next message; None once the other side closes. Pings are answered.

        Raises WebSocketError for frames that break the protocol.
        """
        message = b""
        while True:
            try:
                final, opcode, payload = await self._frame()
            except (asyncio.IncompleteReadError, ConnectionError):
                return None
            if opcode == _CLOSE:
                return None
            if opcode == _PING:
                await self._send(_PONG, payload)
            elif opcode in (_CONTINUATION, _TEXT, _BINARY):
                message += payload
                if len(message) > MAX_MESSAGE_BYTES:
                    raise WebSocketError(f"a message is larger than {MAX_MESSAGE_BYTES} bytes")
                if final:
                    return message

    async def send(self, data: bytes) -> None:
        """One binary message."""
        await self._send(_BINARY, data)

    async def close(self) -> None:
        """Say a normal end; the connection itself stays the caller's."""
        await self._send(_CLOSE, struct.pack(">H", 1000))

    async def _frame(self) -> tuple[bool, int, bytes]:
        first, second = await self._reader.readexactly(2)
        if not second & 0x80:
            raise WebSocketError("a client's frames must be masked")
        length = second & 0x7F
        if length == 126:
            (length,) = struct.unpack(">H", await self._reader.readexactly(2))
        elif length == 127:
            (length,) = struct.unpack(">Q", await self._reader.readexactly(8))
        if length > MAX_MESSAGE_BYTES:
            raise WebSocketError(f"a frame is larger than {MAX_MESSAGE_BYTES} bytes")
        mask = await self._reader.readexactly(4)
        payload = await self._reader.readexactly(length)
        whole = int.from_bytes(payload, "big")
        repeated = (mask * (length // 4 + 1))[:length]
        unmasked = (whole ^ int.from_bytes(repeated, "big")).to_bytes(length, "big")
        return bool(first & 0x80), first & 0x0F, unmasked

    async def _send(self, opcode: int, data: bytes) -> None:
        length = len(data)
        if length < 126:
            head = struct.pack(">BB", 0x80 | opcode, length)
        elif length < 1 << 16:
            head = struct.pack(">BBH", 0x80 | opcode, 126, length)
        else:
            head = struct.pack(">BBQ", 0x80 | opcode, 127, length)
        self._writer.write(head + data)
        await self._writer.drain()
