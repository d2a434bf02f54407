"""The judged requests of one router as columns, so that an estimate over thousands is one pass.

One row per request of which two answers were judged; the oldest make room for new ones.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tandem_router.store.records import Label

Floats = NDArray[np.float64]
_FIRST_ROWS = 256


@dataclass(frozen=True, slots=True)
class Rows:
    """Some of them, two columns each: of the tier that is looked at, and of the dearest.

    weight, gold_weight: one over the probability. gold: NaN where there is none.
    """

    weight: Floats
    judged: Floats
    predicted: Floats
    gold: Floats
    gold_weight: Floats


class Labelled:
    """tiers: of which labels may tell. most: rows that are kept."""

    def __init__(self, tiers: tuple[str, ...], most: int) -> None:
        self._tiers = {name: place for place, name in enumerate(tiers)}
        self._tenants: dict[str, int] = {}
        self._most = most
        self._slots: OrderedDict[str, int] = OrderedDict()
        self._size = 0
        self._grow(min(_FIRST_ROWS, most))

    def _grow(self, size: int) -> None:
        num, old = len(self._tiers), self._size

        def longer(name: str, shape: tuple[int, ...], fill: float, kind: type) -> None:
            column: NDArray[Any] = np.full(shape, fill, dtype=kind)
            if old:
                column[:old] = getattr(self, name)
            setattr(self, name, column)

        for name in ("_judged", "_gold"):
            longer(name, (size, num), np.nan, float)
        longer("_predicted", (size, num), 0.0, float)
        for name in ("_weight", "_gold_weight"):
            longer(name, (size,), 1.0, float)
        longer("_at", (size,), 0.0, float)
        for name in ("_tier", "_tenant"):
            longer(name, (size,), -1, int)
        self._size = size

    def add_tiers(self, tiers: tuple[str, ...]) -> None:
        """Labels may tell of these too from now on; of tiers that are gone they are kept."""
        new = [name for name in tiers if name not in self._tiers]
        for name in new:
            self._tiers[name] = len(self._tiers)
        for column, none in (("_judged", np.nan), ("_gold", np.nan), ("_predicted", 0.0)):
            more = np.full((self._size, len(new)), none)
            setattr(self, column, np.hstack([getattr(self, column), more]))

    _judged: Floats
    _gold: Floats
    _predicted: Floats
    _weight: Floats
    _gold_weight: Floats
    _at: Floats
    _tier: NDArray[np.int64]
    _tenant: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._slots

    @property
    def num_checked(self) -> int:
        """Rows with a gold label of any tier."""
        return int(np.isfinite(self._gold[: len(self._slots)]).any(axis=1).sum())

    def add(self, label: Label) -> None:
        """A request's first label."""
        slot = len(self._slots)
        if slot == self._most:
            _, slot = self._slots.popitem(last=False)
        elif slot == self._size:
            self._grow(min(self._most, 2 * self._size))
        self._slots[label.request_id] = slot
        self._put(self._judged, slot, label.quality, np.nan)
        self._put(self._predicted, slot, label.predicted, 0.0)
        self._gold[slot] = np.nan
        self._weight[slot], self._gold_weight[slot] = 1.0 / label.probability, 1.0
        self._at[slot] = label.at
        self._tier[slot] = self._tiers.get(label.tier, -1)
        self._tenant[slot] = self._tenants.setdefault(label.tenant, len(self._tenants))

    def check(self, label: Label, probability: float) -> None:
        """A gold label of a request that is here; of being picked among those judged."""
        slot = self._slots[label.request_id]
        for tier, quality in label.quality.items():
            if (place := self._tiers.get(tier)) is not None:
                self._gold[slot, place] = quality
        self._gold_weight[slot] = 1.0 / probability

    def _put(self, column: Floats, slot: int, by_tier: Mapping[str, float], none: float) -> None:
        column[slot] = none
        for tier, number in by_tier.items():
            if (place := self._tiers.get(tier)) is not None:
                column[slot, place] = number

    def rows(
        self, tenant: str | None, tier: str | None, dearest: str, since: float = -math.inf
    ) -> Rows:
        """Of one tenant or of all; of one tier, or (None) of that which answered; after `since`."""
        num, last = len(self._slots), self._tiers[dearest]
        if tier is None:
            first = self._tier[:num]
        else:
            first = np.full(num, self._tiers.get(tier, -1))
        taken = (first >= 0) & (self._at[:num] > since)
        if tenant is not None:
            taken &= self._tenant[:num] == self._tenants.get(tenant, -1)
        rows = np.flatnonzero(taken)

        def pair(column: Floats, of: NDArray[np.int64]) -> Floats:
            return np.stack([column[of, first[of]], column[of, last]], axis=1)

        judged = pair(self._judged, rows)
        told = np.isfinite(judged).all(axis=1)
        rows, judged = rows[told], judged[told]
        gold = pair(self._gold, rows)
        # Half of a pair corrects nothing.
        gold[~np.isfinite(gold).all(axis=1)] = np.nan
        return Rows(
            self._weight[rows], judged, pair(self._predicted, rows), gold, self._gold_weight[rows]
        )

    def checked(self, tier: str, dearest: str) -> Rows:
        """Those with gold labels of both tiers; weight: of both draws."""
        rows = self.rows(None, tier, dearest)
        some = np.isfinite(rows.gold).all(axis=1)
        return Rows(
            rows.weight[some] * rows.gold_weight[some],
            rows.judged[some],
            rows.predicted[some],
            rows.gold[some],
            rows.gold_weight[some],
        )
