"""The one book of money and tokens: what tenants and the budget hold, spend and have left.

Pure: the clock is passed in. `hold` admits a request and sets its tokens aside, `move` sets money
aside on the tier that is to answer (and books what an attempt elsewhere has used), `settle`
replaces everything held by what was used. Per bucket, granted = spent + held + left after any
sequence of these, so nothing is booked twice and nothing is lost.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from tandem_router.config import RouterConfig, TenantConfig
from tandem_router.control.bucket import Bucket, budget_bucket
from tandem_router.errors import ApiError, overloaded

ANONYMOUS = TenantConfig(name="anonymous")
MINUTE_S, HOUR_S = 60.0, 3600.0


@dataclass(eq=False)
class Account:
    """One tenant's limits and what of them is in use."""

    config: TenantConfig
    requests: Bucket | None = None
    tokens: Bucket | None = None
    usd: Bucket | None = None
    num_inflight: int = 0


@dataclass(frozen=True, slots=True)
class Used:
    """What one attempt, or a whole request, really used."""

    tokens: float = 0.0
    usd: float = 0.0


NOTHING = Used()


@dataclass(eq=False, slots=True)
class Hold:
    """What one admitted request has set aside; `Ledger.settle` ends it, once."""

    account: Account
    tokens: float
    tier: str | None = None
    tenant_usd: float = 0.0
    budget_usd: float = 0.0
    used: Used = NOTHING  # booked already, by attempts that were given up
    settled: bool = field(default=False, repr=False)


@dataclass(frozen=True, slots=True)
class Means:
    """Dollars that one request may still set aside, its own hold included; None: no ceiling."""

    tenant_usd: float | None
    budget_usd: float | None


class Ledger:
    """All accounts of one router.

    unbilled: tiers that the budget does not pay, such as workers paid by the hour; tenants pay
    every tier at its list price.
    """

    def __init__(self, config: RouterConfig, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._max_inflight = config.limits.max_inflight
        self.num_inflight = 0
        self.unbilled = frozenset(tier.name for tier in config.tiers if tier.kind == "pool")
        usd_per_hour = config.budget.usd_per_hour
        self.budget: Bucket | None = None
        if usd_per_hour is not None and len(self.unbilled) < len(config.tiers):
            self.budget = budget_bucket(usd_per_hour, clock())
        self._accounts = {
            tenant.name: _account(tenant, clock()) for tenant in (*config.tenants, ANONYMOUS)
        }

    def account(self, tenant: str) -> Account:
        """The account of a configured tenant, or of `anonymous`."""
        return self._accounts[tenant]

    def hold(self, account: Account, num_tokens: float) -> Hold:
        """Pass every gate or raise ApiError (429 with Retry-After); nothing is half taken."""
        if self.num_inflight >= self._max_inflight:
            raise overloaded(
                f"the router has {self.num_inflight} requests in flight, its limit; retry later",
                code="router_full",
                retry_after_s=1.0,
            )
        limit = account.config.max_concurrency
        name = account.config.name
        if limit is not None and account.num_inflight >= limit:
            raise overloaded(
                f"tenant {name!r} has {account.num_inflight} requests in flight, its limit",
                code="concurrency_limit",
                retry_after_s=1.0,
            )
        now = self._clock()
        if account.requests is not None and not account.requests.hold(now, 1.0, overdraw=True):
            raise _too_fast(
                account.requests,
                now,
                1.0,
                f"tenant {name!r} is above {account.config.requests_per_minute:g} requests "
                "a minute",
                "request_rate_limit",
            )
        if account.tokens is not None and not account.tokens.hold(now, num_tokens, overdraw=True):
            if account.requests is not None:
                account.requests.settle(now, 1.0, 0.0)
            raise _too_fast(
                account.tokens,
                now,
                num_tokens,
                f"tenant {name!r} is above {account.config.tokens_per_minute:g} tokens a minute",
                "token_rate_limit",
            )
        if account.requests is not None:
            account.requests.settle(now, 1.0, 1.0)
        self.num_inflight += 1
        account.num_inflight += 1
        return Hold(account, num_tokens)

    def means(self, hold: Hold) -> Means:
        """What a request may be decided with: what is left, and what it holds itself."""
        now = self._clock()
        usd = hold.account.usd
        return Means(
            None if usd is None else usd.left(now) + hold.tenant_usd,
            None if self.budget is None else self.budget.left(now) + hold.budget_usd,
        )

    def move(self, hold: Hold, tier: str, usd: float, used: Used = NOTHING) -> bool:
        """Hold `usd` for an answer of `tier`, instead of what is held; book what was `used`.

        False when tenant or budget cannot pay: `used` is booked all the same, and what was held
        and not used stays held.
        """
        now = self._clock()
        account = hold.account
        if used is not NOTHING:
            hold.tokens -= _book(account.tokens, now, hold.tokens, used.tokens)
            hold.tenant_usd -= _book(account.usd, now, hold.tenant_usd, used.usd)
            if hold.tier is not None and hold.tier not in self.unbilled:
                hold.budget_usd -= _book(self.budget, now, hold.budget_usd, used.usd)
            hold.used = Used(hold.used.tokens + used.tokens, hold.used.usd + used.usd)
        budget_usd = 0.0 if tier in self.unbilled else usd
        if account.usd is not None and not account.usd.change(now, hold.tenant_usd, usd):
            return False
        if self.budget is not None and not self.budget.change(now, hold.budget_usd, budget_usd):
            if account.usd is not None:
                # What it held a moment ago is there.
                account.usd.change(now, usd, hold.tenant_usd)
            return False
        hold.tier, hold.tenant_usd, hold.budget_usd = tier, usd, budget_usd
        return True

    def wait_until(self, hold: Hold, budget: bool, usd: float) -> float | None:
        """Seconds until the budget, else the tenant, can pay `usd` for a request; None: never."""
        bucket = self.budget if budget else hold.account.usd
        if bucket is None:
            return None  # a ceiling per request: no time changes it
        held = hold.budget_usd if budget else hold.tenant_usd
        most = hold.account.config.max_cost_usd
        if not budget and most is not None and usd > most:
            return None
        return bucket.wait_s(self._clock(), usd - held)

    def settle(self, hold: Hold, used: Used) -> Used:
        """End a hold with what its last attempt used; returns what all of it used.

        More than one call is our own mistake.
        """
        assert not hold.settled
        hold.settled = True
        now = self._clock()
        account = hold.account
        self.num_inflight -= 1
        account.num_inflight -= 1
        if account.tokens is not None:
            account.tokens.settle(now, hold.tokens, used.tokens)
        if account.usd is not None:
            account.usd.settle(now, hold.tenant_usd, used.usd)
        if self.budget is not None and hold.tier is not None:
            billed = 0.0 if hold.tier in self.unbilled else used.usd
            self.budget.settle(now, hold.budget_usd, billed)
        return Used(hold.used.tokens + used.tokens, hold.used.usd + used.usd)


def _account(tenant: TenantConfig, now: float) -> Account:
    def bucket(amount: float | None, seconds: float) -> Bucket | None:
        return None if amount is None else Bucket(amount / seconds, amount, now)

    return Account(
        tenant,
        requests=bucket(tenant.requests_per_minute, MINUTE_S),
        tokens=bucket(tenant.tokens_per_minute, MINUTE_S),
        usd=bucket(tenant.usd_per_hour, HOUR_S),
    )


def _book(bucket: Bucket | None, now: float, held: float, used: float) -> float:
    """Spend `used` out of what is held; returns how much of the hold that took."""
    taken = min(held, max(0.0, used))
    if bucket is not None:
        bucket.settle(now, taken, used)
    return taken


def _too_fast(bucket: Bucket, now: float, amount: float, message: str, code: str) -> ApiError:
    wait_s = bucket.wait_s(now, amount, overdraw=True)
    return overloaded(message, code=code, retry_after_s=wait_s if wait_s is not None else MINUTE_S)
