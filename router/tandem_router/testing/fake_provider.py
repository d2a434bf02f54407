"""An OpenAI-compatible provider that answers well, or goes wrong in each way that providers do."""

from __future__ import annotations

import asyncio
import gzip
import json
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from tandem_router.testing.fake_server import (
    FakeServer,
    Seen,
    begin_stream,
    embedded,
    plain_reply,
    write_chunk,
)

#: Stands in every text of a provider that no client may read.
PROVIDER_TEXT = "provider-internals sk-live-abcd1234"
WORDS = ["The", " answer", " is", " 42", "."]


class Fault(StrEnum):
    """What goes wrong before the first token, except where it says otherwise."""

    NONE = "none"
    HANG = "hang"  # takes the request and says nothing
    HANG_AFTER_HEADERS = "hang-after-headers"  # only comments, for ever
    RESET = "reset"
    STATUS_401 = "401"
    STATUS_402 = "402"
    STATUS_403 = "403"
    STATUS_404 = "404"
    STATUS_408 = "408"
    STATUS_409 = "409"
    STATUS_418 = "418"
    STATUS_429 = "429"
    STATUS_500 = "500"
    STATUS_502 = "502"
    STATUS_503 = "503"
    REDIRECT = "301"
    KEY_AS_400 = "key-as-400"  # a wrong key of ours, told as if the request were wrong
    HTML = "html"
    WRONG_FORM = "wrong-form"  # a whole reply to a stream, a stream to a whole
    ERROR_BODY = "error-body"  # 200 with an error object
    EMPTY_CHOICES = "empty-choices"
    ERROR_BESIDE_CHOICES = "error-beside-choices"
    CUT = "cut"  # a whole reply in its middle, a stream before its first token
    CUT_LATER = "cut-later"  # a stream after its first token
    CUT_IN_TOOL_CALL = "cut-in-tool-call"
    CUT_IN_THOUGHT = "cut-in-thought"
    ERROR_LATER = "error-later"  # an error event after the first token


@dataclass(eq=False)
class FakeProvider(FakeServer):
    """faults: what the next requests meet, one each; `always` once they are used up."""

    faults: list[Fault] = field(default_factory=list)
    always: Fault = Fault.NONE
    say_done: bool = True
    null_error: bool = False  # "error": null in chunks, as some providers send
    with_usage: bool = True
    line_end: bytes = b"\n"  # of streams
    packed: bool = False  # replies come in gzip, which nobody asked for

    def usage(self) -> dict[str, int]:
        return {"prompt_tokens": 5, "completion_tokens": 5, "total_tokens": 10}

    def whole(self, seen: Seen) -> dict[str, Any]:
        text = "".join(WORDS)
        said: dict[str, Any] = {"message": {"role": "assistant", "content": text}}
        if seen.path.endswith("/completions") and "chat" not in seen.path:
            said = {"text": text}
        reply: dict[str, Any] = {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "model": seen.json.get("model"),
            "choices": [{"index": 0, "finish_reason": "stop", **said}],
        }
        return {**reply, "usage": self.usage()} if self.with_usage else reply

    def chunk(self, delta: dict[str, Any] | None, finish: str | None = None, **more: Any) -> bytes:
        choices = (
            [{"index": 0, "delta": delta, "finish_reason": finish}] if delta is not None else []
        )
        payload: dict[str, Any] = {"id": "chatcmpl-1", "choices": choices, **more}
        if self.null_error:
            payload["error"] = None
        return b"data: " + json.dumps(payload).encode() + b"\n\n"

    def events(self) -> list[bytes]:
        events = [self.chunk({"role": "assistant", "content": ""})]
        events += [self.chunk({"content": word}) for word in WORDS]
        events.append(self.chunk({}, "stop"))
        if self.with_usage:
            events.append(self.chunk(None, usage=self.usage()))
        return [*events, b"data: [DONE]\n\n"] if self.say_done else events

    async def answer(self, seen: Seen, writer: asyncio.StreamWriter) -> bool:
        fault = self.faults.pop(0) if self.faults else self.always
        if seen.path.endswith("/embeddings") and fault is Fault.NONE:
            return await plain_reply(writer, 200, {}, json.dumps(embedded(seen.json)).encode())
        stream = bool(seen.json.get("stream")) if seen.body else False
        error = {"message": PROVIDER_TEXT, "type": "server_error", "code": "boom"}
        if fault is Fault.HANG:
            await asyncio.Event().wait()
        if fault is Fault.RESET:
            return False
        if fault.isdigit():
            headers = {"retry-after": "7"} if fault in ("429", "503") else {}
            if fault is Fault.REDIRECT:
                headers = {"location": "https://elsewhere.invalid/"}
            return await plain_reply(
                writer, int(fault), headers, json.dumps({"error": error}).encode()
            )
        if fault is Fault.KEY_AS_400:
            wrong = {"message": f"API key not valid: {PROVIDER_TEXT}", "code": "400"}
            return await plain_reply(writer, 400, {}, json.dumps({"error": wrong}).encode())
        if fault is Fault.HTML:
            page = f"<html>{PROVIDER_TEXT}</html>".encode()
            return await plain_reply(writer, 200, {}, page, "text/html")
        if fault is Fault.WRONG_FORM:
            stream = not stream
        if stream:
            return await self._stream(fault, error, writer)
        reply = self.whole(seen)
        if fault is Fault.ERROR_BODY:
            reply = {"error": error}
        elif fault is Fault.EMPTY_CHOICES:
            reply["choices"] = []
            reply["error"] = error
        elif fault is Fault.ERROR_BESIDE_CHOICES:
            reply["error"] = error
        body = json.dumps(reply).encode()
        if fault in (Fault.CUT, Fault.HANG_AFTER_HEADERS):
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body))
            writer.write(body[: len(body) // 2])
            await writer.drain()
            if fault is Fault.HANG_AFTER_HEADERS:
                await asyncio.Event().wait()
            return False
        if self.packed:
            packed = {"content-encoding": "gzip"}
            return await plain_reply(writer, 200, packed, gzip.compress(body))
        return await plain_reply(writer, 200, {}, body)

    async def _stream(
        self, fault: Fault, error: dict[str, str], writer: asyncio.StreamWriter
    ) -> bool:
        await begin_stream(writer, "gzip" if self.packed else None)
        first, *rest = self.events()
        failure = b"data: " + json.dumps({"error": error, "choices": []}).encode() + b"\n\n"
        if fault is Fault.HANG_AFTER_HEADERS:
            await write_chunk(writer, first)
            while True:
                await write_chunk(writer, b": still here\n\n")
                await asyncio.sleep(0.02)
        if fault is Fault.CUT:
            await write_chunk(writer, first)
            return False
        if fault in (Fault.ERROR_BODY, Fault.ERROR_BESIDE_CHOICES, Fault.EMPTY_CHOICES):
            await write_chunk(writer, failure)
            await write_chunk(writer, b"")
            return True
        later = {
            Fault.CUT_LATER: self.chunk({"content": "The"}),
            Fault.CUT_IN_THOUGHT: self.chunk({"reasoning_content": "Hm"}),
            Fault.CUT_IN_TOOL_CALL: self.chunk(
                {"tool_calls": [{"index": 0, "function": {"name": "f", "arguments": '{"a'}}]}
            ),
            Fault.ERROR_LATER: self.chunk({"content": "The"}) + failure,
        }
        if fault in later:
            await write_chunk(writer, first + later[fault])
            if fault is Fault.ERROR_LATER:
                await write_chunk(writer, b"")
                return True
            return False
        for event in (first, *rest):
            await write_chunk(writer, event.replace(b"\n", self.line_end))
        await write_chunk(writer, b"")
        return True
