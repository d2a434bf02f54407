"""What can go wrong while KV blocks travel from a prefill worker to a decode worker.

Every error says which request, peer or frame it is about, the value it saw, the rule and what to
do next. `code` is the number that stands for the error in an ERROR frame, so that the far side
raises the same class.
"""

from __future__ import annotations

from tandem_worker.errors import WorkerError


class TransferError(WorkerError):
    """Base of everything this package raises; catch it to fall back to a local prefill."""

    code = 1


class ProtocolError(TransferError):
    """The peer sent bytes that the protocol does not allow; the connection is closed."""

    code = 2


class AuthenticationError(TransferError):
    """The peer could not prove that it knows the peer token."""

    code = 3


class LayoutMismatchError(TransferError):
    """The two workers hold differently shaped KV caches."""

    code = 4


class UnknownReservationError(TransferError):
    """No reservation of that request is open for writing."""

    code = 5


class StaleEpochError(TransferError):
    """The epoch is not the one that the reservation was made for."""

    code = 6


class ReservationBusyError(TransferError):
    """Another writer holds the reservation."""

    code = 7


class BlockConflictError(TransferError):
    """A block is held by another reservation, or lies outside the pool or the reservation."""

    code = 8


class ReservationAbortedError(TransferError):
    """The owner, the deadline or a newer epoch ended the reservation before it was complete."""

    code = 9


class IncompleteError(TransferError):
    """The writer finished although blocks were missing."""

    code = 10


class ChecksumError(TransferError):
    """The bytes that arrived are not the bytes that were sent."""

    code = 11


class CreditError(TransferError):
    """The writer sent more bytes than it was granted."""

    code = 12


class WriterGoneError(TransferError):
    """The connection of the writer ended before the push was complete."""

    code = 13


class PeerUnreachableError(TransferError):
    """No connection, or no progress on one, within the time allowed."""

    code = 14


class ClosedError(TransferError):
    """The receiver, sender or push was used after it was closed."""

    code = 15


def _all_codes() -> dict[int, type[TransferError]]:
    classes: list[type[TransferError]] = [TransferError, *TransferError.__subclasses__()]
    return {cls.code: cls for cls in classes}


def error_from_wire(code: int, message: str) -> TransferError:
    """The exception that an ERROR or ABORT frame stands for; unknown codes become the base."""
    return _all_codes().get(code, TransferError)(printable(message))


def printable(text: str) -> str:
    """What a peer sent, fit for one line of a log."""
    return "".join(char if char.isprintable() else "?" for char in text)
