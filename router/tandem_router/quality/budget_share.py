"""What learning may take of a token budget, so that answers get the rest. Pure.

A second answer by a dear tier can cost as much as thirty requests may: a share of 2 % of requests
was then two fifths of the budget, and five points of quality were missing from the answers that
people saw (`docs/studies/policy.md`, a tier that comes later). Learning therefore has a bucket of
its own, a twentieth of the budget. Whether it can pay one request's label is not asked: while it
holds money any is drawn, its debt is waited for, and no label is missing because it is dear.
"""

from __future__ import annotations

from tandem_router.control import Bucket

SHARE = 0.05
#: So much of it piles up while nothing is learned, seconds.
BURST_S = 900.0


class BudgetShare:
    """One router's part. per_s: of the whole budget, US dollars a second; None: there is none."""

    def __init__(self) -> None:
        self._bucket: Bucket | None = None
        self._per_s: float | None = None

    def is_used_up(self, now: float, per_s: float | None, exploring: bool = False) -> bool:
        """Whether nothing is drawn now. exploring: a tier that nobody knows may run up a debt."""
        bucket = self._at(now, per_s)
        if bucket is None:
            return False
        return bucket.left(now) <= (-bucket.capacity if exploring else 0.0)

    def pay(self, now: float, per_s: float | None, usd: float) -> None:
        bucket = self._at(now, per_s)
        if bucket is not None:
            bucket.settle(now, 0.0, usd)

    def _at(self, now: float, per_s: float | None) -> Bucket | None:
        if per_s is None:
            self._bucket = None
        elif self._bucket is None:
            self._bucket = Bucket(SHARE * per_s, SHARE * per_s * BURST_S, now)
        elif per_s != self._per_s:
            self._bucket.set_rate(now, SHARE * per_s, SHARE * per_s * BURST_S)
        self._per_s = per_s
        return self._bucket
