"""A vLLM server without a model: wire shapes as vLLM 0.32 gives them, breakable.

Tokens continue a fixed sequence of the prompt: whoever is given prompt and first tokens as ids
makes the same next ones, as vLLM does at temperature 0 in float32. As a command it is called as
vLLM is:
`python -m tandem_router.testing.fake_vllm serve WEIGHTS --port N --served-model-name NAME ...`
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
from dataclasses import dataclass, field
from typing import Any

from tandem_router.testing.fake_server import FakeServer, Seen, begin_stream, plain_reply
from tandem_router.testing.fake_worker import token_text

EOS = 0
MAX_MODEL_LEN = 512
METRICS = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
vllm:num_requests_running{{engine="0",model_name="{model}"}} {running}
vllm:num_requests_waiting{{engine="0",model_name="{model}"}} {waiting}
vllm:kv_cache_usage_perc{{engine="0",model_name="{model}"}} {kv_use}
vllm:prefix_cache_queries_total{{engine="0",model_name="{model}"}} 100.0
vllm:prefix_cache_hits_total{{engine="0",model_name="{model}"}} 25.0
vllm:external_prefix_cache_hits_total{{engine="0",model_name="{model}"}} {external}
vllm:generation_tokens_total{{engine="0",model_name="{model}"}} {tokens}
vllm:request_prompt_tokens_count{{engine="0",model_name="{model}"}} 10.0
vllm:request_prompt_tokens_sum{{engine="0",model_name="{model}"}} 400.0
vllm:time_to_first_token_seconds_bucket{{engine="0",le="0.1",model_name="{model}"}} 3.0
vllm:cache_config_info{{block_size="16",engine="0",num_gpu_blocks="200"}} 1.0
"""


def prompt_ids(body: dict[str, Any]) -> list[int]:
    """The prompt as token ids, one per character where it is text."""
    prompt = body.get("prompt")
    if isinstance(prompt, list):
        return list(prompt)
    text = prompt if isinstance(prompt, str) else json.dumps(body["messages"])
    return [1 + ord(letter) % 89 for letter in text]


def next_ids(prompt: list[int], number: int) -> list[int]:
    """The next tokens of a sequence, from all that stands before them."""
    ids = list(prompt)
    for _ in range(number):
        ids.append(3 + (sum(ids) * 31 + 7 * len(ids)) % 97)
    return ids[len(prompt) :]


@dataclass(eq=False)
class FakeVLLM(FakeServer):
    """cut_after: events of the next streams after which the connection is reset; None: none."""

    served_model: str = "model"
    revision: str = ""
    adapters: tuple[str, ...] = ()
    version: str = "0.32.0"
    gives_ids: bool = True
    tools: bool = False
    metrics: str | None = METRICS
    running: float = 0.0
    waiting: float = 0.0
    kv_use: float = 0.0
    tokens_made: float = 0.0
    max_tokens: int = 12
    cut_after: list[int | None] = field(default_factory=list)
    refuse: list[tuple[int, dict[str, str], bytes]] = field(default_factory=list)
    kv_params: dict[str, Any] | None = None
    takes_blocks: bool = False
    external_hits: float = 0.0
    pause_s: float = 0.0
    cached: set[tuple[int, ...]] = field(default_factory=set)

    @property
    def orders(self) -> list[Seen]:
        """Requests of clients: not the questions by which a reader finds out what it can do."""
        paths = ("/v1/chat/completions", "/v1/completions")
        return [seen for seen in self.seen if seen.path in paths and not _is_probe(seen)]

    def events(self, seen: Seen) -> list[bytes]:
        body, chat = seen.json, seen.path == "/v1/chat/completions"
        prompt = prompt_ids(body)
        ids = next_ids(prompt, body.get("max_tokens") or self.max_tokens)
        shows = bool(body.get("return_token_ids")) and self.gives_ids
        request_id = seen.headers.get("x-request-id", "none")
        head = {
            "id": ("chatcmpl-" if chat else "cmpl-") + request_id,
            "object": "chat.completion.chunk" if chat else "text_completion",
            "created": 1700000000 + len(self.inference),
            "model": body["model"],
        }
        events = []

        def chunk(choices: list[dict[str, Any]], **more: Any) -> None:
            text = json.dumps({**head, "choices": choices, **more}, separators=(",", ":"))
            events.append(b"data: " + text.encode() + b"\n\n")

        if chat:
            delta = {"role": "assistant", "content": ""}
            first = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}
            chunk([first], **({"prompt_token_ids": prompt} if shows else {}), prompt_text=None)
        for position, token in enumerate(ids):
            last = position == len(ids) - 1
            text = token_text(token)
            choice: dict[str, Any] = {"index": 0}
            choice |= {"delta": {"content": text}} if chat else {"text": text}
            choice |= {"logprobs": None, "finish_reason": "length" if last else None}
            if shows:
                if not chat and position == 0:
                    choice["prompt_token_ids"] = prompt
                choice["token_ids"] = [token]
            chunk([choice])
        usage = {"prompt_tokens": len(prompt), "completion_tokens": len(ids)}
        if (body.get("stream_options") or {}).get("include_usage"):
            chunk([], usage={**usage, "total_tokens": len(prompt) + len(ids)})
        return [*events, b"data: [DONE]\n\n"]

    def whole(self, seen: Seen) -> dict[str, Any]:
        body, prompt = seen.json, prompt_ids(seen.json)
        ids = next_ids(prompt, body.get("max_tokens") or self.max_tokens)
        text = "".join(map(token_text, ids))
        said: dict[str, Any] = {"message": {"role": "assistant", "content": text}}
        if seen.path == "/v1/completions":
            said = {"text": text}
        return {
            "id": seen.headers.get("x-request-id", "none"),
            "model": body["model"],
            "choices": [{"index": 0, "finish_reason": "length", **said}],
            "usage": {"prompt_tokens": len(prompt), "completion_tokens": len(ids)},
            "kv_transfer_params": self.kv_params if _order(seen) else None,
        }

    async def answer(self, seen: Seen, writer: asyncio.StreamWriter) -> bool:
        if seen.path == "/health":
            return await plain_reply(writer, 200, {}, b"")
        if seen.path == "/metrics":
            if self.metrics is None:
                return await plain_reply(writer, 404, {}, b'{"detail":"Not Found"}')
            text = self.metrics.format(
                model=self.served_model,
                running=self.running,
                waiting=self.waiting,
                kv_use=self.kv_use,
                tokens=self.tokens_made,
                external=self.external_hits,
            )
            return await plain_reply(writer, 200, {}, text.encode())
        if seen.path == "/v1/models":
            entries = [{"id": self.served_model, "parent": None, "max_model_len": MAX_MODEL_LEN}]
            if self.revision:
                entries.append({"id": f"tandem.revision={self.revision}", "parent": None})
            own = self.served_model
            entries += [{"id": a, "root": f"/{a}", "parent": own} for a in self.adapters]
            return await _json(writer, {"object": "list", "data": entries})
        if seen.path == "/version":
            return await _json(writer, {"version": self.version})
        if seen.path == "/openapi.json":
            return await _json(writer, {"paths": {"/v1/chat/completions": {}}})
        if self.refuse and not _is_probe(seen):
            return await plain_reply(writer, *self.refuse.pop(0))
        if seen.json.get("model") not in (self.served_model, *self.adapters):
            return await _error(writer, 404, "NotFoundError", "The model does not exist.")
        if seen.path == "/tokenize":
            ids = prompt_ids(seen.json)
            return await _json(
                writer, {"count": len(ids), "max_model_len": MAX_MODEL_LEN, "tokens": ids}
            )
        if seen.json.get("tools") and not self.tools:
            why = '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser'
            return await _error(writer, 400, "BadRequestError", why)
        if "image_url" in json.dumps(seen.json.get("messages")):
            return await _error(writer, 400, "BadRequestError", "not a multimodal model")
        num_asked = len(prompt_ids(seen.json)) + (seen.json.get("max_tokens") or 1)
        if num_asked > MAX_MODEL_LEN:
            why = f"This model's maximum context length is {MAX_MODEL_LEN} tokens."
            return await _error(writer, 400, "BadRequestError", why)
        is_new = tuple(prompt_ids(seen.json)) not in self.cached
        self.cached.add(tuple(prompt_ids(seen.json)))
        if (
            self.takes_blocks
            and is_new
            and (seen.json.get("kv_transfer_params") or {}).get("do_remote_prefill")
        ):
            self.external_hits += len(prompt_ids(seen.json))
        if not seen.json.get("stream"):
            return await _json(writer, self.whole(seen))
        await begin_stream(writer)
        events = self.events(seen)
        cut = self.cut_after.pop(0) if self.cut_after else None
        for event in events[:cut]:
            writer.write(b"%x\r\n%b\r\n" % (len(event), event))
            if self.pause_s:
                await writer.drain()
                await asyncio.sleep(self.pause_s)
        await writer.drain()
        if cut is not None:
            return False
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        return True


def _order(seen: Seen) -> bool:
    return bool((seen.json.get("kv_transfer_params") or {}).get("do_remote_decode"))


def _is_probe(seen: Seen) -> bool:
    return seen.json.get("max_tokens") == 1 and not _order(seen)


async def _json(writer: asyncio.StreamWriter, value: Any) -> bool:
    return await plain_reply(writer, 200, {}, json.dumps(value).encode())


async def _error(writer: asyncio.StreamWriter, status: int, kind: str, message: str) -> bool:
    error = {"message": message, "type": kind, "param": None, "code": status}
    return await plain_reply(writer, status, {}, json.dumps({"error": error}).encode())


async def _serve(args: argparse.Namespace) -> None:
    names = [name for name in args.served_model_name if "=" not in name]
    marks = dict(name.split("=", 1) for name in args.served_model_name if "=" in name)
    fake = FakeVLLM(
        host=args.host,
        port=args.port,
        served_model=names[0],
        revision=marks.get("tandem.revision", ""),
        adapters=tuple(module.split("=")[0] for module in args.lora_modules),
        pause_s=0.02,
        max_tokens=48,
    )
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    await fake.start()
    await ended.wait()
    await fake.drain()


def main(argv: list[str]) -> None:
    """Serve until SIGTERM, then finish what runs; flags that a fake has no use for are taken."""
    parser = argparse.ArgumentParser(prog="vllm", allow_abbrev=False)
    parser.add_argument("command", choices=["serve"])
    parser.add_argument("weights")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--served-model-name", nargs="+", required=True)
    parser.add_argument("--lora-modules", nargs="+", default=[])
    args, _ = parser.parse_known_args(argv)
    asyncio.run(_serve(args))


if __name__ == "__main__":
    main(sys.argv[1:])
