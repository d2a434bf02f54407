"""Money of a grading run: what was spent, what is under way, and whether more may be begun."""

from __future__ import annotations

from collections import defaultdict


class Spend:
    """A limit in dollars that is held before a question is asked, so that it is never passed.

    Pure bookkeeping: what a question may cost at most is held when it begins and released when it
    ends; every answer books its real cost.
    """

    def __init__(self, max_usd: float | None = None) -> None:
        self._max_usd = max_usd
        self._held = 0.0
        self.by_name: defaultdict[str, float] = defaultdict(float)
        self.dearest: defaultdict[str, float] = defaultdict(float)

    @property
    def limited(self) -> bool:
        return self._max_usd is not None

    @property
    def total_usd(self) -> float:
        return sum(self.by_name.values())

    def hold(self, amount: float) -> bool:
        """Whether a question that costs at most `amount` fits; then it is set aside."""
        if self._max_usd is not None and self.total_usd + self._held + amount > self._max_usd:
            return False
        self._held += amount
        return True

    def release(self, amount: float) -> None:
        self._held = max(0.0, self._held - amount)

    def book(self, name: str, cost_usd: float | None) -> None:
        cost = cost_usd or 0.0
        self.by_name[name] += cost
        self.dearest[name] = max(self.dearest[name], cost)
