"""Targets behind a connection: a worker's HTTP, and its KV port."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

from fuzzing import ROOT, Target
from fuzzing.servers import PEER, ask, request, sent


@contextmanager
def decode_worker() -> Iterator[tuple[int, int]]:
    """A whole decode worker with the demo's small model; its ports, HTTP and KV."""
    from tandem_worker.config import WorkerConfig
    from tandem_worker.server.app import WorkerApp
    from tandem_worker.server.http_server import HttpServer, listen
    from tandem_worker.server.worker import Worker

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        kv_port = free.getsockname()[1]
    settings = {"served_model": "m", "num_kv_blocks": 32, "role": "decode", "kv_port": kv_port}
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
    try:
        yield port, kv_port
    finally:
        run_there(server.stop(force=True))
        run_there(served.stop())
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


@contextmanager
def worker() -> Iterator[tuple[Target, list[bytes]]]:
    """A worker's HTTP; the bytes are a peer's connection."""

    def seed(method: str, path: str, fields: Any = None, *more: str) -> bytes:
        return request(method, path, fields, PEER, *more)

    body = {"model": "m", "max_tokens": 3, "messages": [{"role": "user", "content": "12 + 30"}]}
    schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": "^[a-z]{2}$"}}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    sampled = {"temperature": 0.7, "top_p": 0.9, "top_k": 3, "min_p": 0.1, "seed": 7, "n": 2}
    marks = {"logprobs": True, "top_logprobs": 2, "logit_bias": {"3": 1.5}, "stop": ["x"]}
    known = ("x-tandem-created: 1", "x-tandem-seed: 7", "x-tandem-priority: -1")
    known += ("x-tandem-model: m", "x-tandem-deadline-ms: 50", "x-tandem-token-ids: 1")
    known += ("x-tandem-tenant: a",)
    text = {"prompt": "12 + 30", "max_tokens": 2, "echo": True, "logprobs": 1}
    order = {
        "version": 1, "request_id": "r", "epoch": 1, "token_ids": [1, 2, 3], "seed": 7,
        "num_computed_tokens": 0, "position": 3, "deadline_ms": 800,
        "sampling": {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "num_prompt_tokens": 3},
        "kv": {"address": "127.0.0.1:9", "block_ids": [3]},
    }  # fmt: skip
    chat, completions = "/v1/chat/completions", "/v1/completions"
    gets = ("/v1/load", "/v1/models/m", "/v1/models", "/version", "/openapi.json", "/ready")
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
        *(seed("GET", path) for path in gets),
        seed("GET", "/metrics", None, "expect: 100-continue", "upgrade: h2c"),
    ]
    with decode_worker() as (port, _):
        yield (lambda data: ask(port, data)), seeds


@contextmanager
def kv() -> Iterator[tuple[Target, list[bytes]]]:
    """A worker's KV port; the bytes are a stranger's connection, which never learns a token."""
    from tandem_worker.transfer.frames import Abort, Challenge, Credit, Frame, Open, encode

    frames: list[Frame] = [
        Challenge(2, 2, b"n" * 16),
        Open(push=1, epoch=2, request_id="request", probe=False),
        Credit(1, 100),
        Abort(1, 3, "why"),
    ]
    with decode_worker() as (port, kv_port):

        def read(data: bytes) -> None:
            sent(kv_port, data)
            ask(port, request("GET", "/health"))

        yield read, [*(encode(frame) for frame in frames), b"".join(map(encode, frames))]
