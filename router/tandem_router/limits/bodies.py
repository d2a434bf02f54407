"""How many bytes of request bodies are held at once, in all and for one sender.

A sender is a tenant, or the address of a client that needs no key. Pure.
"""

from __future__ import annotations

from collections import Counter

from msgspec import Struct

from tandem_router.errors import ApiError, overloaded

# What one body costs beside its bytes, so that many empty ones are counted, too.
PER_BODY_BYTES = 4096


class HeldBodies:
    def __init__(self, max_bytes: int, max_bytes_per_sender: int) -> None:
        self.max_bytes = max_bytes
        self.max_bytes_per_sender = max_bytes_per_sender
        self.num_bytes = 0
        self.by_sender: Counter[str] = Counter()

    def hold(self, sender: str, num_bytes: int = 0) -> HeldBody:
        """num_bytes: what is here of it. Raises ApiError (503 or 429) where there is no room."""
        body = HeldBody(self, sender, 0)
        body.grow(PER_BODY_BYTES + num_bytes)
        return body

    def refusal(self, sender: str, num_bytes: int) -> ApiError | None:
        """Why `num_bytes` more cannot be held, if so."""
        if self.by_sender[sender] + num_bytes > self.max_bytes_per_sender:
            return overloaded(
                f"your requests have {self.by_sender[sender]} bytes of bodies under way; at most "
                f"{self.max_bytes_per_sender} at once; retry later",
                code="body_bytes_limit",
                retry_after_s=1.0,
            )
        if self.num_bytes + num_bytes > self.max_bytes:
            return overloaded(
                f"the router holds {self.num_bytes} bytes of request bodies, its limit; "
                "retry later",
                code="router_full",
                retry_after_s=1.0,
                status=503,
            )
        return None


class HeldBody(Struct, eq=False):
    """One body's part; to be released once."""

    _bodies: HeldBodies
    _sender: str
    _num_bytes: int

    def grow(self, num_bytes: int) -> None:
        """Raises ApiError where there is no room."""
        bodies, sender = self._bodies, self._sender
        of_sender = bodies.by_sender.get(sender, 0) + num_bytes
        of_all = bodies.num_bytes + num_bytes
        if of_sender > bodies.max_bytes_per_sender or of_all > bodies.max_bytes:
            refusal = bodies.refusal(sender, num_bytes)
            assert refusal is not None
            raise refusal
        self._num_bytes += num_bytes
        bodies.num_bytes = of_all
        bodies.by_sender[sender] = of_sender

    def release(self) -> None:
        bodies, sender, num_bytes = self._bodies, self._sender, self._num_bytes
        by_sender, self._num_bytes = bodies.by_sender, 0
        bodies.num_bytes -= num_bytes
        left = by_sender.get(sender, 0) - num_bytes
        if left > 0:
            by_sender[sender] = left
        else:
            by_sender.pop(sender, None)
