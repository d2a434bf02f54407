"""Which answered requests another tier answers too, and with which probability that was.

A request is drawn with the share that the Router says. While a tier cannot take shadow requests
(its SLO slack is negative, the day's money is spent, the judge is away), none is drawn for it, and
the share of recent requests at which it could is part of the probability: had the request come at
another time, it might have been drawn. That is right as far as such times say nothing about the
requests themselves. Pure: clock and randomness are passed in.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

from tandem_router.control import ShadowSampler

WINDOW = 1_000
#: Why a tier is closed is looked at this often.
LOOK_S = 1.0
#: Below it labels would weigh so much that a handful of them decides.
LEAST_OPEN_SHARE = 0.05


@dataclass(frozen=True, slots=True)
class Draw:
    """Ask `tier` too. share: of the draw alone; probability: with the times at which none are.

    beside: a further tier to ask, where neither the answer nor `tier` is the one compared with.
    """

    tier: str
    share: float
    probability: float
    beside: str | None = None


@dataclass(frozen=True, slots=True)
class Explored:
    """A tier of which little is known, and the share of requests that look at it until then.

    by_dearest: whether only the dearest tier's answer says how good one is.
    """

    tier: str
    share: float
    by_dearest: bool = True


class ShadowGate:
    """closed: why a tier takes no shadow request now, None where it does.

    It is told whether that is to know a tier of which little is known.
    """

    def __init__(self, share: float, closed: Callable[[str, bool], str | None]) -> None:
        self._closed = closed
        self.set_share(share)
        self._open: dict[str, deque[bool]] = {}
        self._num_open: Counter[str] = Counter()
        self._looked: dict[tuple[str, bool], tuple[float, str | None]] = {}
        self.skipped: Counter[str] = Counter()

    def set_share(self, share: float) -> None:
        self._sampler = ShadowSampler(share, share)
        self.share = share

    def open_share(self, tier: str) -> float:
        """The share of recent requests at which the tier took shadow requests."""
        seen = self._open.get(tier)
        return (1 + self._num_open[tier]) / (1 + len(seen)) if seen else 1.0

    def _reason(self, tier: str, exploring: bool, now: float) -> str | None:
        """Why a tier is closed, as of a moment ago."""
        looked = self._looked.get((tier, exploring))
        if looked is None or not 0.0 <= now - looked[0] < LOOK_S:
            looked = self._looked[tier, exploring] = (now, self._closed(tier, exploring))
        return looked[1]

    def look_again(self) -> None:
        """What closed a tier may have changed."""
        self._looked.clear()

    def draw(
        self,
        now: float,
        uniform: float,
        chosen: str,
        cheapest: str,
        dearest: str,
        full: bool,
        explored: Explored | None = None,
    ) -> Draw | None:
        """Decide for one answered request; full: too many shadow requests are under way.

        explored: a tier to be looked at more often, whoever answered.
        """
        plan = self._sampler.draw(0.0, chosen, cheapest, dearest)
        if plan is None:
            return None
        tier, wanted, beside = plan.tier, plan.probability, None
        if explored is not None:
            wanted = max(wanted, explored.share)
            tier = dearest if chosen == explored.tier else explored.tier
            if explored.by_dearest and dearest not in (chosen, tier):
                beside = dearest
        exploring = explored is not None
        why = "too many under way" if full else self._reason(tier, exploring, now)
        if why is None and beside is not None:
            why = self._reason(beside, exploring, now)
        self._saw(tier, why is None)
        if why is not None:
            self.skipped[why] += 1
            return None
        share = self.open_share(tier)
        if share < LEAST_OPEN_SHARE or not uniform < wanted:
            return None
        return Draw(tier, wanted, wanted * share, beside)

    def _saw(self, tier: str, is_open: bool) -> None:
        seen = self._open.setdefault(tier, deque())
        seen.append(is_open)
        self._num_open[tier] += is_open
        if len(seen) > WINDOW:
            self._num_open[tier] -= seen.popleft()
