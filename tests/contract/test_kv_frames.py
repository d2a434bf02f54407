"""The bytes of the KV protocol, as `docs/contract.md` and the vectors beside this file say.

A change here is a change of the protocol: raise its version, because a rolling upgrade mixes
workers of two releases.
"""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import pytest

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
    receiver_mac,
    sender_mac,
)
from tandem_worker.transfer.interface import FinalState
from tandem_worker.transfer.layout import KVLayout

HERE = Path(__file__).parent
VECTORS: dict[str, str] = json.loads((HERE / "vectors" / "kv_frames.json").read_text())
CONTRACT = (HERE.parents[1] / "docs" / "contract.md").read_text()

TOKEN = b"peer-token"
LAYOUT = KVLayout(
    num_layers=8, num_kv_heads=2, block_size=64, head_dim=32, dtype="float32", weights="9f" * 32
)
CHALLENGE = bytes(range(16))
NONCE = bytes(range(16, 32))
DATA = bytes(range(256)) * 128  # one block: K, then V, 2 heads x 64 tokens x 32 x 4 bytes each

FRAMES: dict[str, tuple[Frame, int, int | None]] = {
    "challenge": (Challenge(2, 2, CHALLENGE), 0, None),
    "hello": (
        Hello(NONCE, sender_mac(TOKEN, CHALLENGE, NONCE, LAYOUT, "prefill-0"), LAYOUT, "prefill-0"),
        0,
        None,
    ),
    "welcome": (Welcome(receiver_mac(TOKEN, CHALLENGE, NONCE, LAYOUT), LAYOUT), 0, None),
    "open": (Open(1, "req-7", 3), 0, None),
    "open_probe": (Open(2, "link-check", 0, probe=True), 0, None),
    "opened": (Opened(1, 4194304, 1048576), 0, None),
    "blocks": (Blocks(1, 5, 2, 64, 32, "float32", (17,)), 32768, None),
    "blocks_with_crc": (Blocks(1, 5, 2, 64, 32, "float32", (17,)), 32768, zlib.crc32(DATA)),
    "credit": (Credit(1, 32768), 0, None),
    "finish": (Finish(1, FinalState(first_token=42, num_tokens=130)), 0, None),
    "finish_with_logprobs": (
        Finish(1, FinalState(42, 130, -0.25, ((42, -0.25), (7, -1.5)), b"\x01")),
        0,
        None,
    ),
    "finished": (Finished(1), 0, None),
    "finished_probe": (Finished(2, zlib.crc32(DATA)), 0, None),
    "abort": (Abort(1, 9, "cancelled"), 0, None),
    "stopped": (Stopped(1), 0, None),
    "error": (Error(2, "unknown frame kind 99"), 0, None),
}


def test_there_is_a_vector_for_every_kind_of_frame() -> None:
    kinds = {decode_header(bytes.fromhex(raw)[:HEADER_BYTES]).kind for raw in VECTORS.values()}

    assert kinds == set(Kind)
    assert VECTORS.keys() == FRAMES.keys()


@pytest.mark.parametrize("name", FRAMES)
def test_frames_are_written_as_the_vectors_say(name: str) -> None:
    frame, data_length, crc = FRAMES[name]

    assert encode(frame, data_length, crc).hex() == VECTORS[name]


@pytest.mark.parametrize("name", FRAMES)
def test_vectors_read_as_the_frames_they_stand_for(name: str) -> None:
    raw = bytes.fromhex(VECTORS[name])
    frame, data_length, crc = FRAMES[name]

    header = decode_header(raw[:HEADER_BYTES])

    assert decode_meta(header, raw[HEADER_BYTES:]) == frame
    assert (header.data_length, header.data_crc32) == (data_length, crc)


def test_a_blocks_frame_built_by_hand_from_the_page_is_the_same() -> None:
    meta = struct.pack("<IHHHHB3xI", 1, 5, 2, 64, 32, 1, 1) + struct.pack("<I", 17)
    head = struct.pack("<4sBBHIQI", b"TNKV", 2, 6, 1, len(meta), 32768, zlib.crc32(DATA))
    raw = head + struct.pack("<I", zlib.crc32(head + meta)) + meta

    assert raw.hex() == VECTORS["blocks_with_crc"]


@pytest.mark.parametrize("name", FRAMES)
def test_the_page_shows_the_vectors(name: str) -> None:
    assert VECTORS[name] in CONTRACT
