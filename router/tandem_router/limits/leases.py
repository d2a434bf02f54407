"""Several routers share each limit exactly: what one may use it has leased from the store.

Every bucket of the ledger has its original in the store, which alone refills with time. A router
leases what it expects to need and hands back what it does not, a few times a second and never
while a request waits. Half of a bucket lies with the routers in equal parts, the other half goes
where the traffic is. Whatever is used was leased, so together they stay within the limit. While
the store is away each router goes on with its equal part of the rate; what it used meanwhile is
charged once the store is back. A router that ends hands back what it had leased and not used; one
that is killed takes it with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tandem_router.control.bucket import Bucket
from tandem_router.limits.ledger import Ledger, Limit
from tandem_router.store.records import Backend

AWAY_AFTER_S = 5.0
AHEAD_S = 2.0  # leased ahead of use


@dataclass
class _Lease:
    bucket: Bucket
    total: float = 0.0  # leased less handed back, ever
    spent: float = 0.0  # as of the last look
    looked_at: float | None = None
    use_per_s: float = 0.0  # smoothed


class SharedLimits:
    """The leases of one router. num_routers: how many share, so that each has its part."""

    def __init__(self, ledger: Ledger, clock: Callable[[], float]) -> None:
        self._ledger = ledger
        self._clock = clock
        self._leases: dict[str, _Lease] = {}
        self._answered_at: float | None = None

    async def step(self, backend: Backend) -> None:
        """Adjust all leases. Raises StoreError."""
        now = self._clock()
        limits = {limit.name: limit for limit in self._ledger.limits()}
        for name in self._leases.keys() - limits.keys():
            del self._leases[name]
        for name, limit in limits.items():
            lease = self._leases.get(name)
            if lease is None or lease.bucket is not limit.bucket:
                lease = self._leases[name] = _Lease(limit.bucket)
            if not limit.bucket.leased:
                # It was filled by its own clock, at first or while the store was away: from here
                # on only what was leased counts, and what was used beyond is owed. Asked first:
                # a store that is still away leaves it as it is.
                await backend.lease(name, 0.0, limit.per_s, limit.capacity)
                share = self._share(limit)
                limit.bucket.lease_only(now, lease.total, limit.capacity, limit.per_s, share)
            want = self._wanted(lease, limit, now)
            if want:
                owed = min(max(0.0, want), max(0.0, -limit.bucket.balance(now)))
                moved = await backend.lease(name, want, limit.per_s, limit.capacity, owed)
                limit.bucket.grant(moved)
                lease.total += moved
        self._answered_at = now

    async def release(self, backend: Backend) -> None:
        """Hand back what was leased and not used, before this router ends. Raises StoreError."""
        now = self._clock()
        for limit in self._ledger.limits():
            lease = self._leases.get(limit.name)
            left = limit.bucket.left(now)
            if lease is not None and limit.bucket.leased and left > 0.0:
                moved = await backend.lease(limit.name, -left, limit.per_s, limit.capacity)
                limit.bucket.grant(moved)
                lease.total += moved

    def check(self) -> None:
        """Where the store has been away for long: go on with an equal part of each rate."""
        now = self._clock()
        if self._answered_at is not None and now - self._answered_at < AWAY_AFTER_S:
            return
        part = 1.0 / self._ledger.num_routers
        for limit in self._ledger.limits():
            if limit.bucket.leased:
                limit.bucket.set_rate(now, limit.per_s * part, limit.capacity * part)

    def _share(self, limit: Limit) -> float:
        """What each router keeps leased though it is idle."""
        return limit.capacity / (2 * self._ledger.num_routers)

    def _wanted(self, lease: _Lease, limit: Limit, now: float) -> float:
        """What to lease, negative to hand back; 0 where it is not worth a call."""
        bucket, share = lease.bucket, self._share(limit)
        left = bucket.left(now)
        if lease.looked_at is not None and now > lease.looked_at:
            used = max(0.0, bucket.spent - lease.spent) / (now - lease.looked_at)
            lease.use_per_s += 0.5 * (used - lease.use_per_s)
        lease.spent, lease.looked_at = bucket.spent, now
        missed, bucket.missed = bucket.missed, 0.0
        target = min(limit.capacity, max(share, AHEAD_S * lease.use_per_s) + missed)
        want = target - left
        return want if abs(want) > 0.05 * share else 0.0
