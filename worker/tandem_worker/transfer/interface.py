"""What the engine and the server see of a KV transfer, whichever transport carries it.

The decode worker owns a `KVReceiver`: it reserves blocks, hands their ids to a prefill worker and
awaits `Reservation.completed()`. The prefill worker owns a `KVSender`: it opens a `Push`, hands
over each (chunk, layer) as soon as that layer is computed and ends with `finish`.

Thread rules. Everything belongs to the event loop it was started in, with these exceptions, which
any thread may call: `Push.layer_blocks_nowait`, `Push.abort`, `Push.failure`, `Reservation.abort`,
`Reservation.state`. Callbacks run in the event loop's thread.

Memory rules. The blocks named in a push must stay allocated and unchanged until `finish` or
`aclose` has returned (a block still being filled may be pushed again: the last push wins). The
blocks of a reservation belong to the transfer until `completed()` returns, or, after a failure or
an abort, until `released()` returns: an aborted block is quarantined until its writer has
confirmed that it stopped or is gone, because a write may land late.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from tandem_worker.transfer.errors import ProtocolError, TransferError

MAX_SAMPLER_STATE_BYTES = 65536
MAX_TOP_LOGPROBS = 256


@dataclass(frozen=True)
class FinalState:
    """What the prefill worker knows when the last layer is done; the last frame of a push.

    `num_tokens`: prompt tokens whose KV the decode worker now holds (with its own prefix hit).
    `first_token`: sampled at position `num_tokens`. `logprob` and `top_logprobs` (token, logprob)
    are natural logarithms, absent unless the request asked for them. `sampler_state` is opaque
    to the transfer (at most 64 KiB).
    """

    first_token: int
    num_tokens: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    sampler_state: bytes = b""

    def __post_init__(self) -> None:
        if not 0 <= self.first_token < 2**32:
            raise ProtocolError(f"first_token={self.first_token} is outside 0..2**32-1")
        if not 0 <= self.num_tokens < 2**32:
            raise ProtocolError(f"num_tokens={self.num_tokens} is outside 0..2**32-1")
        if len(self.top_logprobs) > MAX_TOP_LOGPROBS:
            raise ProtocolError(
                f"{len(self.top_logprobs)} top_logprobs; at most {MAX_TOP_LOGPROBS} travel"
            )
        if len(self.sampler_state) > MAX_SAMPLER_STATE_BYTES:
            raise ProtocolError(
                f"sampler_state of {len(self.sampler_state)} bytes; at most "
                f"{MAX_SAMPLER_STATE_BYTES} travel"
            )


class ReservationState(Enum):
    """Where a reservation is in its life; see `reservations.py` for the moves."""

    WAITING = "waiting"  # reserved, no writer yet
    WRITING = "writing"  # a writer is attached
    COMPLETE = "complete"  # every (layer, block) and the final state are here
    QUARANTINED = "quarantined"  # failed or aborted, its writer may still write
    RELEASED = "released"  # failed or aborted, the blocks may be used again


@dataclass(frozen=True)
class TransferStats:
    """Counters of one receiver, for metrics and tests. Bytes are KV bytes, without headers."""

    num_reserved: int
    num_quarantined: int
    num_completed: int
    num_failed: int
    num_refused_connections: int
    bytes_received: int


class Reservation(Protocol):
    """Blocks of this worker that one writer may fill."""

    request_id: str
    epoch: int
    block_ids: tuple[int, ...]

    @property
    def state(self) -> ReservationState:
        """Where the reservation is in its life."""
        ...

    async def completed(self) -> FinalState:
        """Wait until every (layer, block) has arrived; the blocks are then the caller's.

        Raises a `TransferError` when the writer failed, the deadline passed or the reservation was
        aborted. Cancelling the wait does not abort.
        """
        ...

    def abort(self, reason: str = "aborted by its owner") -> None:
        """Give the reservation up; does nothing once it is complete or aborted already."""
        ...

    async def released(self) -> None:
        """Wait until the blocks of a failed or aborted reservation may be used again.

        Returns at once for a complete reservation (its blocks are the caller's).
        """
        ...


class KVReceiver(Protocol):
    """The side of a transfer that owns the target blocks (a decode worker)."""

    @property
    def address(self) -> str:
        """Where a sender reaches this receiver, `IP:PORT` for tcp; known after `start`."""
        ...

    async def start(self, host: str, port: int) -> None:
        """Listen. Port 0 takes a free one."""
        ...

    def reserve(
        self,
        request_id: str,
        epoch: int,
        block_ids: Sequence[int],
        deadline: float,
        *,
        on_released: Callable[[tuple[int, ...]], None] | None = None,
    ) -> Reservation:
        """Open `block_ids` to the one writer that names this request and epoch.

        `deadline` is a `time.monotonic()` value (or the injected clock's). `on_released` is called
        once with the block ids when a failed or aborted reservation is released, never for a
        complete one. A higher epoch of the same request aborts the older reservation.

        Raises `StaleEpochError` for an epoch that is not higher than that of the live one,
        `BlockConflictError` for blocks that another reservation holds, that repeat or that lie
        outside the pool, `ClosedError` after `aclose`.
        """
        ...

    def stats(self) -> TransferStats:
        """Counters since `start`."""
        ...

    async def aclose(self) -> None:
        """Abort every reservation, close every connection, release every block."""
        ...


class Push(Protocol):
    """One request's way from this worker's blocks into a reservation of another worker."""

    request_id: str
    epoch: int

    @property
    def failure(self) -> TransferError | None:
        """Why the push failed, or None; look at it between chunks to stop computing early."""
        ...

    async def layer_blocks(
        self, layer: int, local_block_ids: Sequence[int], remote_block_ids: Sequence[int]
    ) -> None:
        """Send one layer's K and V of some blocks; returns when the transport has the bytes."""
        ...

    def layer_blocks_nowait(
        self, layer: int, local_block_ids: Sequence[int], remote_block_ids: Sequence[int]
    ) -> None:
        """As `layer_blocks`, from any thread, without waiting; `finish` raises what failed."""
        ...

    async def finish(self, state: FinalState) -> None:
        """Send the final state after everything handed over so far and wait for the ack."""
        ...

    def abort(self, reason: str = "aborted by the writer") -> None:
        """Stop pushing, from any thread; the far reservation fails. Does nothing when finished."""
        ...

    async def aclose(self) -> None:
        """Wait until the transport no longer reads the local blocks; aborts if not finished."""
        ...


class KVSender(Protocol):
    """The side of a transfer that computed the blocks (a prefill worker)."""

    async def open(self, address: str, request_id: str, epoch: int) -> Push:
        """Connect to a receiver and take the reservation of this request and epoch.

        Raises `PeerUnreachableError`, `AuthenticationError`, `LayoutMismatchError`,
        `UnknownReservationError`, `StaleEpochError` or `ReservationBusyError`.
        """
        ...

    async def probe(self, address: str, data: bytes) -> int:
        """Push one test block (`unit_bytes` long) into the receiver's scratch block.

        Returns the crc32 of what the receiver then reads from its scratch memory.
        """
        ...

    async def aclose(self) -> None:
        """Abort every push and close every connection."""
        ...
