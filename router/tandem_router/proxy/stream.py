"""One client's stream out of the streams of the workers that it takes.

Only complete events are forwarded, and what a worker repeats after it has taken over is dropped.
Nothing is forwarded before the first token: until then another tier may answer instead. Usage
chunks are read on the way: the router accounts by them and adds what the client could not know
when the headers went out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from tandem_router.config import TierConfig
from tandem_router.engines import Resumption, Wire, engine_of
from tandem_router.engines.protocol import PlainWire
from tandem_router.errors import UpstreamError
from tandem_router.http.eager import Landing
from tandem_router.http.exchange import Exchange
from tandem_router.http.response import Response
from tandem_router.openai.asgi import Send
from tandem_router.openai.request import InferenceRequest
from tandem_router.openai.sse import (
    EventSplitter,
    decode_json,
    encode_event,
    event_data,
    split_events,
)
from tandem_router.proxy.chunks import passing_on, says_something
from tandem_router.proxy.faults import Fault, FaultKind, of_error, of_transport
from tandem_router.proxy.resume import StreamJournal

# The first piece of an answer: text, thought, refusal, a tool's name or arguments, or its end.
FIRST_TOKEN = re.compile(
    rb'"token_ids":\s*\[\s*\d'
    rb'|"(?:content|text|reasoning_content|reasoning|refusal|arguments|data)":\s*"(?!")'
    rb'|"(?:tool_calls|function_call)":\s*[\[{]\s*[^\]}\s]|"finish_reason":\s*"'
)
_SAYS_SOMETHING = re.compile(rb'"(?:usage|error)"\s*:\s*(?!null\b)')
_ABOUT_REQUEST = frozenset({"invalid_request_error"})


class StreamEnded(Exception):
    """The worker says that the request is at fault: its event ends the client's stream."""

    def __init__(self, event: bytes) -> None:
        super().__init__("error event")
        self.event = event


class Relay:
    """Forwards the events of one request, one worker's reply after the other.

    max_kept_bytes: bound of the journal. tier: the one now asked; a provider's words are not passed
    on, and a worker's are read as its engine writes them. told: what the usage chunk adds for the
    client; called with `usage` set.
    """

    def __init__(
        self,
        request: InferenceRequest,
        max_kept_bytes: int,
        send: Send,
        tier: Callable[[], TierConfig],
        told: Callable[[], Mapping[str, Any]],
    ) -> None:
        self._request = request
        self._max_kept_bytes = max_kept_bytes
        self._send = send
        self._exchange = Exchange.of(send)
        self._tier = tier
        self._told = told
        self.forget()

    def forget(self) -> None:
        """Begin anew: nothing has reached the client."""
        self.journal = StreamJournal(self._max_kept_bytes)
        self.usage: Mapping[str, Any] | None = None
        self._splitter = EventSplitter()
        self._held: list[bytes] = []
        # An error event is raised once what came before it has been passed on.
        self._ending: Fault | StreamEnded | None = None
        self._begun = False
        self._done = False
        self._wire: Wire = engine_of(self._tier().engine).wire(self._request)

    async def begin(self, response: Response) -> None:
        """Read until the first token; `flush` then sends what was read.

        Raises Fault when the reply ends or fails before, RequestRefused for the request's own.
        """
        self._wire = engine_of(self._tier().engine).wire(self._request)
        while not self._begun and not self._done:
            try:
                events = await self._next(response)
            except StreamEnded as ended:
                error = json.loads(event_data(ended.event)).get("error")
                raise of_error(error, self._tier().kind == "external") from ended
            if events:
                self._held.append(events)
                self._begun = FIRST_TOKEN.search(events) is not None
        if not self._begun:
            raise Fault(FaultKind.BAD_ANSWER, "the stream ended without an answer", status=200)

    def passed(self, data: bytes) -> bytes:
        """What the client gets of the next bytes of a reply that somebody else carries to it.

        b"" for data is the reply's end. [DONE] is not among what is returned; `done` says that it
        is due. Raises Fault, StreamEnded.
        """
        if self._ending is not None:
            ending, self._ending = self._ending, None
            raise ending
        events = self._read(data, None)
        if events and not self._begun:
            self._begun = FIRST_TOKEN.search(events) is not None
        events = self._kept(events)
        return self._wire.shown(events) if events else b""

    @property
    def begun(self) -> bool:
        """Whether the first token has been seen."""
        return self._begun

    @property
    def done(self) -> bool:
        return self._done

    async def flush(self) -> None:
        """Send what came before and with the first token."""
        events = self._kept(b"".join(self._held))
        self._held = []
        if events:
            body = self._wire.shown(events)
            await self._send({"type": "http.response.body", "body": body, "more_body": True})

    async def forward(self, response: Response) -> bytes:
        """Forward events until the end of the answer; its last ones are the caller's to send.

        [DONE] is not among them. Raises Fault when the reply ends before, StreamEnded on an error
        about the request.
        """
        if self._done:
            return b""
        if self._exchange is not None:
            return await self._pour(response, self._exchange)
        while True:
            events = self._kept(await self._next(response))
            if self._done:
                return self._wire.shown(events) if events else b""
            if events:
                body = self._wire.shown(events)
                await self._send({"type": "http.response.body", "body": body, "more_body": True})

    async def _pour(self, response: Response, exchange: Exchange) -> bytes:
        """As `forward`, from one connection to the other without a turn of this task."""
        last = Landing[bytes]()

        splitter, journal = self._splitter, self.journal
        as_they_are = isinstance(self._wire, PlainWire) and not journal.resumed
        as_they_are = as_they_are and exchange.relays_chunks

        def failed(error: Exception) -> None:
            response.pour(None)
            last.fail(error)

        pass_on = passing_on(exchange.connection, journal, failed)

        def take(data: bytes) -> None:
            try:
                events = self._kept(self._read(data, response.error))
                if events:
                    events = self._wire.shown(events)
                if self._done:
                    response.pour(None)
                    last.land(events)
                    return
                if events:
                    exchange.write(events, True)
                if self._ending is not None:
                    ending, self._ending = self._ending, None
                    raise ending
                if as_they_are:  # while what comes next begins an event
                    response.offer(pass_on if splitter.is_between else None)
            except Exception as error:
                failed(error)

        if self._ending is not None:
            ending, self._ending = self._ending, None
            raise ending
        exchange.on_congested, exchange.on_drained = response.pause, response.resume
        try:
            if as_they_are and splitter.is_between:
                response.offer(pass_on)
            response.pour(take)
            if exchange.connection.writing_paused:
                response.pause()
            return await last.landed()
        finally:
            response.pour(None)
            exchange.on_congested = exchange.on_drained = None

    def take_over(self) -> None:
        """Another worker's reply comes next."""
        self._splitter = EventSplitter()
        self._ending = None

    def resumption(self, max_tokens: int | None) -> Resumption:
        """How another worker goes on from here; max_tokens: what ceilings leave of the answer.

        Raises UpstreamError where none can.
        """
        sent = self.journal.sent(self._request.num_choices)
        resumption = self._wire.resume(sent, max_tokens)
        self.journal.resume(resumption.repeats)
        return resumption

    def _kept(self, events: bytes) -> bytes:
        """What of the events is new to the client, remembered as sent."""
        if events and self.journal.resumed:
            events = self.journal.without_repeats(events)
        if events:
            self.journal.forwarded(events)
        return events

    async def _next(self, response: Response) -> bytes:
        """Complete events, b"" where there is none yet; sets `_done` at the end of the answer."""
        if self._ending is not None:
            ending, self._ending = self._ending, None
            raise ending
        try:
            data = await response.read_some()
        except UpstreamError as error:
            return self._read(b"", error)
        return self._read(data, None)

    def _read(self, data: bytes, error: UpstreamError | None) -> bytes:
        """The complete events after `data`; b"" for data is the end, which `error` broke."""
        if not data and error is not None:
            return self._ended(of_transport(error))
        try:
            events = self._wire.read(self._splitter.feed(data))
        except UpstreamError as broken:
            return self._ended(of_transport(broken))
        if not data:
            return self._ended(Fault(FaultKind.BROKEN, "the stream ended before its answer did"))
        if says_something(events):
            return self._look_at(events)
        if not self._begun and events and not _are_json(events):
            raise Fault(FaultKind.BAD_ANSWER, "the stream holds no chunks", status=200)
        return events

    def _ended(self, fault: Fault) -> bytes:
        """An answer that has ended is whole, [DONE] or not: some providers never say it."""
        if not self.journal.all_finished(self._request.num_choices):
            raise fault
        self._done = True
        return b""

    def _look_at(self, events: bytes) -> bytes:
        """Events to forward; sets usage, `_done`, and `_ending` for an error. Raises Fault."""
        if b"[DONE]" not in events and not _SAYS_SOMETHING.search(events):
            return events  # `"usage": null`, as some providers write into every chunk
        kept: list[bytes] = []
        for event in split_events(events):
            payload = event_data(event)
            if payload == b"[DONE]":
                self._done = True
                break
            if b'"usage"' in payload or b'"error"' in payload:
                try:
                    chunk = decode_json(payload)
                except ValueError as error:
                    raise Fault(FaultKind.BAD_ANSWER, "a chunk is not JSON", status=200) from error
                if isinstance(chunk, dict) and chunk.get("error"):
                    self._ending = _error_event(chunk["error"], event)
                    break
                if isinstance(chunk, dict) and isinstance(chunk.get("usage"), dict):
                    self.usage = chunk["usage"]
                    if not chunk.get("choices"):
                        if self._request.include_usage:
                            kept.append(encode_event({**chunk, "tandem": self._told()}))
                        continue
            kept.append(event)
        return b"".join(kept)


def _error_event(error: Any, event: bytes) -> Fault | StreamEnded:
    """An error about the request would come again; one about the server need not."""
    kind = error.get("type") if isinstance(error, dict) else None
    if kind in _ABOUT_REQUEST:
        return StreamEnded(event)
    return Fault(FaultKind.SERVER_ERROR, "ended its stream with an error event", status=200)


def _are_json(events: bytes) -> bool:
    """Whether every event is a comment or carries an object; only asked before the first token."""
    for event in split_events(events):
        payload = event_data(event)
        if payload and not payload.lstrip().startswith(b"{"):
            return False
    return True
