"""Frames: what is written can be read, and nothing else can."""

from __future__ import annotations

import math
import struct
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem_worker.transfer.errors import (
    ChecksumError,
    LayoutMismatchError,
    ProtocolError,
    TransferError,
)
from tandem_worker.transfer.frame_reader import decode_header, decode_meta
from tandem_worker.transfer.frames import (
    HEADER_BYTES,
    Abort,
    Blocks,
    Challenge,
    Credit,
    Error,
    Finish,
    Finished,
    Frame,
    Hello,
    Kind,
    Open,
    Opened,
    Stopped,
    Welcome,
    encode,
)
from tandem_worker.transfer.interface import FinalState
from tandem_worker.transfer.layout import DTYPE_CODES, KVLayout

u16 = st.integers(1, 0xFFFF)
u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
layouts = st.builds(KVLayout, u16, u16, u16, u16, st.sampled_from(sorted(DTYPE_CODES)))
floats = st.floats(allow_nan=False)
finals = st.builds(
    FinalState,
    u32,
    u32,
    st.none() | floats,
    st.lists(st.tuples(u32, floats), max_size=5).map(tuple),
    st.binary(max_size=50),
)
texts = st.text(max_size=60)
frames = st.one_of(
    st.builds(
        Challenge, st.integers(0, 255), st.integers(0, 255), st.binary(min_size=16, max_size=16)
    ),
    st.builds(
        Hello,
        st.binary(min_size=16, max_size=16),
        st.binary(min_size=32, max_size=32),
        layouts,
        texts,
    ),
    st.builds(Welcome, st.binary(min_size=32, max_size=32), layouts),
    st.builds(Open, u32, texts, u64, st.booleans()),
    st.builds(Opened, u32, u64, u64),
    st.builds(
        Blocks,
        u32,
        u16,
        u16,
        u16,
        u16,
        st.sampled_from(sorted(DTYPE_CODES)),
        st.lists(u32, min_size=1, max_size=9).map(tuple),
    ),
    st.builds(Credit, u32, u64),
    st.builds(Finish, u32, finals),
    st.builds(Finished, u32, st.none() | u32),
    st.builds(Abort, u32, st.integers(0, 0xFFFF), texts),
    st.builds(Stopped, u32),
    st.builds(Error, st.integers(0, 0xFFFF), texts),
)


def data_length(frame: Frame) -> int:
    if not isinstance(frame, Blocks):
        return 0
    layout = KVLayout(1, frame.num_kv_heads, frame.block_size, frame.head_dim, frame.dtype)
    return len(frame.block_ids) * layout.unit_bytes


def write(frame: Frame) -> bytes:
    return encode(frame, data_length(frame))


def read(raw: bytes) -> Frame:
    header = decode_header(raw[:HEADER_BYTES])
    return decode_meta(header, raw[HEADER_BYTES : HEADER_BYTES + header.meta_length])


def with_crc(raw: bytearray) -> bytes:
    """A forged frame whose checksum is right, as a hostile peer would send it."""
    crc = zlib.crc32(raw[HEADER_BYTES:], zlib.crc32(raw[:24]))
    raw[24:28] = struct.pack("<I", crc)
    return bytes(raw)


@settings(max_examples=300, deadline=None)
@given(frames)
def test_every_frame_reads_as_it_was_written(frame: Frame) -> None:
    assert read(write(frame)) == frame


@settings(max_examples=300, deadline=None)
@given(frames, st.data())
def test_a_changed_byte_never_reads_as_a_valid_frame(frame: Frame, data: st.DataObject) -> None:
    raw = bytearray(write(frame))
    position = data.draw(st.integers(0, len(raw) - 1))
    raw[position] ^= data.draw(st.integers(1, 255))

    with pytest.raises(TransferError):
        read(bytes(raw))


@settings(max_examples=200, deadline=None)
@given(frames, st.data())
def test_a_truncated_frame_is_refused(frame: Frame, data: st.DataObject) -> None:
    raw = write(frame)

    with pytest.raises(TransferError):
        read(raw[: data.draw(st.integers(0, len(raw) - 1))])


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(list(Kind)), st.binary(max_size=120), st.integers(0, 2**64 - 1))
def test_hostile_fields_with_a_right_checksum_never_crash(
    kind: Kind, meta: bytes, length: int
) -> None:
    head = struct.pack("<4sBBHIQII", b"TNKV", 1, kind, 0, len(meta), length, 0, 0)
    raw = with_crc(bytearray(head + meta))

    try:
        frame = read(raw)
    except TransferError:
        return
    assert read(write(frame)) == frame


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=64))
def test_noise_never_crashes(noise: bytes) -> None:
    with pytest.raises(ProtocolError):
        read(noise)


STOPPED = Stopped(1)


def forged(offset: int, value: bytes, frame: Frame = STOPPED) -> bytes:
    raw = bytearray(write(frame))
    raw[offset : offset + len(value)] = value
    return with_crc(raw)


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n.." + b" " * 40, r"b'GET '.*tandem KV port"),
        (forged(4, b"\x03"), "version 3, this worker 2"),
        (forged(5, b"\x63"), "kind 99"),
        (forged(6, b"\x02"), "flags 0x0002 in STOPPED"),
        (
            forged(8, struct.pack("<I", 1 << 30)),
            "STOPPED frame announces 1073741824 bytes of fields",
        ),
        (
            forged(12, struct.pack("<Q", 1 << 60)),
            "STOPPED frame announces 1152921504606846976 bytes",
        ),
    ],
)
def test_a_wrong_header_is_refused_before_anything_is_read_and_named(raw: bytes, text: str) -> None:
    with pytest.raises(ProtocolError, match=text):
        decode_header(raw[:HEADER_BYTES])


BLOCKS = Blocks(1, 0, 2, 64, 4, "float32", (5, 6))


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (forged(12, struct.pack("<Q", 1), BLOCKS), "carries 1 bytes for 2 blocks .* expected 8192"),
        (forged(HEADER_BYTES + 16, b"\xff\xff\xff\xff", BLOCKS), "names 4294967295 blocks"),
        (forged(HEADER_BYTES + 16, b"\x00\x00\x00\x00", BLOCKS), "names 0 blocks"),
        (forged(HEADER_BYTES + 16, b"\x03\x00\x00\x00", BLOCKS), "32 are needed"),
        (forged(HEADER_BYTES + 16, b"\x01\x00\x00\x00", BLOCKS), "4096"),
        (forged(HEADER_BYTES + 12, b"\x09", BLOCKS), "dtype code 9"),
        (forged(HEADER_BYTES + 6, b"\x00\x00", BLOCKS), "no part may be 0"),
        (forged(HEADER_BYTES + 12, b"\x02", Open(1, "r", 2)), "probe=2"),
        (forged(HEADER_BYTES + 13, b"\xff\xff", Open(1, "r", 2)), "request_id of 65535 bytes"),
        (forged(HEADER_BYTES + 15, b"\xff", Open(1, "r", 2)), "not UTF-8"),
        (
            forged(HEADER_BYTES + 14, b"\xff\xff", Finish(1, FinalState(1, 2))),
            "65535 top_logprobs",
        ),
        (
            forged(HEADER_BYTES + 16, struct.pack("<d", math.nan), Finish(1, FinalState(1, 2))),
            "not a number",
        ),
        (
            forged(HEADER_BYTES + 24, b"\xff\xff\xff\xff", Finish(1, FinalState(1, 2))),
            "are needed",
        ),
        (
            forged(
                HEADER_BYTES + 32, b"\x00\x00", Welcome(bytes(32), KVLayout(1, 1, 64, 8, "float16"))
            ),
            "num_layers=0",
        ),
    ],
)
def test_wrong_fields_are_refused_and_named(raw: bytes, text: str) -> None:
    with pytest.raises(ProtocolError, match=text):
        read(raw)


def test_a_damaged_header_is_told_from_a_wrong_one() -> None:
    raw = bytearray(write(Stopped(1)))
    raw[-1] ^= 1

    with pytest.raises(ChecksumError, match="STOPPED frame header"):
        read(bytes(raw))


def test_a_long_error_text_is_cut_and_stays_readable() -> None:
    frame = read(write(Error(2, "ä" * 3000)))

    assert isinstance(frame, Error)
    assert frame.message == "ä" * 512


@pytest.mark.parametrize("values", [(-1, 0), (2**32, 0), (0, -1)])
def test_a_final_state_that_does_not_fit_the_wire_is_refused_when_it_is_made(
    values: tuple[int, int],
) -> None:
    with pytest.raises(ProtocolError, match="outside"):
        FinalState(*values)


def test_a_layout_that_does_not_fit_the_wire_is_refused_when_it_is_made() -> None:
    with pytest.raises(LayoutMismatchError, match="head_dim=65536"):
        KVLayout(1, 1, 64, 65536, "float32")
