"""Records the wire shapes of a running vLLM server: what the fake in the tests has to give.

usage: vllm_shapes.py URL [--out FILE]

Asks a fixed list of questions and keeps status, content type and body of each reply; times, ids
and texts are as they came, and only their shapes are compared. Of `/metrics` the names are kept,
of `/openapi.json` the paths and the fields of a chat request.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import httpx

WORDS = [{"role": "user", "content": "3 + 4 ="}]
PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwAD"
    "hgGAWjR9awAAAABJRU5ErkJggg=="
)
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
SCHEMA = {"name": "x", "schema": {"type": "string", "enum": ["yes", "no"]}}
USAGE = {"include_usage": True}
SHORT = {"temperature": 0, "max_tokens": 4}
CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
# name: (path, body); None asks by GET. MODEL stands for the served name.
QUESTIONS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "health": ("/health", None),
    "version": ("/version", None),
    "models": ("/v1/models", None),
    "load": ("/load", None),
    "tokenize": ("/tokenize", {"prompt": "3 + 4 ="}),
    "tokenize chat": ("/tokenize", {"messages": WORDS}),
    "detokenize": ("/detokenize", {"tokens": [20, 21]}),
    "chat": (CHAT, {"messages": WORDS, **SHORT}),
    "chat with ids": (CHAT, {"messages": WORDS, **SHORT, "return_token_ids": True}),
    "chat stream": (CHAT, {"messages": WORDS, **SHORT, "stream": True, "stream_options": USAGE}),
    "chat stream with ids": (
        CHAT,
        {
            "messages": WORDS,
            **SHORT,
            "stream": True,
            "stream_options": USAGE,
            "return_token_ids": True,
        },
    ),
    "text": (TEXT, {"prompt": "3 + 4 =", **SHORT}),
    "text stream": (
        TEXT,
        {"prompt": [20, 21, 12], **SHORT, "stream": True, "stream_options": USAGE},
    ),
    "text stream with ids": (
        TEXT,
        {
            "prompt": [20, 21, 12],
            **SHORT,
            "stream": True,
            "stream_options": USAGE,
            "return_token_ids": True,
        },
    ),
    "log-probabilities": (TEXT, {"prompt": [20, 21], **SHORT, "logprobs": 1}),
    "schema": (
        CHAT,
        {
            "messages": WORDS,
            **SHORT,
            "max_tokens": 20,
            "response_format": {"type": "json_schema", "json_schema": SCHEMA},
        },
    ),
    "tools": (CHAT, {"messages": WORDS, **SHORT, "tools": [TOOL]}),
    "priority": (CHAT, {"messages": WORDS, **SHORT, "priority": 3}),
    "kv transfer": (
        TEXT,
        {"prompt": [20, 21], **SHORT, "kv_transfer_params": {"do_remote_decode": True}},
    ),
    "salt": (CHAT, {"messages": WORDS, **SHORT, "cache_salt": "x"}),
    "unknown model": (CHAT, {"model": "no-such-model", "messages": WORDS}),
    "too long": (TEXT, {"prompt": [20] * 600, "max_tokens": 8}),
    "too many tokens": (TEXT, {"prompt": [20], "max_tokens": 100_000}),
    "wrong type": (CHAT, {"messages": "text"}),
    "image": (
        CHAT,
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": PIXEL}}]}
            ]
        },
    ),
    "embeddings": ("/v1/embeddings", {"input": "a"}),
    "no such path": ("/v1/no-such-path", {"input": "a"}),
}


def events(text: str) -> list[Any]:
    """The payloads of a stream; `[DONE]` as it is."""
    found = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    return [word if word == "[DONE]" else json.loads(word) for word in found]


def answered(reply: httpx.Response) -> dict[str, Any]:
    kind = reply.headers.get("content-type", "").split(";")[0]
    said: dict[str, Any] = {"status": reply.status_code, "type": kind}
    if kind == "text/event-stream":
        return {**said, "events": events(reply.text)}
    try:
        return {**said, "body": reply.json()}
    except ValueError:
        return {**said, "body": reply.text}


def record(ask: httpx.Client) -> dict[str, Any]:
    """Everything that is asked of one server."""
    [model, *_] = [entry["id"] for entry in ask.get("/v1/models").json()["data"]]
    replies: dict[str, Any] = {}
    for name, (path, body) in QUESTIONS.items():
        if body is None:
            replies[name] = answered(ask.get(path))
        else:
            replies[name] = answered(ask.post(path, json={"model": model, **body}))
    names = ask.get("/metrics").text.splitlines()
    described = ask.get("/openapi.json").json()
    return {
        "version": ask.get("/version").json()["version"],
        "metrics": sorted({n.split("{")[0].split(" ")[0] for n in names if n[:5] == "vllm:"}),
        "paths": sorted(described["paths"]),
        "chat_fields": sorted(
            described["components"]["schemas"]["ChatCompletionRequest"]["properties"]
        ),
        "replies": replies,
    }


def written(found: dict[str, Any]) -> str:
    """As JSON, a reply per line; the folder of the weights is nobody's business."""
    root = found["replies"]["models"]["body"]["data"][0]["root"]
    replies = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in found["replies"].items()]
    head = [f" {json.dumps(k)}: {json.dumps(v)}" for k, v in found.items() if k != "replies"]
    lines = ["{", ",\n".join(head) + ",", ' "replies": {', ",\n".join(replies), " }", "}", ""]
    return "\n".join(lines).replace(root, "/weights")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("url")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    try:
        with httpx.Client(base_url=args.url, timeout=120) as ask:
            found = record(ask)
    except (httpx.HTTPError, ValueError, KeyError) as error:
        print(f"{args.url} does not answer as vLLM does: {error!r}", file=sys.stderr)
        return 1
    text = written(found)
    if args.out is None:
        print(text, end="")
    else:
        args.out.write_text(text)
        print(f"recorded vLLM {found['version']}: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
