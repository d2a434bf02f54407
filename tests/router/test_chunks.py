"""Chunks that need no parser go on as they came; all else is read as before."""

from __future__ import annotations

import httptools
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem_router.proxy.chunks import payload_of

events = st.lists(st.sampled_from([b"data: a", b"\n\n", b"\n", b"\r", b"\r\n", b"x"]), max_size=6)
lines = st.sampled_from([b"%x", b"%X", b"0%x", b"%x;a=b", b"+%x", b"0x%x", b" %x", b"%x_"])


class Body:
    """What a parser makes of a chunked body: its parts, and how many chunks are whole."""

    def __init__(self, data: bytes) -> None:
        self.read, self.num_begun, self.num_whole, self.ended = b"", 0, 0, False
        parser = httptools.HttpResponseParser(self)
        parser.feed_data(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        parser.feed_data(data)

    def on_chunk_header(self) -> None:
        self.num_begun += 1

    def on_chunk_complete(self) -> None:
        self.num_whole += 1

    def on_body(self, part: bytes) -> None:
        self.read += part

    def on_message_complete(self) -> None:
        self.ended = True


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.tuples(lines, events.map(b"".join)), min_size=1, max_size=3),
    st.integers(0, 40),
    st.sampled_from([0, 0, 0, 1]),
)
def test_what_is_taken_is_what_the_parser_reads(
    parts: list[tuple[bytes, bytes]], cut: int, wrong: int
) -> None:
    data = b"".join(line % (len(part) + wrong) + b"\r\n" + part + b"\r\n" for line, part in parts)
    data = data[: len(data) - cut] if cut < 4 else data

    payload = payload_of(data)

    if payload is not None:
        body = Body(data)
        assert body.read == payload
        assert body.num_begun == body.num_whole
        assert not body.ended
        assert payload.endswith(b"\n\n")
        assert payload.find(b"\r") < 0


def test_whole_chunks_of_whole_events_are_taken() -> None:
    one, two = b"9\r\ndata: a\n\n\r\n", b"C\r\ndata: abcd\n\n\r\n"

    assert payload_of(one) == b"data: a\n\n"
    assert payload_of(two + one + two) == b"data: abcd\n\ndata: a\n\ndata: abcd\n\n"
    assert payload_of(one + b"0\r\n\r\n") is None
    assert payload_of(one[:-1]) is None
    assert payload_of(b"") is None
