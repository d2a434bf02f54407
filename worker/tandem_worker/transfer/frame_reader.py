"""What is checked when a frame of a KV connection is read; `frames.py` says how it is written.

Pure: nothing here reads a socket or allocates by a number that the peer sent. `decode_header`
bounds what is read next; `decode_meta` checks every length, code and range and names what is wrong.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Callable

from tandem_worker.transfer.errors import ChecksumError, ProtocolError
from tandem_worker.transfer.frames import (
    BLOCKS_META,
    FINISH_META,
    FLAG_DATA_CRC,
    HEADER,
    HEADER_BYTES,
    LAYOUT_META,
    MAC_BYTES,
    MAGIC,
    MAX_BLOCKS_PER_FRAME,
    MAX_META_BYTES,
    MAX_STRING_BYTES,
    NONCE_BYTES,
    TOP_META,
    VERSION,
    Abort,
    Blocks,
    Challenge,
    Credit,
    Error,
    Finish,
    Finished,
    Frame,
    Header,
    Hello,
    Kind,
    Open,
    Opened,
    Stopped,
    Welcome,
)
from tandem_worker.transfer.interface import MAX_TOP_LOGPROBS, FinalState
from tandem_worker.transfer.layout import DTYPE_NAMES, DTypeName, KVLayout


def decode_header(raw: bytes) -> Header:
    """Check the 28 bytes that start a frame.

    Raises `ProtocolError` for a wrong magic, version, kind, flag or length. The lengths of the
    result are safe to read; the header's crc32 is checked by `decode_meta`.
    """
    if len(raw) != HEADER_BYTES:
        raise ProtocolError(f"frame header of {len(raw)} bytes; it has {HEADER_BYTES}")
    magic, version, kind_code, flags, meta_length, data_length, data_crc, _ = HEADER.unpack(raw)
    if magic != MAGIC:
        raise ProtocolError(
            f"frame starts with {magic!r} instead of {MAGIC!r}; is this port a tandem KV port?"
        )
    if version != VERSION:
        raise ProtocolError(
            f"peer speaks KV protocol version {version}, this worker {VERSION}; run prefill and "
            "decode workers of one release"
        )
    if kind_code not in Kind._value2member_map_:
        raise ProtocolError(f"unknown frame kind {kind_code}; known are 1..{max(Kind).value}")
    kind = Kind(kind_code)
    if flags & ~FLAG_DATA_CRC:
        raise ProtocolError(f"unknown flags {flags:#06x} in {kind.name} frame; only bit 0 is known")
    if meta_length > MAX_META_BYTES[kind]:
        raise ProtocolError(
            f"{kind.name} frame announces {meta_length} bytes of fields; at most "
            f"{MAX_META_BYTES[kind]}"
        )
    if kind is not Kind.BLOCKS and (data_length or flags):
        raise ProtocolError(f"{kind.name} frame announces {data_length} bytes of data; it has none")
    return Header(kind, meta_length, data_length, data_crc if flags else None, raw)


class _Reader:
    """Takes fields off a meta; every shortage or rest is a `ProtocolError`."""

    def __init__(self, kind: Kind, meta: bytes) -> None:
        self._kind = kind
        self._meta = meta
        self._at = 0

    def take(self, num_bytes: int) -> bytes:
        if self._at + num_bytes > len(self._meta):
            raise ProtocolError(
                f"{self._kind.name} frame ends after {len(self._meta)} bytes of fields; "
                f"{self._at + num_bytes} are needed"
            )
        part = self._meta[self._at : self._at + num_bytes]
        self._at += num_bytes
        return part

    def struct(self, spec: str | struct.Struct) -> tuple:
        compiled = struct.Struct(spec) if isinstance(spec, str) else spec
        return compiled.unpack(self.take(compiled.size))

    def string(self, what: str) -> str:
        (length,) = self.struct("<H")
        if length > MAX_STRING_BYTES:
            raise ProtocolError(f"{what} of {length} bytes; at most {MAX_STRING_BYTES}")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError as error:
            raise ProtocolError(f"{what} in {self._kind.name} frame is not UTF-8") from error

    def flag(self, value: int, what: str) -> bool:
        if value not in (0, 1):
            raise ProtocolError(f"{what}={value} in {self._kind.name} frame; it is 0 or 1")
        return bool(value)

    def layout(self) -> KVLayout:
        num_layers, num_kv_heads, block_size, head_dim, dtype, raw = self.struct(LAYOUT_META)
        for name, value in (
            ("num_layers", num_layers),
            ("num_kv_heads", num_kv_heads),
            ("block_size", block_size),
            ("head_dim", head_dim),
        ):
            if value == 0:
                raise ProtocolError(f"KV {name}=0 in {self._kind.name} frame")
        weights = raw.hex() if any(raw) else ""
        return KVLayout(num_layers, num_kv_heads, block_size, head_dim, _dtype(dtype), weights)

    def end(self) -> None:
        if self._at != len(self._meta):
            raise ProtocolError(
                f"{self._kind.name} frame has {len(self._meta) - self._at} bytes too many"
            )


def _dtype(code: int) -> DTypeName:
    if code not in DTYPE_NAMES:
        raise ProtocolError(f"unknown KV dtype code {code}; known are {sorted(DTYPE_NAMES)}")
    return DTYPE_NAMES[code]


def _read_challenge(reader: _Reader, _: Header) -> Frame:
    min_version, max_version = reader.take(2)
    return Challenge(min_version, max_version, reader.take(NONCE_BYTES))


def _read_hello(reader: _Reader, _: Header) -> Frame:
    nonce, mac = reader.take(NONCE_BYTES), reader.take(MAC_BYTES)
    return Hello(nonce, mac, reader.layout(), reader.string("name"))


def _read_welcome(reader: _Reader, _: Header) -> Frame:
    return Welcome(reader.take(MAC_BYTES), reader.layout())


def _read_open(reader: _Reader, _: Header) -> Frame:
    push, epoch, probe = reader.struct("<IQB")
    return Open(push, reader.string("request_id"), epoch, reader.flag(probe, "probe"))


def _read_opened(reader: _Reader, _: Header) -> Frame:
    return Opened(*reader.struct("<IQQ"))


def _read_blocks(reader: _Reader, header: Header) -> Frame:
    push, layer, num_kv_heads, block_size, head_dim, dtype, count = reader.struct(BLOCKS_META)
    if not 1 <= count <= MAX_BLOCKS_PER_FRAME:
        raise ProtocolError(
            f"BLOCKS frame names {count} blocks; between 1 and {MAX_BLOCKS_PER_FRAME} are allowed"
        )
    block_ids = reader.struct(f"<{count}I")
    frame = Blocks(push, layer, num_kv_heads, block_size, head_dim, _dtype(dtype), block_ids)
    if 0 in (num_kv_heads, block_size, head_dim):
        raise ProtocolError(
            f"BLOCKS frame has shape ({num_kv_heads}, {block_size}, {head_dim}); no part may be 0"
        )
    expected = count * KVLayout(1, num_kv_heads, block_size, head_dim, _dtype(dtype)).unit_bytes
    if header.data_length != expected:
        raise ProtocolError(
            f"BLOCKS frame carries {header.data_length} bytes for {count} blocks of shape "
            f"({num_kv_heads}, {block_size}, {head_dim}) {frame.dtype}; expected {expected}"
        )
    return frame


def _read_credit(reader: _Reader, _: Header) -> Frame:
    return Credit(*reader.struct("<IQ"))


def _read_finish(reader: _Reader, _: Header) -> Frame:
    push, token, num_tokens, has_logprob, num_top, logprob, state_length = reader.struct(
        FINISH_META
    )
    if num_top > MAX_TOP_LOGPROBS:
        raise ProtocolError(f"FINISH frame has {num_top} top_logprobs; at most {MAX_TOP_LOGPROBS}")
    tops = tuple(reader.struct(TOP_META) for _ in range(num_top))
    if any(math.isnan(value) for value in (logprob, *(value for _, value in tops))):
        raise ProtocolError("FINISH frame has a logprob that is not a number")
    present = reader.flag(has_logprob, "has_logprob")
    state = reader.take(state_length)
    return Finish(push, FinalState(token, num_tokens, logprob if present else None, tops, state))


def _read_finished(reader: _Reader, _: Header) -> Frame:
    push, has_crc, crc = reader.struct("<IBI")
    return Finished(push, crc if reader.flag(has_crc, "has_crc") else None)


def _read_abort(reader: _Reader, _: Header) -> Frame:
    push, code = reader.struct("<IH")
    return Abort(push, code, reader.string("message"))


def _read_stopped(reader: _Reader, _: Header) -> Frame:
    return Stopped(*reader.struct("<I"))


def _read_error(reader: _Reader, _: Header) -> Frame:
    (code,) = reader.struct("<H")
    return Error(code, reader.string("message"))


_READERS: dict[Kind, Callable[[_Reader, Header], Frame]] = {
    Kind.CHALLENGE: _read_challenge,
    Kind.HELLO: _read_hello,
    Kind.WELCOME: _read_welcome,
    Kind.OPEN: _read_open,
    Kind.OPENED: _read_opened,
    Kind.BLOCKS: _read_blocks,
    Kind.CREDIT: _read_credit,
    Kind.FINISH: _read_finish,
    Kind.FINISHED: _read_finished,
    Kind.ABORT: _read_abort,
    Kind.STOPPED: _read_stopped,
    Kind.ERROR: _read_error,
}


def decode_meta(header: Header, meta: bytes) -> Frame:
    """Check and read the fields that follow a header.

    Raises `ChecksumError` when header or fields were damaged, `ProtocolError` for anything else.
    """
    expected = int.from_bytes(header.raw[24:28], "little")
    actual = zlib.crc32(meta, zlib.crc32(header.raw[:24]))
    if actual != expected:
        raise ChecksumError(
            f"{header.kind.name} frame header has crc32 {expected:#010x}, its bytes "
            f"{actual:#010x}; the connection damages data"
        )
    reader = _Reader(header.kind, meta)
    frame = _READERS[header.kind](reader, header)
    reader.end()
    return frame
