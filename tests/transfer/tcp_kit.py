"""A peer of the tcp transport that says exactly what a test wants."""

from __future__ import annotations

import asyncio
import os
from typing import ClassVar

from tandem_worker.transfer.frame_reader import decode_header, decode_meta
from tandem_worker.transfer.frames import (
    HEADER_BYTES,
    Blocks,
    Challenge,
    Credit,
    Frame,
    Hello,
    Open,
    Opened,
    Welcome,
    encode,
    sender_mac,
)
from tandem_worker.transfer.tcp_receiver import TcpReceiver
from tandem_worker.transfer.tcp_sender import TcpSender
from tandem_worker.transfer.wire import parse_address
from transfer_kit import FINAL, LAYOUT, soon

TOKEN = b"secret"
UNIT = LAYOUT.unit_bytes


class RawPeer:
    """A peer that says exactly what a test wants; a test's end closes those it opened."""

    connected: ClassVar[list[RawPeer]] = []

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        RawPeer.connected.append(self)
        self.reader = reader
        self.writer = writer

    @classmethod
    async def connect(cls, address: str) -> RawPeer:
        return cls(*await asyncio.open_connection(*parse_address(address)))

    async def read(self) -> Frame:
        async with asyncio.timeout(5):
            header = decode_header(await self.reader.readexactly(HEADER_BYTES))
            return decode_meta(header, await self.reader.readexactly(header.meta_length))

    async def send(self, frame: Frame, data: bytes = b"", crc: int | None = None) -> None:
        self.writer.write(encode(frame, len(data), crc) + data)
        await self.writer.drain()

    async def greet(self, token: bytes = TOKEN) -> None:
        challenge = await self.read()
        assert isinstance(challenge, Challenge)
        nonce = os.urandom(16)
        mac = sender_mac(token, challenge.nonce, nonce, LAYOUT, "raw")
        await self.send(Hello(nonce, mac, LAYOUT, "raw"))
        assert isinstance(await self.read(), Welcome)

    async def opened(self, request_id: str, epoch: int = 1, push: int = 1) -> Opened:
        await self.send(Open(push, request_id, epoch))
        answer = await self.read()
        assert isinstance(answer, Opened)
        return answer

    async def credit(self, num_bytes: int) -> None:
        """Wait until that much has been granted again."""
        while num_bytes > 0:
            frame = await self.read()
            assert isinstance(frame, Credit)
            num_bytes -= frame.num_bytes

    async def ends(self) -> bool:
        async with asyncio.timeout(5):
            try:
                while await self.reader.read(65536):
                    pass
            except ConnectionResetError:
                pass
            return True

    def close(self) -> None:
        self.writer.close()


def blocks(layer: int, block_ids: tuple[int, ...], push: int = 1) -> Blocks:
    return Blocks(
        push,
        layer,
        LAYOUT.num_kv_heads,
        LAYOUT.block_size,
        LAYOUT.head_dim,
        LAYOUT.dtype,
        block_ids,
    )


async def push_works(receiver: TcpReceiver, sender: TcpSender, request_id: str = "ok") -> None:
    """The receiver still serves a well-behaved writer, into block 15."""
    reservation = receiver.reserve(request_id, 1, [15], soon())
    push = await sender.open(receiver.address, request_id, 1)
    for layer in range(LAYOUT.num_layers):
        await push.layer_blocks(layer, [3], [15])
    await push.finish(FINAL)
    assert await reservation.completed() == FINAL
    for layer in range(LAYOUT.num_layers):
        assert receiver.pool.get_bytes(layer, [15]) == sender.pool.get_bytes(layer, [3])
