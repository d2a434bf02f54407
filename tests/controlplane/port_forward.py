"""The kubelet's half of `kubectl port-forward`: SPDY/3.1 frames in a WebSocket, a pair of streams
for each connection, and the pod's port at the other end.

A stream's headers say which port and which connection (`requestID`) it is of, and whether it
carries data or, once the port cannot be reached, the sentence that says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import zlib

from exec_websocket import WebSocket

PROTOCOL = "SPDY/3.1+portforward.k8s.io"
_SYN_STREAM, _SYN_REPLY, _RST, _PING, _GOAWAY = 1, 2, 3, 6, 7
_FIN = 1
_CHUNK_BYTES = 64 * 1024
#: What both sides' compression of headers begins with (SPDY/3, section 2.6.10.1).
_NAMES = """options head post put delete trace accept accept-charset accept-encoding accept-language
accept-ranges age allow authorization cache-control connection content-base content-encoding
content-language content-length content-location content-md5 content-range content-type date etag
expect expires from host if-match if-modified-since if-none-match if-range if-unmodified-since
last-modified location max-forwards pragma proxy-authenticate proxy-authorization range referer
retry-after server te trailer transfer-encoding upgrade user-agent vary via warning www-authenticate
method get status 200_OK version HTTP/1.1 url public set-cookie keep-alive origin"""
_WORDS = (
    "100101201202205206300302303304305306307402405406407408409410411412413414415416417502504505203 "
    "Non-Authoritative Information204 No Content301 Moved Permanently400 Bad Request401 "
    "Unauthorized403 Forbidden404 Not Found500 Internal Server Error501 Not Implemented503 Service "
    "UnavailableJan Feb Mar Apr May Jun Jul Aug Sept Oct Nov Dec 00:00:00 Mon, Tue, Wed, Thu, Fri, "
    "Sat, Sun, GMTchunked,text/html,image/png,image/jpg,image/gif,application/xml,application/xhtml"
    "+xml,text/plain,text/javascript,publicprivatemax-age=gzip,deflate,sdchcharset=utf-8charset=iso"
    "-8859-1,utf-,*,enq=0."
)
DICTIONARY = (
    b"".join(
        len(name).to_bytes(4, "big") + name.replace("_", " ").encode() for name in _NAMES.split()
    )
    + _WORDS.encode()
)


class PortForward:
    """Serves one `kubectl port-forward` until it leaves."""

    def __init__(self, socket: WebSocket, address: str) -> None:
        self._socket = socket
        self._address = address
        self._read_headers = zlib.decompressobj(zdict=DICTIONARY)
        self._write_headers = zlib.compressobj(zdict=DICTIONARY)
        self._buffer = b""
        # By the id of the data stream; a connection that is being opened keeps what comes.
        self._incoming: dict[int, asyncio.Queue[bytes]] = {}
        # By requestID, the error stream that came first.
        self._errors: dict[str, int] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        try:
            while (message := await self._socket.receive()) is not None:
                self._buffer += message
                while frame := self._frame():
                    await self._took(*frame)
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _frame(self) -> tuple[int, int, bytes] | None:
        """(first word, flags, payload) of the next whole frame."""
        if len(self._buffer) < 8:
            return None
        length = int.from_bytes(self._buffer[5:8], "big")
        if len(self._buffer) < 8 + length:
            return None
        head, payload = self._buffer[:8], self._buffer[8 : 8 + length]
        self._buffer = self._buffer[8 + length :]
        return int.from_bytes(head[:4], "big"), head[4], payload

    async def _took(self, word: int, flags: int, payload: bytes) -> None:
        if not word >> 31:
            queue = self._incoming.get(word)
            if queue is not None:
                if payload:
                    queue.put_nowait(payload)
                if flags & _FIN:
                    queue.put_nowait(b"")
            return
        kind = word & 0xFFFF
        if kind == _SYN_STREAM:
            stream = int.from_bytes(payload[:4], "big")
            headers = self._headers(payload[10:])
            await self._control(_SYN_REPLY, payload[:4] + self._no_headers())
            if headers["streamtype"] == "error":
                self._errors[headers["requestid"]] = stream
                return
            self._incoming[stream] = asyncio.Queue()
            error = self._errors.pop(headers["requestid"])
            task = asyncio.create_task(self._forward(stream, error, int(headers["port"])))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        elif kind == _RST:
            if queue := self._incoming.get(int.from_bytes(payload[:4], "big")):
                queue.put_nowait(b"")
        elif kind == _PING:
            await self._control(_PING, payload)

    def _headers(self, compressed: bytes) -> dict[str, str]:
        data = self._read_headers.decompress(compressed)
        fields, at = [], 4
        for _ in range(2 * int.from_bytes(data[:4], "big")):
            end = at + 4 + int.from_bytes(data[at : at + 4], "big")
            fields.append(data[at + 4 : end].decode())
            at = end
        return dict(zip(fields[::2], fields[1::2], strict=True))

    def _no_headers(self) -> bytes:
        return self._write_headers.compress(bytes(4)) + self._write_headers.flush(zlib.Z_SYNC_FLUSH)

    async def _forward(self, stream: int, error: int, port: int) -> None:
        queue = self._incoming[stream]
        try:
            reader, writer = await asyncio.open_connection(self._address, port)
        except OSError as failure:
            said = f"port {port} of the pod is not reached: {failure}".encode()
            await self._data(error, said, _FIN)
            await self._data(stream, b"", _FIN)
            return
        sending = asyncio.create_task(_send(queue, writer))
        try:
            while data := await reader.read(_CHUNK_BYTES):
                await self._data(stream, data)
        except OSError as failure:
            await self._data(error, str(failure).encode())
        finally:
            sending.cancel()
            writer.close()
            del self._incoming[stream]
        await self._data(stream, b"", _FIN)
        await self._data(error, b"", _FIN)

    async def _control(self, kind: int, payload: bytes) -> None:
        head = (0x80030000 | kind).to_bytes(4, "big") + len(payload).to_bytes(4, "big")
        await self._socket.send(head + payload)

    async def _data(self, stream: int, payload: bytes, flags: int = 0) -> None:
        head = stream.to_bytes(4, "big") + bytes([flags]) + len(payload).to_bytes(3, "big")
        await self._socket.send(head + payload)


async def _send(queue: asyncio.Queue[bytes], writer: asyncio.StreamWriter) -> None:
    """What the client sends, until it closes its half."""
    with contextlib.suppress(OSError):
        while data := await queue.get():
            writer.write(data)
            await writer.drain()
        writer.write_eof()
