"""The one book of money and tokens: what tenants and the budget hold, spend and have left.

Pure: the clock is passed in. `hold` admits a request and sets its tokens aside, `move` sets money
aside on the tier that is to answer (and books what an attempt elsewhere has used), `settle`
replaces everything held by what was used. Per bucket, granted = spent + held + left after any
sequence of these, so nothing is booked twice and nothing is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from msgspec import Struct

from tandem_router.config import RouterConfig, TenantConfig
from tandem_router.control.bucket import Bucket, budget_bucket
from tandem_router.errors import ApiError, overloaded

# Where nobody needs a key there is nobody to be put before.
ANONYMOUS = TenantConfig(name="anonymous", highest_priority=-100)
MINUTE_S, HOUR_S = 60.0, 3600.0


class Limits(Protocol):
    """What an account may use: a tenant's or an API key's limits; None means no limit."""

    @property
    def max_concurrency(self) -> int | None: ...
    @property
    def requests_per_minute(self) -> float | None: ...
    @property
    def tokens_per_minute(self) -> float | None: ...
    @property
    def usd_per_hour(self) -> float | None: ...


@dataclass(eq=False)
class Account:
    """The limits of one tenant or API key and what of them is in use."""

    name: str
    limits: Limits
    requests: Bucket | None = None
    tokens: Bucket | None = None
    usd: Bucket | None = None
    num_inflight: int = 0


class Used(Struct, frozen=True, gc=False):
    """What one attempt, or a whole request, really used."""

    tokens: float = 0.0
    usd: float = 0.0


NOTHING = Used()


@dataclass(frozen=True, slots=True)
class Limit:
    """A bucket, and the whole of which it is this router's part."""

    name: str
    bucket: Bucket
    per_s: float
    capacity: float


class Hold(Struct, eq=False):
    """What one admitted request has set aside; `Ledger.settle` ends it, once."""

    tenant: TenantConfig
    accounts: tuple[Account, ...]  # its API key's, where that has limits of its own; its tenant's
    tokens: float
    tier: str | None = None
    usd: float = 0.0  # in each account
    budget_usd: float = 0.0
    used: Used = NOTHING  # booked already, by attempts that were given up
    settled: bool = False


class Means(Struct, frozen=True, gc=False):
    """Dollars that one request may still set aside, its own hold included; None: no ceiling."""

    tenant_usd: float | None
    budget_usd: float | None


NO_CEILINGS = Means(None, None)


class Ledger:
    """All accounts of one router.

    unbilled: tiers that the budget does not pay, such as workers paid by the hour; tenants pay
    every tier at its list price.
    """

    def __init__(self, config: RouterConfig, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.num_routers = config.replicas
        self._usd_per_hour: float | None = None
        self._max_inflight = config.limits.max_inflight
        self.num_inflight = 0
        self.unbilled = _unbilled(config)
        self.budget: Bucket | None = None
        self._set_budget(config)
        self._tenants: dict[str, TenantConfig] = {}
        self._accounts: dict[str, Account] = {}
        self._keys: dict[str, Account] = {}
        self._set_tenants(config)

    def _set_tenants(self, config: RouterConfig) -> None:
        self._tenants = {tenant.name: tenant for tenant in (ANONYMOUS, *config.tenants)}
        for name in self._accounts.keys() - self._tenants.keys():
            del self._accounts[name]
        for name, tenant in self._tenants.items():
            self._limit(self._accounts, name, f"tenant {name!r}", tenant)

        # Those that nothing but the router's own limit holds up: most, and soon told.
        self._unlimited = {
            name: (account,)
            for name, account in self._accounts.items()
            if len(self._tenants) <= 2  # else the last places are for others
            and account.requests is None
            and account.tokens is None
            and account.limits.max_concurrency is None
        }

    def set_keys(self, keys: Mapping[str, tuple[str, Limits]]) -> None:
        """API keys that have limits of their own: id to (name in messages, limits)."""
        for key in self._keys.keys() - keys.keys():
            del self._keys[key]
        for key, (name, limits) in keys.items():
            self._limit(self._keys, key, name, limits)

    def _limit(self, accounts: dict[str, Account], key: str, name: str, limits: Limits) -> None:
        """Give an account its limits; what it has spent and holds stays."""
        now = self._clock()
        account = accounts.setdefault(key, Account(name, limits))
        account.limits = limits
        part = 1.0 / self.num_routers
        account.requests = _bucket(
            account.requests, limits.requests_per_minute, MINUTE_S, part, now
        )
        account.tokens = _bucket(account.tokens, limits.tokens_per_minute, MINUTE_S, part, now)
        account.usd = _bucket(account.usd, limits.usd_per_hour, HOUR_S, part, now)

    def reconfigure(self, config: RouterConfig) -> None:
        """Other limits and budget from now on; what is spent, held and owed stays."""
        self._max_inflight = config.limits.max_inflight
        self.num_routers = config.replicas
        # A tier that is gone may still have requests to settle, as they were held.
        gone = self.unbilled - {tier.name for tier in config.tiers}
        self.unbilled = _unbilled(config) | gone
        self._set_tenants(config)
        self._set_budget(config)
        for key, account in self._keys.items():
            self._limit(self._keys, key, account.name, account.limits)

    def _set_budget(self, config: RouterConfig) -> None:
        usd_per_hour, now = config.budget.usd_per_hour, self._clock()
        if usd_per_hour is None or all(tier.kind == "pool" for tier in config.tiers):
            self.budget = self._usd_per_hour = None
            return
        self._usd_per_hour = usd_per_hour
        new = budget_bucket(usd_per_hour / self.num_routers, now)
        if self.budget is None:
            self.budget = new
        else:
            self.budget.set_rate(now, new.per_s, new.capacity)

    def limits(self) -> Iterator[Limit]:
        """Every bucket with its name and its whole rate, of which this router has a part."""
        if self.budget is not None and self._usd_per_hour is not None:
            whole = budget_bucket(self._usd_per_hour, 0.0)
            yield Limit("budget", self.budget, whole.per_s, whole.capacity)
        for kind, accounts in (("tenant", self._accounts), ("key", self._keys)):
            for name, account in accounts.items():
                for unit, bucket, amount, seconds in (
                    ("requests", account.requests, account.limits.requests_per_minute, MINUTE_S),
                    ("tokens", account.tokens, account.limits.tokens_per_minute, MINUTE_S),
                    ("usd", account.usd, account.limits.usd_per_hour, HOUR_S),
                ):
                    if bucket is not None and amount is not None:
                        yield Limit(f"{kind}/{name}/{unit}", bucket, amount / seconds, amount)

    def account(self, tenant: str) -> Account:
        """The account of a configured tenant, or of `anonymous`."""
        return self._accounts[tenant]

    def highest_priority(self, tenant: str) -> int:
        """The lowest number that the tenant's requests may carry; lower goes first."""
        known = self._tenants.get(tenant)
        return known.highest_priority if known is not None else 0

    def check(self, tenant: str, num_tokens: float, key: str | None = None) -> tuple[Account, ...]:
        """The accounts of a request that passes every gate; takes nothing.

        Raises ApiError (429 with Retry-After). Asked before a body is read, too.
        """
        alone = self._unlimited.get(tenant)
        if alone is not None and self.num_inflight < self._max_inflight and key not in self._keys:
            return alone
        if self.num_inflight >= self._max_inflight:
            raise overloaded(
                f"the router has {self.num_inflight} requests in flight, its limit; retry later",
                code="router_full",
                retry_after_s=1.0,
            )
        own = self._accounts.get(tenant)
        room = self._max_inflight - self.num_inflight - 1
        is_shared = len(self._tenants) > 2  # by more than `anonymous` and one
        if is_shared and own is not None and own.num_inflight > room:
            raise overloaded(
                f"{own.name} has {own.num_inflight} requests in flight and may not take the "
                f"router's last {room + 1}: they are for other tenants; retry later",
                code="router_full",
                retry_after_s=1.0,
            )
        if tenant not in self._accounts:
            raise ApiError(401, f"tenant {tenant!r} is gone", type="authentication_error")
        accounts: tuple[Account, ...] = (self._accounts[tenant],)
        if key is not None and (own := self._keys.get(key)) is not None:
            accounts = (own, *accounts)
        now = self._clock()
        for account in accounts:
            limit = account.limits.max_concurrency
            if limit is not None and account.num_inflight >= max(1, limit // self.num_routers):
                raise overloaded(
                    f"{account.name} has {account.num_inflight} requests in flight, its limit",
                    code="concurrency_limit",
                    retry_after_s=1.0,
                )
            if (refused := _too_fast(account, now, num_tokens)) is not None:
                raise refused
        return accounts

    def hold(self, tenant: str, num_tokens: float, key: str | None = None) -> Hold:
        """Pass every gate or raise ApiError (429 with Retry-After); nothing is half taken."""
        accounts = self.check(tenant, num_tokens, key)
        now: float | None = None
        for account in accounts:
            if account.requests is not None or account.tokens is not None:
                now = self._clock() if now is None else now
                if account.requests is not None:
                    account.requests.settle(now, 0.0, 1.0)
                if account.tokens is not None:
                    account.tokens.hold(now, num_tokens, overdraw=True)
            account.num_inflight += 1
        self.num_inflight += 1
        return Hold(self._tenants[tenant], accounts, num_tokens)

    def _has_ceiling(self, hold: Hold) -> bool:
        """Whether any sum of money bounds it."""
        if self.budget is not None:
            return True
        for account in hold.accounts:  # noqa: SIM110 (a generator costs thrice)
            if account.usd is not None:
                return True
        return False

    def means(self, hold: Hold) -> Means:
        """What a request may be decided with: what is left, and what it holds itself."""
        if not self._has_ceiling(hold):
            return NO_CEILINGS
        now = self._clock()
        left = [each.usd.left(now) for each in hold.accounts if each.usd is not None]
        return Means(
            min(left) + hold.usd if left else None,
            None if self.budget is None else self.budget.left(now) + hold.budget_usd,
        )

    def move(self, hold: Hold, tier: str, usd: float, used: Used = NOTHING) -> bool:
        """Hold `usd` for an answer of `tier`, instead of what is held; book what was `used`.

        False when tenant, key or budget cannot pay: `used` is booked all the same, and what was
        held and not used stays held.
        """
        if used is not NOTHING:
            self._book(hold, self._clock(), used)
        if not self._has_ceiling(hold):
            hold.tier, hold.usd = tier, usd
            hold.budget_usd = 0.0 if tier in self.unbilled else usd
            return True
        now = self._clock()
        budget_usd = 0.0 if tier in self.unbilled else usd
        changed: list[tuple[Bucket, float, float]] = []
        buckets = [(each.usd, hold.usd, usd) for each in hold.accounts]
        for bucket, before, after in (*buckets, (self.budget, hold.budget_usd, budget_usd)):
            if bucket is None:
                continue
            if not bucket.change(now, before, after):
                for other, held, given in changed:
                    other.change(now, given, held)  # what it held a moment ago is there
                return False
            changed.append((bucket, before, after))
        hold.tier, hold.usd, hold.budget_usd = tier, usd, budget_usd
        return True

    def _book(self, hold: Hold, now: float, used: Used) -> None:
        """Spend what an attempt used, out of what is held for it."""
        tokens, usd = min(hold.tokens, used.tokens), min(hold.usd, used.usd)
        for account in hold.accounts:
            if account.tokens is not None:
                account.tokens.settle(now, tokens, used.tokens)
            if account.usd is not None:
                account.usd.settle(now, usd, used.usd)
        hold.tokens -= tokens
        hold.usd -= usd
        if hold.tier is not None and hold.tier not in self.unbilled:
            billed = min(hold.budget_usd, used.usd)
            if self.budget is not None:
                self.budget.settle(now, billed, used.usd)
            hold.budget_usd -= billed
        hold.used = Used(hold.used.tokens + used.tokens, hold.used.usd + used.usd)

    def wait_until(self, hold: Hold, budget: bool, usd: float) -> float | None:
        """Seconds until the budget, else the tenant, can pay `usd` for a request; None: never."""
        now = self._clock()
        if budget:
            return None if self.budget is None else self.budget.wait_s(now, usd - hold.budget_usd)
        most = hold.tenant.max_cost_usd
        if most is not None and usd > most:
            return None  # a ceiling per request: no time changes it
        waits = [each.usd.wait_s(now, usd - hold.usd) for each in hold.accounts if each.usd]
        known = [wait for wait in waits if wait is not None]
        return max(known) if known and len(known) == len(waits) else None

    def hold_aside(self, usd: float) -> bool:
        """Hold money of the budget for what no tenant asked for; False where it is not there."""
        return self.budget is None or self.budget.hold(self._clock(), usd)

    def settle_aside(self, held: float, used: float) -> None:
        """End what `hold_aside` held."""
        if self.budget is not None:
            self.budget.settle(self._clock(), held, used)

    def withdraw(self, hold: Hold) -> None:
        """End a hold as if the request had not come: it comes again by another door."""
        self.settle(hold, NOTHING)
        for account in hold.accounts:
            if account.requests is not None:
                account.requests.give_back(1.0)

    def settle(self, hold: Hold, used: Used) -> Used:
        """End a hold with what its last attempt used; returns what all of it used.

        More than one call is our own mistake.
        """
        assert not hold.settled
        hold.settled = True
        self.num_inflight -= 1
        for account in hold.accounts:
            account.num_inflight -= 1
            if account.tokens is not None or account.usd is not None:
                self._end(account, hold, used)
        if self.budget is not None and hold.tier is not None:
            billed = 0.0 if hold.tier in self.unbilled else used.usd
            self.budget.settle(self._clock(), hold.budget_usd, billed)
        if hold.used is NOTHING:
            return used
        return Used(hold.used.tokens + used.tokens, hold.used.usd + used.usd)

    def _end(self, account: Account, hold: Hold, used: Used) -> None:
        """Of what an account holds for a request, what was used is spent."""
        now = self._clock()
        if account.tokens is not None:
            account.tokens.settle(now, hold.tokens, used.tokens)
        if account.usd is not None:
            account.usd.settle(now, hold.usd, used.usd)


def _bucket(
    bucket: Bucket | None, amount: float | None, seconds: float, part: float, now: float
) -> Bucket | None:
    """A bucket of `part` of `amount` per `seconds`; one that is there keeps its spent and held."""
    if amount is None:
        return None
    amount *= part
    if bucket is None:
        return Bucket(amount / seconds, amount, now)
    bucket.set_rate(now, amount / seconds, amount)
    return bucket


def _unbilled(config: RouterConfig) -> frozenset[str]:
    return frozenset(tier.name for tier in config.tiers if tier.kind == "pool")


def _too_fast(account: Account, now: float, num_tokens: float) -> ApiError | None:
    """The refusal of an account that is above one of its rates, with the time to wait."""
    if account.requests is None and account.tokens is None:
        return None
    for bucket, amount, rate, unit, code in (
        (account.requests, 1.0, account.limits.requests_per_minute, "requests", "request"),
        (account.tokens, num_tokens, account.limits.tokens_per_minute, "tokens", "token"),
    ):
        if bucket is None or rate is None:
            continue
        wait_s = bucket.wait_s(now, amount, overdraw=True)
        if wait_s is None or wait_s > 0.0:
            left = max(0.0, bucket.left(now))
            return overloaded(
                f"{account.name} has {left:.0f} of its {rate:g} {unit} a minute left; this request "
                f"may use {amount:.0f}",
                code=f"{code}_rate_limit",
                retry_after_s=wait_s if wait_s is not None else MINUTE_S,
            )
    return None
