"""A vLLM server without a model, in the wire shapes of a recorded version, breakable.

Replies are those that `scripts/vllm_shapes.py` recorded of a real server (`vllm_recordings/`), with
other texts, ids and numbers. Tokens continue a fixed sequence of the prompt: whoever is given
prompt and first tokens as ids makes the same next ones, as vLLM does at temperature 0 in float32.
As a command it is called as vLLM is:
`python -m tandem_router.testing.fake_vllm serve WEIGHTS --port N --served-model-name NAME ...`
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from tandem_router.testing.fake_server import (
    FakeServer,
    Seen,
    begin_stream,
    embedded,
    plain_reply,
)
from tandem_router.testing.fake_worker import token_text

_MARK = "tandem.revision="
MAX_MODEL_LEN = 512
RECORDINGS = Path(__file__).parent / "vllm_recordings"
VERSIONS = ("0.9.2", "0.10.2", "0.32.0")  # those that were recorded
_NOTES = "# HELP vllm:num_requests_running Number of requests in model execution batches."


@cache
def recording(version: str) -> dict[str, Any]:
    """What a real server of the version answered."""
    found: dict[str, Any] = json.loads((RECORDINGS / f"{version}.json").read_text())
    return found


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
    """cut_after: events of the next streams after which the connection is reset; None: none.

    version: says what it says; `plays` is the recorded version whose shapes it has.
    without_metrics: names that its `/metrics` lack; None: it has no `/metrics`.
    """

    served_model: str = "model"
    revision: str = ""
    adapters: tuple[str, ...] = ()
    more_metrics: dict[str, float] = field(default_factory=dict)
    plays: str = "0.32.0"
    version: str | None = None
    gives_ids: bool = True
    tools: bool = False
    images: bool = False
    embeds: bool = False
    without_metrics: Collection[str] | None = ()
    running: float = 0.0
    waiting: float = 0.0
    kv_use: float = 0.0
    tokens_made: float = 0.0
    max_tokens: int = 12
    logprob: float = -0.25  # of every token, told where it is asked for
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

    def recorded(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = recording(self.plays)["replies"][name]
        return found

    def head(self, seen: Seen) -> dict[str, Any]:
        begins = "chatcmpl-" if seen.path == "/v1/chat/completions" else "cmpl-"
        return {
            "id": begins + seen.headers.get("x-request-id", "none"),
            "created": 1700000000 + len(self.inference),
            "model": seen.json["model"],
        }

    def events(self, seen: Seen) -> list[bytes]:
        body, chat = seen.json, seen.path == "/v1/chat/completions"
        prompt = prompt_ids(body)
        ids = next_ids(prompt, body.get("max_tokens") or self.max_tokens)
        shows = bool(body.get("return_token_ids")) and self.gives_ids
        name = f"{'chat' if chat else 'text'} stream{' with ids' if shows else ''}"
        told = [e for e in self.recorded(name)["events"] if e != "[DONE]"]
        usage = next(e for e in told if not e["choices"])
        told = [e for e in told if e["choices"]]
        first, last = told[0], told[-1]
        texts = [("", first)] if chat else []
        texts += [(token_text(t), told[1]) for t in ids[:-1]] + [(token_text(ids[-1]), last)]
        if not chat:
            texts[0] = (texts[0][0], first if len(ids) > 1 else last)
        events = []
        for position, (text, like) in enumerate(texts):
            [choice] = like["choices"]
            choice = {**choice}
            if chat:
                choice["delta"] = {**choice["delta"], "content": text}
            else:
                choice["text"] = text
            event = {**like, **self.head(seen), "choices": [choice]}
            at = position - chat  # the token that this event tells, after the one of the role
            for holder in (event, choice):
                if holder.get("prompt_token_ids") is not None:
                    holder["prompt_token_ids"] = prompt
                if holder.get("token_ids") is not None:
                    holder["token_ids"] = [ids[at]] if at >= 0 else []
            events.append(event)
        if (body.get("stream_options") or {}).get("include_usage"):
            events.append({**usage, **self.head(seen), "usage": _usage(usage, prompt, ids)})
        lines = [json.dumps(event, separators=(",", ":")).encode() for event in events]
        return [b"data: " + line + b"\n\n" for line in (*lines, b"[DONE]")]

    def whole(self, seen: Seen) -> dict[str, Any]:
        body, prompt = seen.json, prompt_ids(seen.json)
        ids = next_ids(prompt, body.get("max_tokens") or self.max_tokens)
        text = "".join(map(token_text, ids))
        chat = seen.path == "/v1/chat/completions"
        like = self.recorded("chat" if chat else "text")["body"]
        [choice] = like["choices"]
        choice = {**choice}
        if chat:
            choice["message"] = {**choice["message"], "content": text}
        else:
            choice["text"] = text
        if body.get("logprobs") not in (None, False):
            words = list(map(token_text, ids))
            sure: dict[str, Any] = {"tokens": words, "token_logprobs": [self.logprob] * len(ids)}
            if chat:
                sure = {"content": [{"token": word, "logprob": self.logprob} for word in words]}
            choice["logprobs"] = sure
        reply = {**like, **self.head(seen), "choices": [choice], "usage": _usage(like, prompt, ids)}
        return {**reply, "kv_transfer_params": self.kv_params if _order(seen) else None}

    def models(self) -> dict[str, Any]:
        like = self.recorded("models")["body"]
        base = next(entry for entry in like["data"] if not entry["parent"])
        names = [self.served_model, *([f"{_MARK}{self.revision}"] if self.revision else [])]
        entries = [{**base, "id": name, "max_model_len": MAX_MODEL_LEN} for name in names]
        for adapter in self.adapters:
            own = {"id": adapter, "root": f"/{adapter}", "parent": self.served_model}
            entries.append({**base, **own, "max_model_len": None})
        return {**like, "data": entries}

    def metrics(self) -> str:
        """Prometheus text with the names of the recorded version."""
        said = {
            "vllm:num_requests_running": self.running,
            "vllm:num_requests_waiting": self.waiting,
            "vllm:kv_cache_usage_perc": self.kv_use,
            "vllm:gpu_cache_usage_perc": self.kv_use,
            "vllm:prefix_cache_queries_total": 100.0,
            "vllm:prefix_cache_hits_total": 25.0,
            "vllm:external_prefix_cache_hits_total": self.external_hits,
            "vllm:generation_tokens_total": self.tokens_made,
            "vllm:request_prompt_tokens_count": 10.0,
            "vllm:request_prompt_tokens_sum": 400.0,
        }
        lines = [_NOTES]
        for name in {**dict.fromkeys(recording(self.plays)["metrics"]), **self.more_metrics}:
            labels = f'engine="0",model_name="{self.served_model}"'
            value = self.more_metrics.get(name, said.get(name, 0.0))
            if name == "vllm:cache_config_info":
                labels, value = 'block_size="16",engine="0",num_gpu_blocks="200"', 1.0
            elif name.endswith("_bucket"):
                labels += ',le="+Inf"'
            if name not in (self.without_metrics or ()):
                lines.append(f"{name}{{{labels}}} {value}")
        return "\n".join([*lines, ""])

    async def error(
        self, writer: asyncio.StreamWriter, status: int, kind: str, message: str
    ) -> bool:
        """An error in the version's own form."""
        like = self.recorded("unknown model")["body"]
        said = {"message": message, "type": kind, "code": status}
        if isinstance(like.get("error"), dict):
            return await _json(writer, {**like, "error": {**like["error"], **said}}, status)
        return await _json(writer, {**like, **said}, status)

    async def answer(self, seen: Seen, writer: asyncio.StreamWriter) -> bool:
        if seen.path == "/health":
            return await plain_reply(writer, 200, {}, b"")
        if seen.path == "/metrics":
            if self.without_metrics is None:
                return await plain_reply(writer, 404, {}, b'{"detail":"Not Found"}')
            return await plain_reply(writer, 200, {}, self.metrics().encode())
        if seen.path == "/v1/models":
            return await _json(writer, self.models())
        if seen.path == "/version":
            return await _json(writer, {"version": self.version or self.plays})
        if seen.path == "/openapi.json":
            known = recording(self.plays)
            fields: dict[str, Any] = {name: {} for name in known["chat_fields"]}
            schemas = {"ChatCompletionRequest": {"properties": fields}}
            paths: dict[str, Any] = {path: {} for path in known["paths"]}
            if self.embeds:
                paths = {"/v1/embeddings": {}}
            described = {"paths": paths, "components": {"schemas": schemas}}
            return await _json(writer, described)
        if self.refuse and not _is_probe(seen):
            return await plain_reply(writer, *self.refuse.pop(0))
        if seen.json.get("model") not in (self.served_model, *self.adapters):
            return await self.error(writer, 404, "NotFoundError", "The model does not exist.")
        if seen.path == "/tokenize":
            ids = prompt_ids(seen.json)
            like = self.recorded("tokenize")["body"]
            return await _json(writer, {**like, "count": len(ids), "tokens": ids})
        if seen.json.get("tools") and not self.tools:
            why = '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser'
            return await self.error(writer, 400, "BadRequestError", why)
        if "image_url" in json.dumps(seen.json.get("messages")) and not self.images:
            return await self.error(writer, 400, "BadRequestError", "not a multimodal model")
        if seen.path == "/v1/embeddings":
            if not self.embeds:
                known = self.recorded("embeddings")
                return await _json(writer, known["body"], known["status"])
            return await _json(writer, embedded(seen.json))
        num_asked = len(prompt_ids(seen.json)) + (seen.json.get("max_tokens") or 1)
        if num_asked > MAX_MODEL_LEN:
            why = f"This model's maximum context length is {MAX_MODEL_LEN} tokens."
            return await self.error(writer, 400, "BadRequestError", why)
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


def _usage(like: dict[str, Any], prompt: list[int], ids: list[int]) -> dict[str, Any]:
    counts = {"prompt_tokens": len(prompt), "completion_tokens": len(ids)}
    return {**like["usage"], **counts, "total_tokens": len(prompt) + len(ids)}


async def _json(writer: asyncio.StreamWriter, value: Any, status: int = 200) -> bool:
    text = json.dumps(value, separators=(",", ":")).encode()
    return await plain_reply(writer, status, {}, text)


async def _serve(args: argparse.Namespace) -> None:
    names = [name for name in args.served_model_name if "=" not in name]
    marks = dict(name.split("=", 1) for name in args.served_model_name if "=" in name)
    fake = FakeVLLM(
        host=args.host,
        port=args.port,
        served_model=names[0],
        revision=marks.get(_MARK.rstrip("="), ""),
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
