"""Moves KV blocks from the worker that computed them into the blocks another worker reserved.

The wire format is described, with golden vectors, in `docs/contract.md`; thread and memory rules
in `interface.py`.
"""

from __future__ import annotations

from tandem_worker.transfer.errors import TransferError
from tandem_worker.transfer.frames import Tokens
from tandem_worker.transfer.interface import (
    FinalState,
    KVReceiver,
    KVSender,
    Push,
    Reservation,
    ReservationState,
    TransferStats,
)
from tandem_worker.transfer.kv_memory import KVPool
from tandem_worker.transfer.layout import KVLayout
from tandem_worker.transfer.link_check import LinkReport, kv_link_check

DEFAULT_MAX_INFLIGHT_BYTES = 64 << 20

__all__ = [
    "DEFAULT_MAX_INFLIGHT_BYTES",
    "FinalState",
    "KVLayout",
    "KVPool",
    "KVReceiver",
    "KVSender",
    "LinkReport",
    "Push",
    "Reservation",
    "ReservationState",
    "TransferError",
    "TransferStats",
    "create_receiver",
    "create_sender",
    "kv_link_check",
]


def create_receiver(
    pool: KVPool,
    *,
    token: Tokens | bytes | None = None,
    max_inflight_bytes: int = DEFAULT_MAX_INFLIGHT_BYTES,
) -> KVReceiver:
    """A receiver for the blocks of `pool`; `token` is the shared peer token."""
    from tandem_worker.transfer.tcp_receiver import TcpReceiver

    return TcpReceiver(pool, token=token, max_inflight_bytes=max_inflight_bytes)


def create_sender(
    pool: KVPool,
    *,
    token: Tokens | bytes | None = None,
    checksum: bool = False,
    name: str = "",
) -> KVSender:
    """A sender of the blocks of `pool`; `name` is how the far side's errors call this worker."""
    from tandem_worker.transfer.tcp_sender import TcpSender

    return TcpSender(pool, token=token, checksum=checksum, name=name)
