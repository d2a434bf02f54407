"""What parts that are written by hand cost beside the library that could stand in their place.

    python benchmarks/by_hand.py

CPU seconds of one process, both sides in turn on the same bytes, median of the rounds. Streams of
server-sent events are split beside the decoder of the openai client (a dependency of the tests),
which parses each event; the router only has to know where events end. Requests of one kept
connection are answered by the router's protocol and by uvicorn's own, under the same server and
from the same client, whose time is in both. docs/decisions/0046 rests on the ratios.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import statistics
import time
from collections.abc import Callable
from typing import Any

import uvicorn
from openai._streaming import SSEDecoder

from tandem_router.http.server import Listener, ServerLimits
from tandem_router.openai.sse import EventSplitter

ROUNDS, NUM_CHUNKS = 9, 10_000
DELTA = {"id": "c", "choices": [{"index": 0, "delta": {"content": " word"}, "logprobs": None}]}
CHUNK = b"data: " + json.dumps(DELTA).encode() + b"\n\n"


def by_hand() -> None:
    splitter = EventSplitter()
    for _ in range(NUM_CHUNKS):
        splitter.feed(CHUNK)


def by_library() -> None:
    for _ in SSEDecoder().iter_bytes(iter([CHUNK] * NUM_CHUNKS)):
        pass


NUM_REQUESTS = 2_000
REQUEST = (
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    b"content-length: 2\r\n\r\n{}"
)
REPLY = b'{"id": "c"}'


async def application(scope: Any, receive: Any, send: Any) -> None:
    await receive()
    headers = [(b"content-length", b"%d" % len(REPLY))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": REPLY})


async def served_us(http: Any) -> float:
    """CPU microseconds per request, client included."""
    config = uvicorn.Config(application, http=http, log_config=None, lifespan="off", ws="none")
    # Named as TCP, or asyncio leaves Nagle's algorithm on and each reply waits for 40 ms.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        server = uvicorn.Server(config)
        task = asyncio.create_task(server._serve([listening]))
        reader, writer = await asyncio.open_connection(*listening.getsockname())
        for number in range(NUM_REQUESTS + 200):
            if number == 200:
                began = time.process_time()
            writer.write(REQUEST)
            await reader.readuntil(REPLY)
        spent = time.process_time() - began
        writer.close()
        server.should_exit = True
        await task
    return spent / NUM_REQUESTS * 1e6


def cpu_us(work: Callable[[], None]) -> float:
    """CPU microseconds per chunk."""
    began = time.process_time()
    work()
    return (time.process_time() - began) / NUM_CHUNKS * 1e6


def main() -> None:
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    rounds = [(cpu_us(by_hand), cpu_us(by_library)) for _ in range(ROUNDS)]
    mine, library = (statistics.median(side) for side in zip(*rounds, strict=True))
    print(f"own splitter {mine:.2f} us a chunk, openai's decoder {library:.2f} us")
    print(f"ratio {statistics.median(b / a for a, b in rounds):.1f}")
    rounds = []
    for _ in range(ROUNDS):
        mine = asyncio.run(served_us(Listener(ServerLimits()).protocol()))
        rounds.append((mine, asyncio.run(served_us("httptools"))))
    mine, library = (statistics.median(side) for side in zip(*rounds, strict=True))
    print(f"own server protocol {mine:.0f} us a request, uvicorn's {library:.0f} us")
    print(f"ratio {statistics.median(b / a for a, b in rounds):.2f}")


if __name__ == "__main__":
    main()
