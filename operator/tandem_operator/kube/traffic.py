"""What Routers measured, asked so rarely that showing it costs less than a write a second in all.

Measured shares and latencies differ a little at every look, and each difference is a status write.
So each Router has its own moment in a period that is longer the more Routers there are.
"""

from __future__ import annotations

import zlib
from collections.abc import Awaitable, Callable

from tandem_operator.plan.objects import ROUTER_LABEL, Object
from tandem_operator.plan.pods import is_ready
from tandem_operator.plan.router_facts import TrafficFacts
from tandem_operator.reconcile.requeue import SETTLE_S

# Seconds between two looks, over all Routers.
BETWEEN_LOOKS_S = 1.5


class SampledTraffic:
    """Keeps a Router's last answer until its moment comes or its ready pods change.

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
        self._due: dict[tuple[str, str], float] = {}
        self._known: dict[tuple[str, str], tuple[float, frozenset[str], TrafficFacts | None]] = {}

    def ask_again(self, namespace: str, name: str) -> None:
        """Measure a Router again after SETTLE_S, whenever its moment is."""
        self._due[namespace, name] = self._clock() + SETTLE_S

    async def __call__(self, pods: list[Object]) -> TrafficFacts | None:
        """The facts of the Router whose pods these are; None while none is ready."""
        ready = frozenset(p["metadata"]["uid"] for p in pods if is_ready(p))
        if not ready:
            return None
        metadata = pods[0]["metadata"]
        router = (metadata["namespace"], metadata["labels"][ROUTER_LABEL])
        now = self._clock()
        period = max(self._least_s, BETWEEN_LOOKS_S * len(self._known))
        due = self._due.get(router)
        if due is not None and now >= due:
            del self._due[router]
        elif known := self._known.get(router):
            asked, of, facts = known
            phase = period * zlib.crc32("/".join(router).encode()) / 2**32
            if of == ready and (asked + phase) // period == (now + phase) // period:
                return facts
        facts = await self._ask(pods)
        self._known[router] = (now, ready, facts)
        gone = [r for r, (asked, _, _) in self._known.items() if now - asked > 3 * period]
        for router in gone:
            del self._known[router]
            self._due.pop(router, None)
        return facts
