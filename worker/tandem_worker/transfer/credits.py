"""Bounds the bytes in flight: the receiver lends each push a window, the sender spends it.

Pure. Each open push holds one window, granted again in quarters as its data is consumed (a short
push never waits for credit and costs no CREDIT frame); when all windows are lent, further pushes
wait with nothing until one closes. So the bytes that senders may have under way never exceed
`capacity_bytes`, and an idle push cannot starve a busy one.
"""

from __future__ import annotations

from collections import deque

from tandem_worker.transfer.errors import CreditError


class CreditWindows:
    """The receiver's side.

    `unit_bytes` is the smallest thing that is sent; a window is never smaller. Raises `CreditError`
    when the capacity does not hold one unit.
    """

    def __init__(self, capacity_bytes: int, unit_bytes: int, num_windows: int = 16) -> None:
        if capacity_bytes < unit_bytes:
            raise CreditError(
                f"max_inflight_bytes={capacity_bytes} does not hold one block of one layer "
                f"({unit_bytes} bytes); raise it"
            )
        self.capacity_bytes = capacity_bytes
        self.window_bytes = max(unit_bytes, capacity_bytes // num_windows)
        quarter = self.window_bytes // 4
        self.max_frame_bytes = max(unit_bytes, quarter // unit_bytes * unit_bytes)
        # a sender with everything consumed but this much not granted can still send a frame
        self._grant_bytes = min(quarter, self.window_bytes - self.max_frame_bytes)
        self._free = capacity_bytes // self.window_bytes
        self.granted: dict[int, int] = {}  # push -> bytes it may still send
        self._arriving: dict[int, int] = {}  # push -> bytes received, not yet consumed
        self._consumed: dict[int, int] = {}  # push -> bytes consumed, not yet granted again
        self._waiting: deque[int] = deque()

    @property
    def outstanding_bytes(self) -> int:
        """Bytes that senders may send or that are being consumed; at most `capacity_bytes`."""
        return sum(self.granted.values()) + sum(self._arriving.values())

    def open(self, push: int) -> int:
        """Lend a window; returns its bytes, or 0 while all are lent (`close` grants it later)."""
        if push in self.granted or push in self._waiting:
            raise CreditError(f"push {push} has a window already")
        if self._free == 0:
            self._waiting.append(push)
            return 0
        return self._lend(push)

    def arriving(self, push: int, num_bytes: int) -> None:
        """Data of that size is about to be read; raises `CreditError` beyond what was granted."""
        granted = self.granted.get(push, 0)
        if push not in self.granted or num_bytes > granted:
            raise CreditError(
                f"the writer sends {num_bytes} bytes but was granted {granted}; it must wait for "
                "CREDIT frames"
            )
        self.granted[push] -= num_bytes
        self._arriving[push] += num_bytes

    def consumed(self, push: int, num_bytes: int) -> int:
        """That data is in place; returns the bytes to grant now, often 0 (always after `close`)."""
        if push not in self._arriving:
            return 0
        assert self._arriving[push] >= num_bytes
        self._arriving[push] -= num_bytes
        self._consumed[push] += num_bytes
        if self._consumed[push] < self._grant_bytes:
            return 0
        grant, self._consumed[push] = self._consumed[push], 0
        self.granted[push] += grant
        return grant

    def close(self, push: int) -> list[tuple[int, int]]:
        """Take a window back; returns `(push, bytes)` of waiting pushes that got one."""
        if push in self._waiting:
            self._waiting.remove(push)
            return []
        if self.granted.pop(push, None) is None:
            return []
        del self._arriving[push], self._consumed[push]
        self._free += 1
        if not self._waiting:
            return []
        successor = self._waiting.popleft()
        return [(successor, self._lend(successor))]

    def _lend(self, push: int) -> int:
        self._free -= 1
        self.granted[push] = self.window_bytes
        self._arriving[push] = 0
        self._consumed[push] = 0
        return self.window_bytes
