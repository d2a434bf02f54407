"""Who may send how much: token buckets and concurrency, reserved before and settled after.

Pure: the clock is passed in. A request reserves an estimate of what it will use; when its usage
is known the difference is given back or charged. A bucket may go below zero when answers turn
out longer than reserved; it then admits nothing until it has refilled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from tandem_router.config import RouterConfig, TenantConfig
from tandem_router.errors import overloaded

ANONYMOUS = TenantConfig(name="anonymous")


class TokenBucket:
    """`rate` units a second, holding at most `burst`; starts full."""

    def __init__(self, rate: float, burst: float, clock: Callable[[], float]) -> None:
        self._rate = rate
        self._burst = burst
        self._clock = clock
        self._level = burst
        self._updated = clock()

    @property
    def level(self) -> float:
        now = self._clock()
        if now > self._updated:
            self._level = min(self._burst, self._level + (now - self._updated) * self._rate)
            self._updated = now
        return self._level

    def reserve(self, amount: float) -> float | None:
        """Take `amount`; or take nothing and return the seconds until it can be had.

        More than the bucket can ever hold is admitted when the bucket is full: a request larger
        than one minute's allowance then waits for the full minute, not for ever.
        """
        wanted = min(amount, self._burst)
        if self.level >= wanted:
            self._level -= amount
            return None
        return (wanted - self._level) / self._rate

    def give_back(self, amount: float) -> None:
        """Settle: positive returns what was not used, negative charges what was used beyond."""
        self._level = min(self._burst, self.level + amount)


@dataclass(eq=False)
class TenantState:
    """One tenant's gates."""

    config: TenantConfig
    requests: TokenBucket | None = None
    tokens: TokenBucket | None = None
    usd: TokenBucket | None = None
    num_inflight: int = 0


@dataclass(eq=False)
class Reservation:
    """What an admitted request holds; settle exactly once."""

    tenant: TenantState
    num_tokens: float
    cost_usd: float = 0.0
    settled: bool = field(default=False, repr=False)


class Admission:
    """All gates of the router."""

    def __init__(self, config: RouterConfig, clock: Callable[[], float]) -> None:
        self._max_inflight = config.limits.max_inflight
        self.num_inflight = 0
        self._tenants = {
            tenant.name: self._state(tenant, clock) for tenant in (*config.tenants, ANONYMOUS)
        }

    @staticmethod
    def _state(tenant: TenantConfig, clock: Callable[[], float]) -> TenantState:
        def bucket(per: float | None, seconds: float, burst_s: float) -> TokenBucket | None:
            if per is None:
                return None
            rate = per / seconds
            return TokenBucket(rate, rate * burst_s, clock)

        return TenantState(
            tenant,
            requests=bucket(tenant.requests_per_minute, 60.0, 60.0),
            tokens=bucket(tenant.tokens_per_minute, 60.0, 60.0),
            usd=bucket(tenant.usd_per_hour, 3600.0, 3600.0),
        )

    def tenant(self, name: str) -> TenantState:
        return self._tenants[name]

    def admit(self, tenant: TenantState, num_tokens: float) -> Reservation:
        """Pass every gate or raise ApiError (429 with Retry-After); nothing is half taken."""
        if self.num_inflight >= self._max_inflight:
            raise overloaded(
                f"the router has {self.num_inflight} requests in flight, its limit; retry later",
                code="router_full",
                retry_after_s=1.0,
            )
        limit = tenant.config.max_concurrency
        name = tenant.config.name
        if limit is not None and tenant.num_inflight >= limit:
            raise overloaded(
                f"tenant {name!r} has {tenant.num_inflight} requests in flight, its limit",
                code="concurrency_limit",
                retry_after_s=1.0,
            )
        wait = tenant.requests.reserve(1.0) if tenant.requests else None
        if wait is not None:
            raise overloaded(
                f"tenant {name!r} is above {tenant.config.requests_per_minute:g} requests a minute",
                code="request_rate_limit",
                retry_after_s=wait,
            )
        wait = tenant.tokens.reserve(num_tokens) if tenant.tokens else None
        if wait is not None:
            if tenant.requests:
                tenant.requests.give_back(1.0)
            raise overloaded(
                f"tenant {name!r} is above {tenant.config.tokens_per_minute:g} tokens a minute",
                code="token_rate_limit",
                retry_after_s=wait,
            )
        self.num_inflight += 1
        tenant.num_inflight += 1
        return Reservation(tenant, num_tokens)

    @staticmethod
    def reserve_cost(reservation: Reservation, cost_usd: float) -> None:
        """Set money aside once the tier is known, or another amount when the tier changes.

        The policy has checked that it is there.
        """
        usd = reservation.tenant.usd
        if usd is not None:
            usd.give_back(reservation.cost_usd - cost_usd)
            reservation.cost_usd = cost_usd

    def settle(self, reservation: Reservation, num_tokens: float, cost_usd: float) -> None:
        """Replace the estimates by what was used; more than one call is our own mistake."""
        assert not reservation.settled
        reservation.settled = True
        tenant = reservation.tenant
        self.num_inflight -= 1
        tenant.num_inflight -= 1
        if tenant.tokens is not None:
            tenant.tokens.give_back(reservation.num_tokens - num_tokens)
        if tenant.usd is not None:
            tenant.usd.give_back(reservation.cost_usd - cost_usd)
