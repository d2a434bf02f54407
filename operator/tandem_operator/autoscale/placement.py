"""Workers that no node takes: how long they are waited for, and when they are asked for again."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from tandem_operator.autoscale.sizing import PoolSpec, Role

# Workers that find no node for so long are given up, and not asked for again for a while.
WITHDRAW_AFTER_S = 60.0
NOT_AGAIN_S = 600.0


@dataclass(frozen=True, slots=True)
class Unplaced:
    """Workers of a pool that the scheduler cannot place."""

    count: int
    why: str


@dataclass(slots=True)
class _Stuck:
    """A pool with workers that find no node."""

    since_s: float
    until_s: float = -math.inf  # not asked for again before
    most: int = 0
    why: str = ""


class Placement:
    """The memory of what could not be placed: the money and the threshold are wanted elsewhere."""

    def __init__(self) -> None:
        self._pools: dict[tuple[str, Role], _Stuck] = {}

    def observe(
        self,
        now: float,
        pools: Iterable[PoolSpec],
        unplaced: Mapping[tuple[str, Role], Unplaced],
        current: Mapping[tuple[str, Role], int],
    ) -> None:
        """Take a reading; current: workers that are asked for now."""
        for pool in pools:
            waiting = unplaced.get(pool.key)
            known = self._pools.get(pool.key)
            if waiting is None or waiting.count < 1:
                if known is not None and now >= known.until_s:
                    del self._pools[pool.key]
                continue
            known = self._pools.setdefault(pool.key, _Stuck(now))
            if now >= known.until_s and now - known.since_s >= WITHDRAW_AFTER_S:
                known.until_s = now + NOT_AGAIN_S
                known.most = max(pool.minimum, current[pool.key] - waiting.count)
                known.why = waiting.why

    def bounded(self, now: float, pool: PoolSpec) -> PoolSpec:
        """The pool with what can be placed as its maximum."""
        stuck = self._given_up(now, pool.key)
        if stuck is None:
            return pool
        return replace(pool, maximum=max(1, min(pool.maximum, stuck.most)))

    def stuck(self, now: float) -> set[tuple[str, Role]]:
        """Pools that cannot grow now."""
        return {key for key in self._pools if self._given_up(now, key) is not None}

    def why(self, now: float, key: tuple[str, Role]) -> str | None:
        """The scheduler's words for a pool that cannot grow now."""
        stuck = self._given_up(now, key)
        return None if stuck is None else stuck.why

    def _given_up(self, now: float, key: tuple[str, Role]) -> _Stuck | None:
        found = self._pools.get(key)
        return found if found is not None and now < found.until_s else None
