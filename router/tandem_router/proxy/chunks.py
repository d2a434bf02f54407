"""The events in a stream's chunks as they lie on the wire, where they need no parser.

Most reads of a stream are one chunk, with whole events in it: such bytes can go on as they came,
framing and all. What is anything else is left to the parser.
"""

from __future__ import annotations

from collections.abc import Callable

from tandem_router.http.exchange import ClientConnection
from tandem_router.proxy.resume import StreamJournal

# Lines that begin a chunk: where its content begins and ends, and it itself, if it is the first.
# As many as there are lengths of events.
_PLACES: dict[bytes, tuple[int, int, int]] = {}
MOST_PLACES = 4096
MOST_DIGITS = 8
_HEX = frozenset(b"0123456789abcdefABCDEF")
_NOWHERE = (0, 0, 0)
CR = 13
_END = b"\n\n\r\n"


def payload_of(data: bytes) -> bytes | None:
    """What is in `data`, whole chunks of whole events that end their lines in LF; else None.

    The last chunk, of no length, and what has extensions or trailers, is none of these.
    """
    line = data[: data.find(b"\r\n", 0, MOST_DIGITS + 2)]
    start, end, after = _PLACES.get(line) or _places(line)
    if after == len(data):
        events = data[start:end]
        # An `in` for a number is quick.
        return events if data[-4:] == _END and CR not in events else None
    parts = []
    while after and data[end - 2 : after] == _END and CR not in data[start:end]:
        parts.append(data[start:end])
        if after == len(data):
            return b"".join(parts)
        line = data[after : data.find(b"\r\n", after, after + MOST_DIGITS + 2)]
        first = after
        start, end, after = _PLACES.get(line) or _places(line)
        if after:
            start, end, after = first + start, first + end, first + after
    return None


def passing_on(
    client: ClientConnection, journal: StreamJournal, failed: Callable[[Exception], None]
) -> Callable[[bytes], bool]:
    """What lets whole chunks of events that nobody has to read or change go on as they came.

    It says whether it has taken what it was given, which is then written to the client and in the
    journal; failed: told why it could not be kept. One call for a chunk, since a stream has many.
    """
    places, most, write = _PLACES, MOST_DIGITS + 2, client.transport.write
    kept, most_kept = journal.kept, journal.max_kept_bytes

    def pass_on(data: bytes) -> bool:
        start, end, after = places.get(data[: data.find(b"\r\n", 0, most)], _NOWHERE)
        if after == len(data) and data.endswith(_END):
            events = data[start:end]
            if CR in events:
                return False
        else:
            several = payload_of(data)
            if several is None:
                return False
            events = several
        if (  # as `says_something`
            events.find(b'"usage"') >= 0
            or events.find(b"[DONE]") >= 0
            or events.find(b'"error"') >= 0
            or client.closing
        ):
            return False
        write(data)
        kept.append(events)
        size = journal.num_kept_bytes = journal.num_kept_bytes + len(events)
        if size > most_kept:
            try:
                journal.condense()
            except Exception as error:
                failed(error)
        return True

    return pass_on


def _places(line: bytes) -> tuple[int, int, int]:
    """(start and end of its content, its end) of a chunk that begins so; zeros where none may."""
    if not 0 < len(line) <= MOST_DIGITS or not _HEX.issuperset(line):
        return _NOWHERE
    length = int(line, 16)
    if length < 2:  # the last chunk, or less than ends an event
        return _NOWHERE
    if len(_PLACES) >= MOST_PLACES:
        _PLACES.clear()
    start = len(line) + 2
    places = _PLACES[line] = (start, start + length, start + length + 2)
    return places


def says_something(events: bytes) -> bool:
    """Whether the router has to read events: they may end the answer, or tell what it used.

    `in` makes and drops an exception for bytes (CPython 3.11 to 3.13), at five times the cost.
    """
    return (
        events.find(b'"usage"') >= 0 or events.find(b"[DONE]") >= 0 or events.find(b'"error"') >= 0
    )
