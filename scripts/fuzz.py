"""Gives mutated bytes to everything that reads somebody else's: HTTP, KV frames, resources, files.

usage: fuzz.py [--minutes 10] [--seed 0] [--only http,worker,frames,...]

Each target (`fuzzing/`) takes bytes and may refuse them with its own errors; anything else (another
exception, a 5xx, a stack trace in a reply or a log, memory that keeps growing, one input that takes
longer than SLOW_S of processor time, a crash of this process) ends the run with status 1 and the
bytes, which --seed makes again.
"""

from __future__ import annotations

import argparse
import logging
import random
import resource
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from fuzzing import Finding, files, servers, workers

# What a target may keep after it has warmed up.
MOST_GROWTH_BYTES = 192 * 2**20
WARM_AFTER = 300
# Of processor time, which other work on the machine does not lengthen.
SLOW_S = 20.0
PIECES = (
    b"\x00", b"\xff" * 8, b"\r\n", b"\n\n", b"{}", b"[" * 50, b"null", b"1e999", b"-1", b"NaN",
    b"9" * 40, b"\\ud800", b"../../etc/passwd", b"%00", b"\xf0\x9f\x98\x80", b"'", b'"', b": ",
    b"true", b"18446744073709551615", b"0x7fffffff", b"chunked", b"169.254.169.254", b"$ref",
    b"[" * 3000, b'{"a":' * 3000, b"inf", b"-1e308",
)  # fmt: skip


class Logged(logging.Handler):
    """Errors with a stack trace that our code has logged: each is one that nobody foresaw."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.name.startswith(("tandem", "uvicorn")):
            self.found.append(f"{record.getMessage()}: {record.exc_info[1]!r}")


LOGGED = Logged()


def mutated(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """One seed with a few bytes changed, cut, doubled, spliced or replaced by a nasty piece."""
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(len(data) + 1)
        length = min(len(data) - at, rng.choice((1, 2, 8, 64)))
        match rng.randrange(7):
            case 0 if length:
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                del data[at : at + length]
            case 2:
                data[at:at] = data[at : at + length] * rng.choice((1, 2, 50))
            case 3:
                other = rng.choice(seeds)
                start = rng.randrange(len(other) + 1)
                data[at : at + length] = other[start : start + 64]
            case 4:
                data[at:at] = rng.choice(PIECES)
            case 5:
                data[at : at + length] = rng.choice(PIECES)
            case _:
                data[at : at + length] = rng.randbytes(length)
    return bytes(data[: 256 * 1024])


TARGETS = {
    "http": servers.http,
    "admin": servers.admin,
    "provider": servers.provider,
    "gateway": servers.gateway,
    "worker": workers.worker,
    "kv": workers.kv,
    "frames": files.frames,
    "resources": files.resources,
    "checkpoints": files.checkpoints,
    "formats": files.formats,
    "tokenizers": files.tokenizers,
    "artifacts": files.artifacts,
    "prompts": files.prompts,
    "labels": files.labels,
    "traces": files.traces,
}


def memory() -> int:
    """Bytes of this process that are in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def run(name: str, seconds: float, seed: int) -> str:
    """Drive one target; what was done, as a sentence. Raises Finding."""
    rng = random.Random(f"{seed}/{name}")
    with ExitStack() as stack:
        target, seeds = stack.enter_context(TARGETS[name]())
        for data in seeds:
            target(data)
        count, before, ends_at = 0, memory(), time.monotonic() + seconds
        while time.monotonic() < ends_at:
            data = mutated(rng, seeds)
            began_s = time.process_time()
            try:
                target(data)
                if (took_s := time.process_time() - began_s) > SLOW_S:
                    raise Finding(f"took {took_s:.0f} s")
                if LOGGED.found:
                    raise Finding(f"logged {LOGGED.found[0]}")
            except Finding as finding:
                raise Finding(f"{name}, input {count}: {finding}; bytes {data[:2000]!r}") from None
            except Exception as error:
                kind = type(error).__name__
                raise Finding(
                    f"{name}, input {count}: {kind}: {error}; bytes {data[:2000]!r}"
                ) from error
            count += 1
            if count == WARM_AFTER:
                before = memory()
            if count > WARM_AFTER and memory() - before > MOST_GROWTH_BYTES:
                raise Finding(f"{name}: grew by {(memory() - before) >> 20} MiB in {count} inputs")
        grown = max(0, memory() - before) >> 20
    return f"{name}: {count} inputs, {grown} MiB grown"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="over all targets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=",".join(TARGETS), help="targets, by commas")
    args: Any = parser.parse_args(argv)
    logging.disable(logging.WARNING)
    logging.basicConfig(handlers=[LOGGED], force=True)
    names = args.only.split(",")
    if unknown := [name for name in names if name not in TARGETS]:
        parser.error(f"{unknown[0]!r} is no target; use {', '.join(TARGETS)}")
    for name in names:
        try:
            print(run(name, args.minutes * 60.0 / len(names), args.seed), flush=True)
        except Finding as finding:
            print(f"FOUND {finding}", flush=True)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
