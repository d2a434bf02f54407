"""The fast fake upstream: answers with canned bytes and reads no more of a request than it must.

    python benchmarks/proxying/upstream.py PORT [CHUNKS [PAUSE_MS]]

A stream's events are sent one by one, PAUSE_MS apart, as tokens come in life; each write is one
event, so a router reads one at a time unless it falls behind.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

NUM_CHUNKS = 64
PAUSE_S = 0.002


def _chunk(delta: dict[str, str], finish: str | None = None) -> bytes:
    payload = {
        "id": "chatcmpl-0123456789abcdef0123456789abcdef",
        "object": "chat.completion.chunk",
        "created": 1700000000,
        "model": "bench",
        "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}],
    }
    return b"data: " + json.dumps(payload).encode() + b"\n\n"


def _framed(event: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(event), event)


def _whole(body: bytes) -> bytes:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    return head % len(body) + body


def _events(num_chunks: int) -> list[bytes]:
    usage = {"prompt_tokens": 20, "completion_tokens": num_chunks, "total_tokens": 20 + num_chunks}
    last = {"id": "x", "object": "chat.completion.chunk", "choices": [], "usage": usage}
    events = [_chunk({"role": "assistant", "content": "a"})]
    events += [_chunk({"content": " word"}) for _ in range(num_chunks - 1)]
    end = _chunk({}, "stop") + b"data: " + json.dumps(last).encode() + b"\n\ndata: [DONE]\n\n"
    return [*map(_framed, events), _framed(end) + b"0\r\n\r\n"]


ANSWER = _whole(
    json.dumps(
        {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 1700000000,
            "model": "bench",
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": "word " * 64},
                    "finish_reason": "stop",
                }
            ],
            "usage": {"prompt_tokens": 20, "completion_tokens": 64, "total_tokens": 84},
        }
    ).encode()
)
# What the peers ask of a worker before they use it.
PROBES = {
    b"GET /v1/models": _whole(
        json.dumps({"object": "list", "data": [{"id": "bench", "object": "model"}]}).encode()
    ),
    b"GET /": _whole(json.dumps({"status": "ok", "model_id": "bench"}).encode()),
}
NOT_FOUND = b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n"
STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
)


class CannedUpstream(asyncio.Protocol):
    events: list[bytes] = []
    pause_s = PAUSE_S

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport
        self.loop = asyncio.get_running_loop()
        self.buffer = b""

    def data_received(self, data: bytes) -> None:
        self.buffer = data = self.buffer + data if self.buffer else data
        end = data.find(b"\r\n\r\n")
        if end < 0:
            return
        head = data[:end].lower()
        at = head.find(b"content-length:")
        length = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
        if len(data) < end + 4 + length:
            return
        self.buffer = data[end + 4 + length :]
        if head.startswith(b"get"):
            for path, reply in PROBES.items():
                if data.startswith(path):
                    self.transport.write(reply)
                    return
        elif not head.startswith(b"post /v1/chat/completions http"):
            self.transport.write(NOT_FOUND)
        elif b'"stream":true' in data or b'"stream": true' in data:
            # The first token comes with the headers, as from a server that waits for it.
            self.transport.write(STREAM_HEAD + self.events[0])
            self.loop.call_later(self.pause_s, self.stream, 1)
        else:
            self.transport.write(ANSWER)

    def stream(self, index: int) -> None:
        if self.transport.is_closing():
            return
        self.transport.write(self.events[index])
        if index + 1 < len(self.events):
            self.loop.call_later(self.pause_s, self.stream, index + 1)


async def serve(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(CannedUpstream, "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    import uvloop

    CannedUpstream.events = _events(int(sys.argv[2]) if len(sys.argv) > 2 else NUM_CHUNKS)
    CannedUpstream.pause_s = float(sys.argv[3]) / 1000.0 if len(sys.argv) > 3 else PAUSE_S
    uvloop.run(serve(int(sys.argv[1])))
