"""The bytes on a KV connection: how each frame is written, and what is checked when one is read.

A frame is a 28-byte header, `meta_length` bytes of fields and `data_length` bytes of KV data, all
little endian:

    offset size field
         0    4 magic "TNKV"
         4    1 version (2)
         5    1 kind
         6    2 flags: bit 0 = data_crc32 is set
         8    4 meta_length, bounded per kind
        12    8 data_length, 0 except in BLOCKS
        20    4 data_crc32, 0 without the flag
        24    4 crc32 of bytes 0..23 and of meta
        28      meta, then data

Pure: nothing here reads a socket or allocates by a number that the peer sent. `decode_header`
bounds what is read next; `decode_meta` checks every length, code and range and names what is wrong.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum

from tandem_worker.transfer.errors import ChecksumError, ProtocolError
from tandem_worker.transfer.interface import (
    MAX_SAMPLER_STATE_BYTES,
    MAX_TOP_LOGPROBS,
    FinalState,
)
from tandem_worker.transfer.layout import DTYPE_CODES, DTYPE_NAMES, DTypeName, KVLayout

MAGIC = b"TNKV"
VERSION = 2
HEADER = struct.Struct("<4sBBHIQII")
HEADER_BYTES = HEADER.size
FLAG_DATA_CRC = 1

MAX_STRING_BYTES = 1024
MAX_BLOCKS_PER_FRAME = 4096
NONCE_BYTES = 16
MAC_BYTES = 32

_LAYOUT = struct.Struct("<HHHHB3x32s")
_BLOCKS = struct.Struct("<IHHHHBxxxI")  # push, layer, kv heads, block size, head dim, dtype, count
_FINISH = struct.Struct("<IIIBxHdI")  # push, token, tokens, has logprob, top count, logprob, state
_TOP = struct.Struct("<Id")


class Kind(IntEnum):
    """The frames, in the order in which a connection sees them. r = receiver, s = sender."""

    CHALLENGE = 1  # r -> s
    HELLO = 2  # s -> r
    WELCOME = 3  # r -> s
    OPEN = 4  # s -> r
    OPENED = 5  # r -> s
    BLOCKS = 6  # s -> r
    CREDIT = 7  # r -> s
    FINISH = 8  # s -> r
    FINISHED = 9  # r -> s
    ABORT = 10  # both
    STOPPED = 11  # s -> r
    ERROR = 12  # both


@dataclass(frozen=True)
class Challenge:
    """The first frame: which versions the receiver speaks, and its nonce."""

    min_version: int
    max_version: int
    nonce: bytes


@dataclass(frozen=True)
class Hello:
    """The sender's proof that it knows the peer token, its KV layout and its name."""

    nonce: bytes
    mac: bytes
    layout: KVLayout
    name: str


@dataclass(frozen=True)
class Welcome:
    """The receiver's proof and its KV layout; frames may flow now."""

    mac: bytes
    layout: KVLayout


@dataclass(frozen=True)
class Open:
    """Take the reservation of a request and epoch; `push` numbers the pushes of a connection."""

    push: int
    request_id: str
    epoch: int
    probe: bool = False


@dataclass(frozen=True)
class Opened:
    """The reservation is the sender's: how many bytes it may send, and how many in one frame."""

    push: int
    credit_bytes: int
    max_frame_bytes: int


@dataclass(frozen=True)
class Blocks:
    """K of all the blocks, then V of all the blocks of one layer follow as data."""

    push: int
    layer: int
    num_kv_heads: int
    block_size: int
    head_dim: int
    dtype: DTypeName
    block_ids: tuple[int, ...]


@dataclass(frozen=True)
class Credit:
    """That many more bytes may be sent."""

    push: int
    num_bytes: int


@dataclass(frozen=True)
class Finish:
    """Everything has been sent."""

    push: int
    state: FinalState


@dataclass(frozen=True)
class Finished:
    """Everything has arrived. `crc32` is that of the scratch block after a probe, else None."""

    push: int
    crc32: int | None = None


@dataclass(frozen=True)
class Abort:
    """The reservation is lost (from the receiver), or the push was given up (from the sender)."""

    push: int
    code: int
    message: str


@dataclass(frozen=True)
class Stopped:
    """The sender's answer to ABORT: no byte of this push follows."""

    push: int


@dataclass(frozen=True)
class Error:
    """Why the connection is closed."""

    code: int
    message: str


Frame = (
    Challenge
    | Hello
    | Welcome
    | Open
    | Opened
    | Blocks
    | Credit
    | Finish
    | Finished
    | Abort
    | Stopped
    | Error
)


@dataclass(frozen=True)
class Header:
    """A checked header: `meta_length` and `data_length` are within the bounds of the kind."""

    kind: Kind
    meta_length: int
    data_length: int
    data_crc32: int | None
    raw: bytes


_STRING_META = 2 + MAX_STRING_BYTES
_MAX_META = {
    Kind.CHALLENGE: 2 + NONCE_BYTES,
    Kind.HELLO: NONCE_BYTES + MAC_BYTES + _LAYOUT.size + _STRING_META,
    Kind.WELCOME: MAC_BYTES + _LAYOUT.size,
    Kind.OPEN: 4 + 8 + 1 + _STRING_META,
    Kind.OPENED: 4 + 8 + 8,
    Kind.BLOCKS: _BLOCKS.size + 4 * MAX_BLOCKS_PER_FRAME,
    Kind.CREDIT: 4 + 8,
    Kind.FINISH: _FINISH.size + MAX_TOP_LOGPROBS * _TOP.size + MAX_SAMPLER_STATE_BYTES,
    Kind.FINISHED: 4 + 1 + 4,
    Kind.ABORT: 4 + 2 + _STRING_META,
    Kind.STOPPED: 4,
    Kind.ERROR: 2 + _STRING_META,
}


def _string(text: str) -> bytes:
    raw = text.encode()
    if len(raw) > MAX_STRING_BYTES:
        # cut at a character: error texts may be long, ids are checked by the caller
        raw = raw[:MAX_STRING_BYTES].decode(errors="ignore").encode()
    return struct.pack("<H", len(raw)) + raw


def _layout(layout: KVLayout) -> bytes:
    return _LAYOUT.pack(
        layout.num_layers,
        layout.num_kv_heads,
        layout.block_size,
        layout.head_dim,
        DTYPE_CODES[layout.dtype],
        bytes.fromhex(layout.weights),
    )


def _meta(frame: Frame) -> tuple[Kind, bytes]:
    match frame:
        case Challenge():
            return Kind.CHALLENGE, bytes([frame.min_version, frame.max_version]) + frame.nonce
        case Hello():
            return Kind.HELLO, (
                frame.nonce + frame.mac + _layout(frame.layout) + _string(frame.name)
            )
        case Welcome():
            return Kind.WELCOME, frame.mac + _layout(frame.layout)
        case Open():
            head = struct.pack("<IQB", frame.push, frame.epoch, int(frame.probe))
            return Kind.OPEN, head + _string(frame.request_id)
        case Opened():
            return Kind.OPENED, struct.pack(
                "<IQQ", frame.push, frame.credit_bytes, frame.max_frame_bytes
            )
        case Blocks():
            head = _BLOCKS.pack(
                frame.push,
                frame.layer,
                frame.num_kv_heads,
                frame.block_size,
                frame.head_dim,
                DTYPE_CODES[frame.dtype],
                len(frame.block_ids),
            )
            return Kind.BLOCKS, head + struct.pack(f"<{len(frame.block_ids)}I", *frame.block_ids)
        case Credit():
            return Kind.CREDIT, struct.pack("<IQ", frame.push, frame.num_bytes)
        case Finish():
            state = frame.state
            head = _FINISH.pack(
                frame.push,
                state.first_token,
                state.num_tokens,
                state.logprob is not None,
                len(state.top_logprobs),
                0.0 if state.logprob is None else state.logprob,
                len(state.sampler_state),
            )
            tops = b"".join(_TOP.pack(token, value) for token, value in state.top_logprobs)
            return Kind.FINISH, head + tops + state.sampler_state
        case Finished():
            return Kind.FINISHED, struct.pack(
                "<IBI", frame.push, frame.crc32 is not None, frame.crc32 or 0
            )
        case Abort():
            return Kind.ABORT, struct.pack("<IH", frame.push, frame.code) + _string(frame.message)
        case Stopped():
            return Kind.STOPPED, struct.pack("<I", frame.push)
        case Error():
            return Kind.ERROR, struct.pack("<H", frame.code) + _string(frame.message)


def encode(frame: Frame, data_length: int = 0, data_crc32: int | None = None) -> bytes:
    """Header and meta of a frame; the caller sends the data (if any) right behind it."""
    kind, meta = _meta(frame)
    head = HEADER.pack(
        MAGIC,
        VERSION,
        kind,
        FLAG_DATA_CRC if data_crc32 is not None else 0,
        len(meta),
        data_length,
        data_crc32 or 0,
        0,
    )
    crc = zlib.crc32(meta, zlib.crc32(head[:24]))
    return head[:24] + struct.pack("<I", crc) + meta


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
    if meta_length > _MAX_META[kind]:
        raise ProtocolError(
            f"{kind.name} frame announces {meta_length} bytes of fields; at most {_MAX_META[kind]}"
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
        num_layers, num_kv_heads, block_size, head_dim, dtype, raw = self.struct(_LAYOUT)
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
    push, layer, num_kv_heads, block_size, head_dim, dtype, count = reader.struct(_BLOCKS)
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
    push, token, num_tokens, has_logprob, num_top, logprob, state_length = reader.struct(_FINISH)
    if num_top > MAX_TOP_LOGPROBS:
        raise ProtocolError(f"FINISH frame has {num_top} top_logprobs; at most {MAX_TOP_LOGPROBS}")
    tops = tuple(reader.struct(_TOP) for _ in range(num_top))
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


# The tokens as they are now: the first one is proved, all are accepted.
Tokens = Callable[[], Sequence[bytes]]


def tokens_of(token: Tokens | bytes | None) -> Tokens:
    """One token that never changes, or those that are given; an empty one where there is none."""
    return token if callable(token) else lambda: (token or b"",)


def sender_mac(token: bytes, challenge: bytes, nonce: bytes, layout: KVLayout, name: str) -> bytes:
    """What a HELLO proves: HMAC-SHA256 over both nonces, the layout and the name."""
    message = b"tandem-kv-2 sender" + challenge + nonce + _layout(layout) + _string(name)
    return hmac.new(token, message, hashlib.sha256).digest()


def receiver_mac(token: bytes, challenge: bytes, nonce: bytes, layout: KVLayout) -> bytes:
    """What a WELCOME proves."""
    message = b"tandem-kv-2 receiver" + nonce + challenge + _layout(layout)
    return hmac.new(token, message, hashlib.sha256).digest()
