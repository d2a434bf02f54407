"""One client's stream out of the streams of the workers that it takes.

Only complete events are forwarded, and what a worker repeats after it has taken over is dropped.
Usage chunks are read on the way: the router accounts by them and adds what the client could not
know when the headers went out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from tandem_router.asgi import Send
from tandem_router.errors import UpstreamError
from tandem_router.http.connection_pool import Response
from tandem_router.openai.request import InferenceRequest
from tandem_router.openai.sse import (
    EventSplitter,
    encode_event,
    event_data,
    split_events,
)
from tandem_router.proxy.resume import StreamJournal

FIRST_TOKEN = re.compile(rb'"token_ids":\s*\[\s*\d|"(?:content|text)":\s*"(?!")')


class StreamError(Exception):
    """The worker ended its stream with an error event."""

    def __init__(self, event: bytes, retriable: bool) -> None:
        super().__init__("error event")
        self.event = event
        self.retriable = retriable


class Relay:
    """Forwards the events of one request, one worker's reply after the other.

    max_kept_bytes: bound of the journal. first_token: called once, when the first token passes.
    told: what the usage chunk adds for the client; called with `usage` set.
    """

    def __init__(
        self,
        request: InferenceRequest,
        max_kept_bytes: int,
        send: Send,
        first_token: Callable[[], None],
        told: Callable[[], Mapping[str, Any]],
    ) -> None:
        self._request = request
        self._send = send
        self._first_token = first_token
        self._told = told
        self._begun = False
        self.journal = StreamJournal(max_kept_bytes)
        self.usage: Mapping[str, Any] | None = None

    async def forward(self, response: Response) -> None:
        """Forward events until [DONE]; it is left for the caller to send.

        Raises UpstreamError when the worker's reply ends before, StreamError on an error event.
        """
        splitter = EventSplitter()
        while True:
            data = await response.read_some()
            if not data:
                raise UpstreamError("the stream ended before [DONE]")
            events = splitter.feed(data)
            if not events:
                continue
            done = False
            failure: StreamError | None = None
            if b'"usage"' in events or b"[DONE]" in events or b'"error"' in events:
                events, done, failure = self._look_at(events)
            if self.journal.resumed and events:
                events = self.journal.without_repeats(events)
            if events:
                if not self._begun and FIRST_TOKEN.search(events):
                    self._begun = True
                    self._first_token()
                self.journal.forwarded(events)
                await self._send({"type": "http.response.body", "body": events, "more_body": True})
            if failure is not None:
                raise failure
            if done:
                return

    def resume_body(self) -> bytes:
        """The request plus what was generated so far. Raises UpstreamError if it is not known."""
        token_ids = self.journal.resume_token_ids(self._request.num_choices)
        if token_ids is None:
            return self._request.body
        fields = {**self._request.fields, "tandem": {"resume_token_ids": token_ids}}
        return json.dumps(fields, ensure_ascii=False).encode()

    def _look_at(self, events: bytes) -> tuple[bytes, bool, StreamError | None]:
        """(events to forward, whether the stream is done, the error that ended it)."""
        kept: list[bytes] = []
        for event in split_events(events):
            payload = event_data(event)
            if payload == b"[DONE]":
                return b"".join(kept), True, None
            if b'"usage"' in payload or b'"error"' in payload:
                try:
                    chunk = json.loads(payload)
                except ValueError as error:
                    raise UpstreamError(f"a chunk is not JSON: {error}") from error
                if isinstance(chunk, dict) and "error" in chunk and "choices" not in chunk:
                    return b"".join(kept), False, StreamError(event, _is_retriable(chunk))
                if isinstance(chunk, dict) and isinstance(chunk.get("usage"), dict):
                    self.usage = chunk["usage"]
                    if not chunk.get("choices"):
                        if self._request.include_usage:
                            kept.append(encode_event({**chunk, "tandem": self._told()}))
                        continue
            kept.append(event)
        return b"".join(kept), False, None


def _is_retriable(chunk: Mapping[str, Any]) -> bool:
    """An error about the request would come again; one about the server need not."""
    error = chunk.get("error")
    kind = error.get("type") if isinstance(error, dict) else None
    return kind not in ("invalid_request_error", "authentication_error", "not_found_error")
