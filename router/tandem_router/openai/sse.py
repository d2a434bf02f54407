"""Server-sent events of a completion: cut at event boundaries, read, written.

A client must never see half an event, because the other half may come from another worker.
`EventSplitter` releases complete events only. Pure.
"""

from __future__ import annotations

import json
from typing import Any

from tandem_router.errors import UpstreamError

DONE = b"data: [DONE]\n\n"
MAX_EVENT_BYTES = 8 * 2**20


class EventSplitter:
    """Releases the longest prefix of complete events; keeps the rest for the next bytes."""

    def __init__(self) -> None:
        self._tail = b""

    def feed(self, data: bytes) -> bytes:
        """Complete events so far. Raises UpstreamError when one event exceeds 8 MiB."""
        if self._tail:
            data = self._tail + data
        end = data.rfind(b"\n\n") + 2
        if end == 1:
            end = 0
        if b"\r" in data:
            end = max(end, data.rfind(b"\r\n\r\n") + 4 if b"\r\n\r\n" in data else 0)
        if end == len(data):
            self._tail = b""
            return data
        self._tail = data[end:]
        if len(self._tail) > MAX_EVENT_BYTES:
            raise UpstreamError(f"one event is larger than {MAX_EVENT_BYTES} bytes")
        return data[:end]


def split_events(data: bytes) -> list[bytes]:
    """Complete events, each with its blank line; joined they are the input again."""
    if b"\r\n\r\n" in data:
        events = []
        start = 0
        while start < len(data):
            ends = [
                at + size
                for at, size in ((data.find(b"\n\n", start), 2), (data.find(b"\r\n\r\n", start), 4))
                if at >= 0
            ]
            end = min(ends) if ends else len(data)
            events.append(data[start:end])
            start = end
        return events
    parts = data.split(b"\n\n")
    events = [part + b"\n\n" for part in parts[:-1]]
    if parts[-1]:
        events.append(parts[-1])
    return events


def event_data(event: bytes) -> bytes:
    """The payload of an event: its data lines joined; b"" for a comment."""
    lines = []
    for line in event.splitlines():
        if line.startswith(b"data:"):
            lines.append(line[5:].removeprefix(b" "))
    return b"\n".join(lines)


def encode_json(payload: Any) -> bytes:
    """JSON in UTF-8; escaped where a server sent half a surrogate pair, which has no bytes."""
    try:
        return json.dumps(payload, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        return json.dumps(payload, separators=(",", ":")).encode()


def encode_event(payload: dict[str, Any]) -> bytes:
    return b"data: " + encode_json(payload) + b"\n\n"
