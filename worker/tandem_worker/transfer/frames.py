"""The bytes on a KV connection: what each frame says, how it is written, and what it proves.

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

Pure. How they are read is in `frame_reader.py`.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum

from tandem_worker.transfer.interface import (
    MAX_SAMPLER_STATE_BYTES,
    MAX_TOP_LOGPROBS,
    FinalState,
)
from tandem_worker.transfer.layout import DTYPE_CODES, DTypeName, KVLayout

MAGIC = b"TNKV"
VERSION = 2
HEADER = struct.Struct("<4sBBHIQII")
HEADER_BYTES = HEADER.size
FLAG_DATA_CRC = 1

MAX_STRING_BYTES = 1024
MAX_BLOCKS_PER_FRAME = 4096
NONCE_BYTES = 16
MAC_BYTES = 32

LAYOUT_META = struct.Struct("<HHHHB3x32s")
# push, layer, kv heads, block size, head dim, dtype, count
BLOCKS_META = struct.Struct("<IHHHHBxxxI")
# push, token, tokens, has logprob, top count, logprob, state
FINISH_META = struct.Struct("<IIIBxHdI")
TOP_META = struct.Struct("<Id")


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
MAX_META_BYTES = {
    Kind.CHALLENGE: 2 + NONCE_BYTES,
    Kind.HELLO: NONCE_BYTES + MAC_BYTES + LAYOUT_META.size + _STRING_META,
    Kind.WELCOME: MAC_BYTES + LAYOUT_META.size,
    Kind.OPEN: 4 + 8 + 1 + _STRING_META,
    Kind.OPENED: 4 + 8 + 8,
    Kind.BLOCKS: BLOCKS_META.size + 4 * MAX_BLOCKS_PER_FRAME,
    Kind.CREDIT: 4 + 8,
    Kind.FINISH: FINISH_META.size + MAX_TOP_LOGPROBS * TOP_META.size + MAX_SAMPLER_STATE_BYTES,
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
    return LAYOUT_META.pack(
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
            head = BLOCKS_META.pack(
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
            head = FINISH_META.pack(
                frame.push,
                state.first_token,
                state.num_tokens,
                state.logprob is not None,
                len(state.top_logprobs),
                0.0 if state.logprob is None else state.logprob,
                len(state.sampler_state),
            )
            tops = b"".join(TOP_META.pack(token, value) for token, value in state.top_logprobs)
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
