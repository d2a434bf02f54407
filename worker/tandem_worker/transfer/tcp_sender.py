"""Pushes KV blocks over TCP, straight from the cache."""

from __future__ import annotations

import asyncio
import hmac
import os
import socket
from typing import TypeVar

from tandem_worker.transfer.errors import (
    AuthenticationError,
    ClosedError,
    PeerUnreachableError,
    ProtocolError,
    error_from_wire,
)
from tandem_worker.transfer.frames import (
    NONCE_BYTES,
    VERSION,
    Challenge,
    Error,
    Frame,
    Hello,
    Tokens,
    Welcome,
    receiver_mac,
    sender_mac,
    tokens_of,
)
from tandem_worker.transfer.interface import FinalState
from tandem_worker.transfer.kv_memory import KVPool
from tandem_worker.transfer.layout import KVLayout
from tandem_worker.transfer.tcp_push import Link, LinkSettings, TcpPush
from tandem_worker.transfer.wire import Wire, parse_address, read_frame, tune

# an idle connection saves a handshake per request; more than this per peer are not kept
_MAX_IDLE = 8

_F = TypeVar("_F", bound=Frame)


class TcpSender:
    """A `KVSender`.

    `checksum` adds a crc32 to every frame of KV data. `connect_s` bounds connecting and the
    handshake, `stall_s` every wait inside a frame, `patience_s` the wait for credit or for the ack
    (a live receiver ends a push at the reservation's deadline itself).
    """

    def __init__(
        self,
        pool: KVPool,
        *,
        token: Tokens | bytes | None = None,
        checksum: bool = False,
        name: str = "",
        connect_s: float = 3.0,
        stall_s: float = 15.0,
        patience_s: float = 120.0,
        abort_grace_s: float = 1.0,
    ) -> None:
        self.pool = pool
        self._settings = LinkSettings(checksum, patience_s, abort_grace_s)
        self._tokens = tokens_of(token)
        self._name = name
        self._connect_s = connect_s
        self._stall_s = stall_s
        self.idle: dict[str, list[Link]] = {}
        self.links: set[Link] = set()
        self._closed = False

    async def open(self, address: str, request_id: str, epoch: int) -> TcpPush:
        """Take a reservation; see `KVSender.open`."""
        return await self._open(address, request_id, epoch, self.pool, probe=False)

    async def probe(self, address: str, data: bytes) -> int:
        """Push one test block into the far scratch block; see `KVSender.probe`."""
        layout = self.pool.layout
        one_layer = KVLayout(
            1, layout.num_kv_heads, layout.block_size, layout.head_dim, layout.dtype
        )
        pool = KVPool.allocate(one_layer, 1)
        pool.put_bytes(0, [0], data)
        push = await self._open(address, "link-check", 0, pool, probe=True)
        try:
            await push.layer_blocks(0, [0], [0])
            await push.finish(FinalState(first_token=0, num_tokens=layout.block_size))
        finally:
            await push.aclose()
        if push.crc32 is None:
            raise ProtocolError(f"{address} acknowledged the test block without a checksum")
        return push.crc32

    async def aclose(self) -> None:
        """Abort every push and close every connection."""
        self._closed = True
        for link in list(self.links):
            await link.aclose()
        self.idle.clear()

    async def _open(
        self, address: str, request_id: str, epoch: int, pool: KVPool, *, probe: bool
    ) -> TcpPush:
        if not 0 <= epoch < 2**64:
            raise ProtocolError(f"epoch={epoch} is outside 0..2**64-1")
        while idle := self.idle.get(address):
            link = idle.pop()
            if link.wire.closed:
                continue
            try:
                return await link.open(request_id, epoch, pool, probe)
            except PeerUnreachableError:
                break  # it went away while it was idle
        link = await self._dial(address)
        return await link.open(request_id, epoch, pool, probe)

    async def _dial(self, address: str) -> Link:
        if self._closed:
            raise ClosedError(f"cannot push KV blocks to {address}: the KV sender is closed")
        host, port = parse_address(address)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        wire: Wire | None = None
        try:
            tune(sock)
            async with asyncio.timeout(self._connect_s):
                await asyncio.get_running_loop().sock_connect(sock, (host, port))
                wire = Wire(sock, self._stall_s)
                await self._handshake(wire, address)
        except TimeoutError as error:
            _close(sock, wire)
            raise PeerUnreachableError(
                f"KV receiver {address} did not answer within {self._connect_s:g} s; is the decode "
                "worker up and its KV port reachable?"
            ) from error
        except OSError as error:
            _close(sock, wire)
            raise PeerUnreachableError(
                f"cannot reach KV receiver {address}: {error.strerror or error}"
            ) from error
        except BaseException:
            _close(sock, wire)
            raise
        if self._closed:
            wire.close()
            raise ClosedError(f"cannot push KV blocks to {address}: the KV sender is closed")
        link = Link(wire, address, self._settings, on_idle=self._keep_idle, on_end=self._forget)
        self.links.add(link)
        return link

    async def _handshake(self, wire: Wire, address: str) -> None:
        challenge = await self._expect(wire, Challenge, address)
        if not challenge.min_version <= VERSION <= challenge.max_version:
            raise ProtocolError(
                f"KV receiver {address} speaks protocol versions {challenge.min_version} to "
                f"{challenge.max_version}, this worker {VERSION}; run workers of one release"
            )
        nonce = os.urandom(NONCE_BYTES)
        layout = self.pool.layout
        token = self._tokens()[0]
        mac = sender_mac(token, challenge.nonce, nonce, layout, self._name)
        await wire.send(Hello(nonce, mac, layout, self._name))
        welcome = await self._expect(wire, Welcome, address)
        expected = receiver_mac(token, challenge.nonce, nonce, welcome.layout)
        if not hmac.compare_digest(expected, welcome.mac):
            raise AuthenticationError(
                f"KV receiver {address} did not prove the peer token; start both workers with the "
                "same --peer-token-file"
            )
        layout.require_equal(welcome.layout, f"KV receiver {address}")

    async def _expect(self, wire: Wire, kind: type[_F], address: str) -> _F:
        frame = await read_frame(wire)
        if isinstance(frame, Error):
            raise error_from_wire(frame.code, f"KV receiver {address} refused: {frame.message}")
        if not isinstance(frame, kind):
            raise ProtocolError(
                f"KV receiver {address} sent {type(frame).__name__.upper()} instead of "
                f"{kind.__name__.upper()}"
            )
        return frame

    def _keep_idle(self, link: Link) -> None:
        """A push is over and its connection is clean: keep it for the next one."""
        if self._closed or link.wire.closed or len(self.idle.get(link.address, ())) >= _MAX_IDLE:
            link.close()
        else:
            self.idle.setdefault(link.address, []).append(link)

    def _forget(self, link: Link) -> None:
        """A connection ended."""
        self.links.discard(link)
        idle = self.idle.get(link.address, [])
        if link in idle:
            idle.remove(link)
        if not idle:
            self.idle.pop(link.address, None)


def _close(sock: socket.socket, wire: Wire | None) -> None:
    if wire is not None:
        wire.close()
    else:
        sock.close()
