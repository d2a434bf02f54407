"""Says whether KV blocks really get from this worker to another one: the KVLinkReady condition.

One block of random bytes goes through the same frames, credits and scatter as a real push into a
scratch block of the far worker, which answers with the checksum of what it then reads from memory.
"""

from __future__ import annotations

import os
import time
import zlib
from dataclasses import dataclass

from tandem_worker.transfer.errors import TransferError
from tandem_worker.transfer.interface import KVSender
from tandem_worker.transfer.layout import KVLayout


@dataclass(frozen=True)
class LinkReport:
    """The outcome of one KV link check. `error` is a sentence, or None when `ok`."""

    address: str
    ok: bool
    num_bytes: int
    duration_s: float
    sent_crc32: int
    received_crc32: int | None
    error: str | None


async def kv_link_check(sender: KVSender, address: str, layout: KVLayout) -> LinkReport:
    """Push one test block to `address` and compare checksums; never raises a transfer error.

    `layout` is that of the sender's pool (`pool.layout`).
    """
    data = os.urandom(layout.unit_bytes)
    sent = zlib.crc32(data)
    received: int | None = None
    error: str | None = None
    started = time.perf_counter()
    try:
        received = await sender.probe(address, data)
        if received != sent:
            error = (
                f"the test block reached {address} changed: crc32 {received:#010x} instead of "
                f"{sent:#010x}; look for a faulty network path or mismatched worker versions"
            )
    except TransferError as failure:
        error = str(failure)
    return LinkReport(
        address=address,
        ok=error is None,
        num_bytes=len(data),
        duration_s=time.perf_counter() - started,
        sent_crc32=sent,
        received_crc32=received,
        error=error,
    )
