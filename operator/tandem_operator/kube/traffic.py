"""What Routers measured, asked so rarely that showing it costs less than a write a second in all.

Measured shares and latencies differ a little at every look, and each difference is a status write.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from tandem_operator.plan.objects import ROUTER_LABEL, Object
from tandem_operator.plan.status import TrafficFacts, is_ready

# Seconds between two looks at one Router, for each Router there is.
PERIOD_PER_ROUTER_S = 1.2


class SampledTraffic:
    """Keeps a Router's last answer until it is time to ask again, or its ready pods change.

    ask: measures now. least_s: time between two looks when Routers are few. clock: in seconds.
    """

    def __init__(
        self,
        ask: Callable[[list[Object]], Awaitable[TrafficFacts | None]],
        least_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._ask = ask
        self._least_s = least_s
        self._clock = clock
        self._known: dict[tuple[str, str], tuple[float, frozenset[str], TrafficFacts | None]] = {}

    async def __call__(self, pods: list[Object]) -> TrafficFacts | None:
        """The facts of the Router whose pods these are; None while none is ready."""
        ready = frozenset(p["metadata"]["uid"] for p in pods if is_ready(p))
        if not ready:
            return None
        metadata = pods[0]["metadata"]
        router = (metadata["namespace"], metadata["labels"][ROUTER_LABEL])
        now = self._clock()
        period = self._period()
        if (known := self._known.get(router)) and known[1] == ready and now - known[0] < period:
            return known[2]
        facts = await self._ask(pods)
        self._known[router] = (now, ready, facts)
        gone = [r for r, (when, _, _) in self._known.items() if now - when > 3 * period]
        for router in gone:
            del self._known[router]
        return facts

    def _period(self) -> float:
        return max(self._least_s, PERIOD_PER_ROUTER_S * len(self._known))
