"""Two providers that bill what they generate and three workers; both break in every way.

A provider's bill is what the router's books are held against: it counts the tokens of each
attempt under the request's id, also of attempts whose answer never arrived.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import random
import socket
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

from faulty_day.reference import mark_of, prompt_tokens, token_ids, words
from faulty_day.schedule import ENDS_STREAMS, POOL, Episode
from tandem_router.testing.fake_provider import PROVIDER_TEXT
from tandem_router.testing.fake_server import FakeServer, Seen, plain_reply, write_chunk
from tandem_router.testing.fake_worker import FakeWorker

PROMPT_TOKENS_OF_WORKERS = 5
SENSELESS: list[Any] = [
    "many",
    [],
    {},
    {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
    {"prompt_tokens": None, "completion_tokens": None},
    {"prompt_tokens": "7", "completion_tokens": "9"},
    {"prompt_tokens": -3, "completion_tokens": -1},
    {"prompt_tokens": 1e99, "completion_tokens": 1.5},
    {"prompt_tokens": True, "completion_tokens": False},
]
ERROR = {"message": PROVIDER_TEXT, "type": "server_error", "code": "boom"}
# Told with every reply, and nobody's business.
HEADERS = {"server": PROVIDER_TEXT, "set-cookie": f"a={PROVIDER_TEXT}", "x-provider": PROVIDER_TEXT}


@dataclass(eq=False)
class Breakable(FakeServer):
    """A server with episodes: `met` counts the requests of each kind of fault."""

    now: Episode | None = None
    rng: random.Random = field(default_factory=random.Random)
    met: Counter[str] = field(default_factory=Counter)
    kinds_of: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    over: asyncio.Event = field(default_factory=asyncio.Event)  # what hangs, ends
    _deaf: socket.socket | None = None

    def fault(self, seen: Seen) -> str:
        """What this request meets; "" for nothing."""
        episode = self.now
        if episode is None or self.rng.random() >= episode.share:
            return ""
        self.met[episode.kind] += 1
        self.kinds_of[seen.headers.get("x-request-id", "")].append(episode.kind)
        return episode.kind

    async def go_deaf(self) -> None:
        """Connections are made by the kernel, and nobody reads them."""
        await self.stop()
        self._deaf = socket.socket()
        self._deaf.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._deaf.bind((self.host, self.port))
        self._deaf.listen(128)

    async def recover(self) -> None:
        """Listen again, on the same port."""
        if self._deaf is not None:
            self._deaf.close()
            self._deaf = None
        if self._server is None:
            await self.start()

    async def _begin(self, writer: asyncio.StreamWriter, headers: dict[str, str]) -> None:
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        head = f"content-type: text/event-stream\r\n{lines}transfer-encoding: chunked\r\n\r\n"
        writer.write(b"HTTP/1.1 200 OK\r\n" + head.encode())
        await writer.drain()


@dataclass(eq=False)
class Provider(Breakable):
    """bills: tokens (prompt, output) by request. keys: those that it accepts."""

    tier: str = ""
    keys: set[str] = field(default_factory=set)
    bills: dict[str, list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))
    told_internals: list[str] = field(default_factory=list)
    num_rejected_keys: int = 0

    def bill(self, seen: Seen, output: int) -> None:
        tokens = (prompt_tokens(seen.json), output)
        self.bills[seen.headers.get("x-request-id", "")].append(tokens)

    async def answer(self, seen: Seen, writer: asyncio.StreamWriter) -> bool:
        for name in seen.headers:
            if name.startswith("x-tandem") or name == "cookie":
                self.told_internals.append(name)
        key = seen.headers.get("authorization", "").removeprefix("bearer ")
        if key not in self.keys:
            self.num_rejected_keys += 1
            error = {"error": {"message": f"Incorrect API key provided: {key} {PROVIDER_TEXT}"}}
            return await self._refuse(writer, 401, error)
        kind, body = self.fault(seen), seen.json
        stream = bool(body.get("stream"))
        said = words(self.tier, mark_of(body), most_tokens(body))
        if kind.isdigit():
            return await self._refuse(writer, int(kind), {"error": ERROR})
        if kind == "key as 400":
            wrong = {"message": f"API key not valid: {PROVIDER_TEXT}", "code": "400"}
            return await self._refuse(writer, 400, {"error": wrong})
        if kind == "HTML":
            page = f"<html>{PROVIDER_TEXT}</html>".encode()
            return await plain_reply(writer, 200, HEADERS, page, "text/html")
        if kind in ("hang", "reset"):
            self.bill(seen, 0 if stream else len(said))
            if kind == "hang":
                await self.over.wait()
            return False
        if kind == "slow head":
            await asyncio.sleep(self.rng.uniform(0.2, 1.0))
        if kind == "wrong form":
            stream = not stream
        if stream:
            return await self._stream(kind, seen, said, writer)
        return await self._whole(kind, seen, said, writer)

    async def _refuse(self, writer: asyncio.StreamWriter, status: int, body: Any) -> bool:
        headers = dict(HEADERS)
        if status in (429, 503):
            headers["retry-after"] = "2"
        if status == 301:
            headers["location"] = "https://elsewhere.invalid/"
        return await plain_reply(writer, status, headers, json.dumps(body).encode())

    def _usage(self, kind: str, seen: Seen, output: int) -> dict[str, Any]:
        if kind == "usage absent":
            return {}
        if kind == "usage senseless":
            return {"usage": self.rng.choice(SENSELESS)}
        prompt = prompt_tokens(seen.json)
        usage = {"prompt_tokens": prompt, "completion_tokens": output}
        return {"usage": {**usage, "total_tokens": prompt + output}}

    async def _whole(
        self, kind: str, seen: Seen, said: list[str], writer: asyncio.StreamWriter
    ) -> bool:
        part: dict[str, Any] = {"message": {"role": "assistant", "content": "".join(said)}}
        if seen.path.endswith("/completions") and "chat" not in seen.path:
            part = {"text": "".join(said)}
        reply: dict[str, Any] = {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "model": seen.json.get("model"),
            "choices": [{"index": 0, "finish_reason": "stop", **part}],
            **self._usage(kind, seen, len(said)),
        }
        if kind == "error in 200":
            reply = {"error": ERROR}
        elif kind == "choices empty":
            reply = {**reply, "choices": [], "error": ERROR}
        elif kind == "error beside choices":
            reply["error"] = ERROR
        elif kind == "null error":
            reply["error"] = None
        if not reply.get("error"):
            self.bill(seen, len(said))
        body = json.dumps(reply).encode()
        if kind in ("cut whole", "comments for ever"):
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body))
            writer.write(body[: self.rng.randrange(len(body))])
            await writer.drain()
            if kind == "comments for ever":
                await self.over.wait()
            return False
        if kind == "trickle":
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body))
            for start in range(0, len(body), 64):
                writer.write(body[start : start + 64])
                await writer.drain()
                await asyncio.sleep(0.02)
            return True
        if kind == "packed":
            packed = {**HEADERS, "content-encoding": "gzip"}
            return await plain_reply(writer, 200, packed, gzip.compress(body))
        return await plain_reply(writer, 200, HEADERS, body)

    async def _stream(
        self, kind: str, seen: Seen, said: list[str], writer: asyncio.StreamWriter
    ) -> bool:
        chat = "chat" in seen.path
        more = {"error": None} if kind == "null error" else {}

        def chunk(piece: str | None, finish: str | None = None, **extra: Any) -> bytes:
            choice: dict[str, Any] = {"index": 0, "finish_reason": finish}
            if chat:
                choice["delta"] = {} if piece is None else {"content": piece}
            else:
                choice["text"] = piece or ""
            payload = {"id": "chatcmpl-1", "choices": [choice], **more, **extra}
            return b"data: " + json.dumps(payload).encode() + b"\n\n"

        await self._begin(writer, HEADERS)
        failure = b"data: " + json.dumps({"error": ERROR, "choices": []}).encode() + b"\n\n"
        if kind in ("error in 200", "choices empty", "error beside choices"):
            await write_chunk(writer, failure)
            await write_chunk(writer, b"")
            return True
        cut = self.rng.randrange(1, len(said)) if kind in ENDS_STREAMS else len(said)
        self.bills[seen.headers.get("x-request-id", "")].append((prompt_tokens(seen.json), 0))
        bill = self.bills[seen.headers.get("x-request-id", "")]
        place = len(bill) - 1
        if chat:
            role = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}
            await write_chunk(writer, b"data: " + json.dumps({**role, **more}).encode() + b"\n\n")
        if kind == "cut before":
            return False
        while kind == "comments for ever":
            await write_chunk(writer, b": still here\n\n")
            await asyncio.sleep(0.1)
        pause_s = 0.05 if kind == "trickle" else self.rng.choice((0.0, 0.0, 0.005))
        for number, piece in enumerate(said[:cut], 1):
            await write_chunk(writer, chunk(piece))
            bill[place] = (bill[place][0], number)
            if pause_s:
                await asyncio.sleep(pause_s)
        if kind == "cut later":
            return False
        if kind == "error later":
            await write_chunk(writer, failure)
            await write_chunk(writer, b"")
            return True
        await write_chunk(writer, chunk(None, "stop"))
        usage = self._usage(kind, seen, len(said))
        if usage:
            payload = {"id": "chatcmpl-1", "choices": [], **more, **usage}
            await write_chunk(writer, b"data: " + json.dumps(payload).encode() + b"\n\n")
        if kind != "no [DONE]":
            await write_chunk(writer, b"data: [DONE]\n\n")
        await write_chunk(writer, b"")
        return True


@dataclass(eq=False)
class Worker(Breakable, FakeWorker):
    """Of the pool; goes on from other workers' tokens exactly, or says that they are wrong."""

    wrong_resumptions: int = 0

    def tokens(self, body: dict[str, Any], seed: str, index: int) -> list[int]:
        ids = token_ids(POOL, mark_of(body), most_tokens(body))
        done = (body.get("tandem", {}).get("resume_token_ids") or [[]])[index]
        if ids[: len(done)] != done:
            self.wrong_resumptions += 1
        self.num_tokens = 1_000
        return ids

    async def answer(self, seen: Seen, writer: asyncio.StreamWriter) -> bool:
        if seen.path == "/v1/load":
            return await super().answer(seen, writer)
        kind = self.fault(seen)
        stream = bool(seen.json.get("stream"))
        if kind.isdigit():
            error = {"error": {"message": PROVIDER_TEXT, "type": "server_error"}}
            return await plain_reply(writer, int(kind), {}, json.dumps(error).encode())
        if kind == "hang":
            await self.over.wait()
        if kind == "reset":
            return False
        if kind == "HTML":
            return await plain_reply(writer, 200, {}, b"<html>oops</html>", "text/html")
        if kind == "error in 200" and not stream:
            return await plain_reply(writer, 200, {}, json.dumps({"error": ERROR}).encode())
        if kind == "error in 200":
            await self._begin(writer, {})
            await write_chunk(writer, b"data: " + json.dumps({"error": ERROR}).encode() + b"\n\n")
            await write_chunk(writer, b"")
            return True
        if kind == "cut whole" and not stream:
            self.cut_after.append(self.rng.randrange(len(self.whole(seen))))
        if kind in ("cut later", "error later") and stream:
            events = self.events(seen)
            at = self.rng.randrange(len(b"".join(events)))
            if kind == "cut later":
                self.cut_after.append(at)
            else:
                await self._begin(writer, {})
                for event in events[: self.rng.randrange(len(events))]:
                    await write_chunk(writer, event)
                failure = json.dumps({"error": ERROR}).encode()
                await write_chunk(writer, b"data: " + failure + b"\n\n")
                await write_chunk(writer, b"")
                return True
        if kind == "trickle" and stream:
            await self._begin(writer, {})
            for event in self.events(seen):
                for start in range(0, len(event), 200):
                    await write_chunk(writer, event[start : start + 200])
                    await asyncio.sleep(0.005)
            await write_chunk(writer, b"")
            return True
        return await FakeWorker.answer(self, seen, writer)


def most_tokens(body: dict[str, Any]) -> int | None:
    """The bound of an answer, under either of its names."""
    return body.get("max_tokens") or body.get("max_completion_tokens")
