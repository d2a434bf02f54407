"""How many retries may be under way at once: a share of the requests, and a few always.

A tier that fails every request would otherwise get each of them several times over, just when it
can bear least. As Envoy's retry budget: it counts what is in flight and needs no clock.
"""

from __future__ import annotations


class RetryBudget:
    """Of one tier: `take` before each retry, `give_back` when it is answered or has failed."""

    def __init__(self, share: float, least: int) -> None:
        self.share = share
        self.least = least
        self.num_retries = 0

    def take(self, num_inflight: int) -> bool:
        """Whether one more retry may start beside so many requests of the tier in flight."""
        if self.num_retries >= max(self.least, int(self.share * num_inflight)):
            return False
        self.num_retries += 1
        return True

    def give_back(self) -> None:
        self.num_retries -= 1
