"""Spend a budget of dollars per hour evenly, on the requests where a dollar buys most quality.

Dual ascent on realised spend, solved rather than stepped: the price of money `lambda` is the one
at which the *recent* requests would have cost what may be spent now. What may be spent now is
the refill rate plus a feedback term on the bucket's level, so every error of forecast, length
head or load ends up in the next second's target and is paid back within `horizon_s`.

Why not the plain step `lambda += eta*(spend - budget)`: it was the first version, and after a
threefold load step it needs about a hundred requests per factor of two to find the new price, in
which the bucket empties (benchmarks/policy.py keeps it for comparison).

A single answer may cost as much as a hundred requests may (a dear tier under a small budget). So
much is kept beside the level that is aimed at, saved slowly: a clump of such answers then takes
what was saved, and what was spent is not above the budget, wherever one stops to count.
"""

from __future__ import annotations

import math
from collections import deque

import numpy as np
from numpy.typing import NDArray

from tandem_router.control.bucket import Bucket
from tandem_router.policy import Decision, Reason

_ABSENT = -1e18  # value of a tier that a request could not use
#: Over which the cost of the dearest answer is saved, and of the answers after it by how much it
#: fades with each; of the level that is aimed at as much may be saved beside it.
_SAVING_S, _FADES, _MOST_BESIDE = 600.0, 0.9995, 0.8


class ArrivalRate:
    """Requests per second, exponentially weighted over `time_constant_s`."""

    def __init__(self, time_constant_s: float, now: float) -> None:
        self.time_constant_s = time_constant_s
        self._start = now
        self._now = now
        self._weight = 0.0

    def observe(self, now: float) -> None:
        """Count one arrival."""
        self._decay(now)
        self._weight += 1.0

    def per_s(self, now: float) -> float:
        """Present estimate; corrected for the short history of a young estimator."""
        self._decay(now)
        seen = 1.0 - math.exp(-max(now - self._start, 1.0) / self.time_constant_s)
        return self._weight / (self.time_constant_s * seen)

    def _decay(self, now: float) -> None:
        elapsed = max(0.0, now - self._now)
        self._now = max(self._now, now)
        self._weight *= math.exp(-elapsed / self.time_constant_s)


class BudgetPacer:
    """Moves `lambda_per_usd` so that spend meets the budget; the bucket's hold stops it hard.

    Call `observe` for each decision (dispatched or not), `move` when another tier takes the
    request over, `answered` with the realised cost; read `lambda_per_usd` for the next decision.
    It reads the bucket and books nothing: money is held and settled by the ledger alone.

    Args:
        bucket: the budget's dollars.
        now: clock reading, seconds.
        horizon_s: an error in spend is paid back over this time. 30 s: shorter follows single
            answers, longer lets a load step eat into the bucket.
        window: recent requests that the price is solved on.
        interval_s: time between solutions (about 1 ms each).
        unbilled: tiers whose answers this budget does not pay, such as workers paid by the hour.
    """

    def __init__(
        self,
        bucket: Bucket,
        now: float,
        *,
        horizon_s: float = 30.0,
        window: int = 512,
        interval_s: float = 1.0,
        unbilled: frozenset[str] = frozenset(),
    ) -> None:
        self.unbilled = unbilled
        self.bucket = bucket
        self.horizon_s = horizon_s
        self.interval_s = interval_s
        self._rate = ArrivalRate(horizon_s, now)
        self._sample: deque[tuple[tuple[str, float, float], ...]] = deque(maxlen=window)
        self._in_flight_usd = 0.0
        self._bias: dict[str, float] = {}  # realised over expected cost per tier, smoothed
        self._dearest_usd = 0.0  # answer, of late
        self._lambda = 0.0
        self._solved_at = -math.inf

    @property
    def lambda_per_usd(self) -> float:
        """Quality points that one dollar is worth now."""
        return self._lambda

    def remaining_usd(self, now: float) -> float:
        """For `PolicySetPoints.budget_remaining_usd`."""
        return self.bucket.left(now)

    def observe(self, now: float, decision: Decision) -> None:
        """Learn from one arrival what its tiers would be worth and cost; perhaps re-solve."""
        self._rate.observe(now)
        usable = tuple(
            (
                verdict.tier,
                verdict.value,
                0.0 if verdict.tier in self.unbilled else verdict.expected_cost_usd,
            )
            for verdict in decision.verdicts
            if verdict.value is not None
            and verdict.excluded in (None, Reason.BUDGET, Reason.MAX_SHARE)
        )
        if decision.tier is not None and (
            not usable or decision.reason in (Reason.FORCED, Reason.OUT_OF_DISTRIBUTION)
        ):
            billed = 0.0 if decision.tier in self.unbilled else decision.expected_cost_usd
            usable = ((decision.tier, 0.0, billed),)
        if usable:
            self._sample.append(usable)
        if now - self._solved_at >= self.interval_s:
            self._solved_at = now
            self._lambda = self._solve(now)
        self._add_in_flight(self._billed(decision))

    def move(self, before: str, expected_usd: float, decision: Decision) -> None:
        """Another tier takes over a request that `before` was expected to answer.

        The old tier's bias learns nothing: it did not answer.
        """
        self._add_in_flight(self._billed(decision) - self._expected(before, expected_usd))

    def answered(self, tier: str, expected_usd: float, actual_usd: float) -> None:
        """Learn how far off the expectation was; zero for a request that never ran."""
        expected = self._expected(tier, expected_usd)
        self._add_in_flight(-expected)
        if expected > 0.0 and math.isfinite(actual_usd):
            self._dearest_usd = max(self._dearest_usd * _FADES, actual_usd)
            ratio = min(10.0, actual_usd / expected)
            old = self._bias.get(tier, 1.0)
            self._bias[tier] = old + 0.01 * (ratio - old)

    def _billed(self, decision: Decision) -> float:
        return (
            0.0
            if decision.tier is None
            else self._expected(decision.tier, decision.expected_cost_usd)
        )

    def _expected(self, tier: str, usd: float) -> float:
        return 0.0 if tier in self.unbilled else usd

    def _add_in_flight(self, usd: float) -> None:
        self._in_flight_usd = max(0.0, self._in_flight_usd + usd)

    def forget(self, keep: int = 64) -> None:
        """After a change of traffic, keep only the newest `keep` requests to solve on."""
        while len(self._sample) > keep:
            self._sample.popleft()

    def target_usd_per_s(self, now: float) -> float:
        """What may be spent per second now: the budget plus the payback of past error."""
        bucket = self.bucket
        level = bucket.balance(now) - self._in_flight_usd - bucket.pace_goal
        full = min(self._dearest_usd, _MOST_BESIDE * bucket.pace_goal)
        # What is saved of it and may be missing for a while.
        saved = min(full, max(level, full / 2))
        payback = (level - saved) / self.horizon_s + (saved - full) / _SAVING_S
        return max(0.0, bucket.pace_per_s + payback)

    def _solve(self, now: float) -> float:
        rate = self._rate.per_s(now)
        if not self._sample or rate <= 0.0:
            return self._lambda
        values, costs, billed = self._arrays()
        return price_of_money(values, costs, self.target_usd_per_s(now) / rate, billed)

    def _arrays(self) -> tuple[NDArray[np.float64], ...]:
        """Values, expected costs and bias-corrected costs, each (num_requests, num_tiers)."""
        names = {name: i for i, name in enumerate({t for row in self._sample for t, _, _ in row})}
        values = np.full((len(self._sample), len(names)), _ABSENT)
        costs = np.zeros_like(values)
        billed = np.zeros_like(values)
        for row, options in enumerate(self._sample):
            for tier, value, cost in options:
                values[row, names[tier]] = value
                costs[row, names[tier]] = cost
                billed[row, names[tier]] = cost * self._bias.get(tier, 1.0)
        return values, costs, billed


def price_of_money(
    values: NDArray[np.float64],
    costs: NDArray[np.float64],
    usd_per_request: float,
    billed: NDArray[np.float64] | None = None,
) -> float:
    """Smallest lambda at which choosing by `value - lambda*cost` spends at most the target.

    Spend falls with lambda, so bisection finds it. Returns 0 when even the free choice is
    affordable, and the price at which every request takes its cheapest tier when nothing is.

    Args:
        values: worth of each tier to each request, quality points, (num_requests, num_tiers).
        costs: cost the policy chooses by, USD, same shape.
        usd_per_request: mean spend to meet.
        billed: cost that is really paid, where known better than `costs`, same shape.
    """
    rows = np.arange(len(values))
    billed = costs if billed is None else billed
    # A tie goes to the cheaper tier here too: visit tiers from cheap to dear.
    order = np.argsort(costs.mean(axis=0), kind="stable")
    values, costs, billed = values[:, order], costs[:, order], billed[:, order]

    def spend(price: float) -> float:
        return float(billed[rows, np.argmax(values - price * costs, axis=1)].mean())

    scale = float(costs.max())
    if scale <= 0.0 or spend(0.0) <= usd_per_request:
        return 0.0
    low, high = math.log(1e-4 / scale), math.log(1e6 / scale)
    if spend(math.exp(high)) > usd_per_request:
        return math.exp(high)
    while high - low > 1e-4:
        middle = 0.5 * (low + high)
        if spend(math.exp(middle)) > usd_per_request:
            low = middle
        else:
            high = middle
    return math.exp(high)
