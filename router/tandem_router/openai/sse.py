"""Server-sent events of a completion: cut at event boundaries, read, written.

A client must never see half an event, because the other half may come from another worker.
`EventSplitter` releases complete events only. Pure.
"""

from __future__ import annotations

import json
from typing import Any

import msgspec

from tandem_router.errors import UpstreamError

DONE = b"data: [DONE]\n\n"
MAX_EVENT_BYTES = 8 * 2**20


class EventSplitter:
    """Releases the longest prefix of complete events; keeps the rest for the next bytes.

    Lines may end in LF, CRLF or CR, as the standard allows; what is released ends them in LF.
    """

    def __init__(self) -> None:
        self._tail = b""
        self._after_cr = False  # an LF that comes now belongs to the line end before it

    @property
    def is_between(self) -> bool:
        """Whether what comes next begins an event."""
        return not self._tail and not self._after_cr

    def feed(self, data: bytes) -> bytes:
        """Complete events so far. Raises UpstreamError when one event exceeds 8 MiB."""
        if self._after_cr or data.find(b"\r") >= 0:  # `in` costs more
            data = self._with_lf(data)
        if self._tail:
            data = self._tail + data
        end = data.rfind(b"\n\n") + 2
        if end == 1:
            end = 0
        if end == len(data):
            self._tail = b""
            return data
        self._tail = data[end:]
        if len(self._tail) > MAX_EVENT_BYTES:
            raise UpstreamError(f"one event is larger than {MAX_EVENT_BYTES} bytes")
        return data[:end]

    def _with_lf(self, data: bytes) -> bytes:
        if self._after_cr and data:
            data = data.removeprefix(b"\n")
            self._after_cr = False
        if data:
            self._after_cr = data.endswith(b"\r")
        return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")


def split_events(data: bytes) -> list[bytes]:
    """Complete events, each with its blank line; joined they are the input again.

    Lines end in LF, as `EventSplitter` releases them.
    """
    parts = data.split(b"\n\n")
    events = [part + b"\n\n" for part in parts[:-1]]
    if parts[-1]:
        events.append(parts[-1])
    return events


def event_data(event: bytes) -> bytes:
    """The payload of an event: its data lines joined; b"" for a comment."""
    if event.startswith(b"data: ") and event.find(b"\n") == len(event) - 2 and event[-1] == 10:
        data = event[6:-2]
        if data.find(b"\r") < 0:
            return data  # one line, as in most
    lines = []
    for line in event.splitlines():
        if line.startswith(b"data:"):
            lines.append(line[5:].removeprefix(b" "))
    return b"\n".join(lines)


def decode_json(text: bytes) -> Any:
    """JSON as servers write it; halves of surrogate pairs, NaN and huge numbers are let be.

    Raises ValueError, RecursionError.
    """
    try:
        return msgspec.json.decode(text)
    except msgspec.MsgspecError:
        return json.loads(text)


def encode_json(payload: Any) -> bytes:
    """JSON in UTF-8; escaped where a server sent half a surrogate pair, which has no bytes."""
    try:
        return json.dumps(payload, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        return json.dumps(payload, separators=(",", ":")).encode()


def encode_event(payload: dict[str, Any]) -> bytes:
    return b"data: " + encode_json(payload) + b"\n\n"
