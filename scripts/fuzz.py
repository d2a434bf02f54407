"""Gives mutated bytes to everything that reads somebody else's: HTTP, KV frames, resources, files.

usage: fuzz.py [--minutes 10] [--seed 0] [--only http,worker,frames,...]

Each target takes bytes and may refuse them with its own errors; anything else (another exception, a
5xx, a stack trace in a reply, memory that keeps growing, a crash of this process) ends the run with
status 1 and the bytes, which --seed makes again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import random
import resource
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# What a target may keep after it has warmed up.
MOST_GROWTH_BYTES = 192 * 2**20
WARM_AFTER = 300
PIECES = (
    b"\x00", b"\xff" * 8, b"\r\n", b"\n\n", b"{}", b"[" * 50, b"null", b"1e999", b"-1", b"NaN",
    b"9" * 40, b"\\ud800", b"../../etc/passwd", b"%00", b"\xf0\x9f\x98\x80", b"'", b'"', b": ",
    b"true", b"18446744073709551615", b"0x7fffffff", b"chunked", b"169.254.169.254", b"$ref",
)  # fmt: skip

Target = Callable[[bytes], None]


class Finding(Exception):
    """What no input may do."""


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


# -- targets: (what is called, its seeds) ----------------------------------------------------------


@contextmanager
def http() -> Iterator[tuple[Target, list[bytes]]]:
    """A whole router on a real port; the bytes are a client's connection."""
    from tandem_router.api.app import RouterApp
    from tandem_router.api.inference import POSTS
    from tandem_router.config import parse_config
    from tandem_router.testing.fake_agent import FakeAgent
    from tandem_router.testing.live_router import live_router

    async def app() -> RouterApp:
        provider = await FakeAgent().start()
        tier = {"name": "t", "served_model": "m", "kind": "external", "url": f"{provider.url}/v1"}
        config = {"name": "chat", "tiers": [tier], "fallback_tier": "t"}
        return RouterApp(parse_config(json.dumps(config)))

    turn = {"role": "user", "content": "hello"}
    body = {"model": "chat", "max_tokens": 4, "prompt": "a", "input": "a", "messages": [turn]}
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    bodies = [body, {**body, "stream": True}, {**body, "tools": tools, "stop": ["x"], "n": 2}]
    bodies += [{"prompt": [[1, 2], [3]], "model": "t", "logprobs": 1, "echo": True}]
    seeds = []
    for path in sorted(POSTS):
        for fields in bodies:
            data = json.dumps(fields).encode()
            head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            seeds.append(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
        packed = f"{head}transfer-encoding: chunked\r\n\r\n{len(data):x}\r\n".encode()
        seeds.append(packed + data + b"\r\n0\r\n\r\n")
    for path in ("/", "/v1/models", "/admin/state", "/admin/decisions?limit=2", "/metrics"):
        seeds.append(f"GET {path} HTTP/1.1\r\nhost: localhost\r\nrange: bytes=0-1\r\n\r\n".encode())

    with live_router(app) as router:
        port = int(router.url.rpartition(":")[2])

        yield (lambda data: ask(port, data)), seeds


def ask(port: int, data: bytes) -> None:
    """One client's connection, until the server closes it. Raises Finding for a bad reply."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        reply = b""
        try:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            while part := connection.recv(65536):
                reply += part
        except ConnectionError:
            return
        except TimeoutError as error:
            raise Finding("no reply and no end of the connection") from error
    if reply and not reply.startswith(b"HTTP/1.1 "):
        raise Finding(f"the reply is no HTTP: {reply[:80]!r}")
    if reply[9:10] == b"5" and reply[9:12] not in (b"502", b"503"):
        raise Finding(f"status {reply[9:12]!r}: {reply[-300:]!r}")
    if b"Traceback" in reply or b".py" in reply.replace(b"python", b""):
        raise Finding(f"a stack trace: {reply[-300:]!r}")


@contextmanager
def worker() -> Iterator[tuple[Target, list[bytes]]]:
    """A whole decode worker with the demo's small model; the bytes are a peer's connection."""
    from tandem_worker.config import WorkerConfig
    from tandem_worker.server.app import WorkerApp
    from tandem_worker.server.http_server import HttpServer, listen
    from tandem_worker.server.worker import Worker

    settings = {"served_model": "m", "num_kv_blocks": 32, "role": "decode", "kv_port": 0}
    config = WorkerConfig.parse({**settings, "max_model_len": 256, "max_waiting": 8})
    listener = listen("127.0.0.1", 0)
    port = listener.getsockname()[1]
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def run_there(work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, loop).result(120)

    async def start() -> tuple[Worker, HttpServer]:
        served = Worker(
            config, ROOT / "examples" / "models" / "small", port=port, peer_token=b"token"
        )
        server = HttpServer(WorkerApp(served), listener)
        await server.start()
        await served.start()
        return served, server

    served, server = asyncio.run_coroutine_threadsafe(start(), loop).result(120)

    def seed(method: str, path: str, fields: Any = None, *more: str) -> bytes:
        data = b"" if fields is None else json.dumps(fields).encode()
        lines = [f"{method} {path} HTTP/1.1", "host: m", "x-tandem-peer-token: token", *more]
        lines.append(f"content-length: {len(data)}")
        return "\r\n".join([*lines, "connection: close", "", ""]).encode() + data

    body = {"model": "m", "max_tokens": 3, "messages": [{"role": "user", "content": "12 + 30"}]}
    schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": "^[a-z]{2}$"}}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    sampled = {"temperature": 0.7, "top_p": 0.9, "top_k": 3, "min_p": 0.1, "seed": 7, "n": 2}
    marks = {"logprobs": True, "top_logprobs": 2, "logit_bias": {"3": 1.5}, "stop": ["x"]}
    known = ("x-tandem-created: 1", "x-tandem-seed: 7", "x-tandem-priority: -1")
    known += ("x-tandem-model: m", "x-tandem-deadline-ms: 50", "x-tandem-token-ids: 1")
    text = {"prompt": "12 + 30", "max_tokens": 2, "echo": True, "logprobs": 1}
    order = {
        "version": 1, "request_id": "r", "epoch": 1, "token_ids": [1, 2, 3], "seed": 7,
        "num_computed_tokens": 0, "position": 3, "deadline_ms": 800,
        "sampling": {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "num_prompt_tokens": 3},
        "kv": {"address": "127.0.0.1:9", "block_ids": [3]},
    }  # fmt: skip
    chat, completions = "/v1/chat/completions", "/v1/completions"
    seeds = [
        *(seed("POST", chat, {**body, **more}, *known) for more in ({}, sampled, marks)),
        seed("POST", chat, {**body, "stream": True, "cache_salt": "s"}, *known),
        seed("POST", chat, {**body, "response_format": form}),
        seed("POST", chat, {**body, "tools": tools}),
        seed("POST", completions, text),
        seed("POST", completions, {"prompt": [[1, 2], [3]], "max_tokens": 1, "guided_regex": "a+"}),
        seed("POST", completions, {**text, "tandem": {"resume_token_ids": [[4, 5]]}}),
        seed("POST", "/v1/embeddings", {"input": ["a", "b"], "pooling": "mean"}),
        seed("POST", "/tokenize", {"prompt": "<|im_end|> a"}),
        seed("POST", "/tokenize", {"messages": body["messages"]}),
        seed("POST", "/detokenize", {"tokens": [1, 2, 3]}),
        seed("POST", "/internal/prefill", order),
        seed("POST", "/internal/abort", {"request_id": "r", "epoch": 1}),
        seed("POST", "/internal/kv-link", {"address": "127.0.0.1:9"}),
        seed("GET", "/v1/load"),
        seed("GET", "/v1/models/m"),
        seed("GET", "/metrics", None, "expect: 100-continue", "upgrade: h2c"),
    ]
    try:
        yield (lambda data: ask(port, data)), seeds
    finally:
        run_there(server.stop(force=True))
        run_there(served.stop())
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


@contextmanager
def frames() -> Iterator[tuple[Target, list[bytes]]]:
    """What comes first on the KV port: header and fields of one frame after the other."""
    from tandem_worker.transfer.errors import TransferError
    from tandem_worker.transfer.frame_reader import decode_header, decode_meta
    from tandem_worker.transfer.frames import (
        HEADER_BYTES,
        Abort,
        Challenge,
        Credit,
        Error,
        Frame,
        Open,
        Opened,
        Stopped,
        encode,
    )

    known: list[Frame] = [
        Challenge(2, 2, b"n" * 16),
        Open(push=1, epoch=2, request_id="request", probe=False),
        Opened(1, 4096, 4096),
        Credit(1, 100),
        Abort(1, 3, "why"),
        Stopped(1),
        Error(2, "why"),
    ]

    def read(data: bytes) -> None:
        at = 0
        try:
            while at + HEADER_BYTES <= len(data):
                header = decode_header(data[at : at + HEADER_BYTES])
                at += HEADER_BYTES
                meta = data[at : at + header.meta_length]
                if len(meta) < header.meta_length:
                    return
                decode_meta(header, meta)
                at += header.meta_length
        except TransferError:
            return

    yield read, [encode(frame) for frame in known]


@contextmanager
def resources() -> Iterator[tuple[Target, list[bytes]]]:
    """A file of resources as `tandem up` reads it, then each as the operator plans it."""
    from tandem_operator.manifests import ManifestError, load_text

    def read(data: bytes) -> None:
        try:
            load_text(data.decode("utf-8", errors="replace"), "fuzzed", ROOT)
        except ManifestError:
            return

    found = sorted((ROOT / "examples").glob("*/*.yaml"))
    yield read, [path.read_bytes() for path in found]


@contextmanager
def checkpoints() -> Iterator[tuple[Target, list[bytes]]]:
    """config.json and the head of the weights, as a worker loads them."""
    import torch

    from tandem_worker.errors import WorkerError
    from tandem_worker.models.checkpoint import load_weights
    from tandem_worker.models.spec import ModelSpec

    source = ROOT / "examples" / "models" / "small"
    weights = (source / "model.safetensors").read_bytes()
    head = 8 + int.from_bytes(weights[:8], "little")
    split = b"\n==\n"

    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "model"
        shutil.copytree(source, copy)

        def read(data: bytes) -> None:
            config, _, start = data.partition(split)
            (copy / "config.json").write_bytes(config)
            (copy / "model.safetensors").write_bytes(start + weights[head:])
            try:
                spec = ModelSpec.load(copy)
                load_weights(spec, copy, dtype=torch.float32, device=torch.device("cpu"))
            except WorkerError:
                return

        yield read, [(source / "config.json").read_bytes() + split + weights[:head]]


@contextmanager
def artifacts() -> Iterator[tuple[Target, list[bytes]]]:
    """A predictor's file, and one prompt for what is still a predictor."""
    from tandem_router.predictor.errors import PredictorError
    from tandem_router.predictor.runtime import loads

    place = ROOT / "examples" / "01-hybrid" / "predictor"
    whole = place.read_bytes() if place.is_file() else next(place.iterdir()).read_bytes()
    head = 8 + int.from_bytes(whole[:8], "little")

    def read(data: bytes) -> None:
        try:
            loads(data + whole[head:]).score("What is 12 + 30?")
        except PredictorError:
            return

    yield read, [whole[:head]]


TARGETS = {
    "http": http,
    "worker": worker,
    "frames": frames,
    "resources": resources,
    "checkpoints": checkpoints,
    "artifacts": artifacts,
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
            try:
                target(data)
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
