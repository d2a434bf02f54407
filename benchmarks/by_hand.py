"""What splitting a stream of server-sent events by hand costs beside a library's decoder.

    python benchmarks/by_hand.py

CPU seconds of one process, both sides in turn on the same bytes, median of the rounds. The peer is
the decoder of the openai client (a dependency of the tests), which parses each event; the router
only has to know where events end. docs/decisions/0046 rests on the ratio.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable

from openai._streaming import SSEDecoder

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


def cpu_us(work: Callable[[], None]) -> float:
    """CPU microseconds per chunk."""
    began = time.process_time()
    work()
    return (time.process_time() - began) / NUM_CHUNKS * 1e6


def main() -> None:
    rounds = [(cpu_us(by_hand), cpu_us(by_library)) for _ in range(ROUNDS)]
    mine, library = (statistics.median(side) for side in zip(*rounds, strict=True))
    print(f"own splitter {mine:.2f} us a chunk, openai's decoder {library:.2f} us")
    print(f"ratio {statistics.median(b / a for a, b in rounds):.1f}")


if __name__ == "__main__":
    main()
