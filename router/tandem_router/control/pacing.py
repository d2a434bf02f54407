"""Spend a budget of dollars per hour evenly, on the requests where a dollar buys most quality.

Dual ascent on realised spend, solved rather than stepped: the price of money `lambda` is the one
at which the *recent* requests would have cost what may be spent now. What may be spent now is
the refill rate plus a feedback term on the bucket's level, so every error of forecast, length
head or load ends up in the next second's target and is paid back within `horizon_s`.

Why not the plain step `lambda += eta*(spend - budget)`: it was the first version, and after a
threefold load step it needs about a hundred requests per factor of two to find the new price, in
which the bucket empties (benchmarks/policy.py keeps it for comparison).
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tandem_router.control.bucket import TokenBucket
from tandem_router.policy import Decision, Reason

_ABSENT = -1e18  # value of a tier that a request could not use


@dataclass(frozen=True, slots=True)
class Reservation:
    """Money set aside for one dispatched request; hand it back to `settle`."""

    tier: str
    expected_usd: float
    reserved_usd: float


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
    """Moves `lambda_per_usd` so that spend meets the budget, and stops hard at the bucket.

    Call `observe` for each decision (dispatched or not), `reserve` before dispatch, `move` when
    another tier takes the request over, `settle` with the realised cost; read `lambda_per_usd`
    and `remaining_usd` for the next decision.

    Args:
        usd_per_hour: the ceiling.
        now: clock reading, seconds.
        horizon_s: an error in spend is paid back over this time. 30 s: shorter follows single
            answers, longer lets a load step eat into the bucket.
        burst_s: bucket capacity, in seconds of budget.
        window: recent requests that the price is solved on.
        interval_s: time between solutions (about 1 ms each).
        unbilled: tiers whose answers this budget does not pay, such as workers paid by the hour.
    """

    def __init__(
        self,
        usd_per_hour: float,
        now: float,
        *,
        horizon_s: float = 30.0,
        burst_s: float = 300.0,
        window: int = 512,
        interval_s: float = 1.0,
        unbilled: frozenset[str] = frozenset(),
    ) -> None:
        self.unbilled = unbilled
        rate = usd_per_hour / 3600.0
        self.bucket = TokenBucket(rate, rate * burst_s, now)
        self.horizon_s = horizon_s
        self.interval_s = interval_s
        self._goal_usd = self.bucket.balance_usd(now)
        self._rate = ArrivalRate(horizon_s, now)
        self._sample: deque[tuple[tuple[str, float, float], ...]] = deque(maxlen=window)
        self._in_flight_usd = 0.0
        self._bias: dict[str, float] = {}  # realised over expected cost per tier, smoothed
        self._lambda = 0.0
        self._solved_at = -math.inf

    @property
    def lambda_per_usd(self) -> float:
        """Quality points that one dollar is worth now."""
        return self._lambda

    def remaining_usd(self, now: float) -> float:
        """For `PolicySetPoints.budget_remaining_usd`."""
        return self.bucket.remaining_usd(now)

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

    def reserve(self, now: float, decision: Decision) -> Reservation | None:
        """Set the decision's cost aside; None when the bucket cannot pay it."""
        if decision.tier in self.unbilled:
            return Reservation(decision.tier, 0.0, 0.0)
        if decision.tier is None or not self.bucket.reserve(now, decision.reserve_cost_usd):
            return None
        self._in_flight_usd += decision.expected_cost_usd
        return Reservation(decision.tier, decision.expected_cost_usd, decision.reserve_cost_usd)

    def can_pay(self, now: float, decision: Decision) -> bool:
        """Whether `reserve` would set this decision's cost aside."""
        return decision.tier in self.unbilled or decision.reserve_cost_usd <= self.remaining_usd(
            now
        )

    def move(self, now: float, reservation: Reservation, decision: Decision) -> Reservation | None:
        """Set the new tier's cost aside instead of the old one's.

        None, and nothing changes, when the bucket cannot pay the difference. The old tier's bias
        learns nothing: it did not answer.
        """
        if decision.tier is None:
            return None
        billed = decision.tier not in self.unbilled
        expected = decision.expected_cost_usd if billed else 0.0
        reserved = decision.reserve_cost_usd if billed else 0.0
        if not self.bucket.change(now, reservation.reserved_usd, reserved):
            return None
        self._in_flight_usd = max(0.0, self._in_flight_usd + expected - reservation.expected_usd)
        return Reservation(decision.tier, expected, reserved)

    def settle(self, now: float, reservation: Reservation, actual_usd: float) -> None:
        """Book the realised cost (zero for a request that never ran)."""
        if reservation.tier in self.unbilled:
            return
        self.bucket.settle(now, reservation.reserved_usd, actual_usd)
        self._in_flight_usd = max(0.0, self._in_flight_usd - reservation.expected_usd)
        if reservation.expected_usd > 0.0 and math.isfinite(actual_usd):
            ratio = min(10.0, actual_usd / reservation.expected_usd)
            old = self._bias.get(reservation.tier, 1.0)
            self._bias[reservation.tier] = old + 0.01 * (ratio - old)

    def spend(self, now: float, usd: float) -> None:
        """Book a cost without reservation, such as a shadow answer."""
        self.bucket.settle(now, 0.0, usd)

    def forget(self, keep: int = 64) -> None:
        """After a change of traffic, keep only the newest `keep` requests to solve on."""
        while len(self._sample) > keep:
            self._sample.popleft()

    def target_usd_per_s(self, now: float) -> float:
        """What may be spent per second now: the budget plus the payback of past error."""
        error = self.bucket.balance_usd(now) - self._in_flight_usd - self._goal_usd
        return max(0.0, self.bucket.usd_per_s + error / self.horizon_s)

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
