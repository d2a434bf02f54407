"""Where every label goes, whoever found it: to the store, and to those who learn from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from tandem_router.store.records import Label
from tandem_router.store.writer import Store


class Labels:
    """The labels of one router. on_label: each is called with every label that is added."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.on_label: list[Callable[[Label], None]] = []
        self.num_by_source: dict[str, int] = {}

    def add(self, label: Label) -> None:
        """Keep a label; nothing here waits. Raises ValueError for a number that none can be."""
        if not 0.0 < label.probability <= 1.0:
            raise ValueError(f"probability={label.probability} of a label must be in (0, 1]")
        for what, numbers in (("quality", label.quality), ("predicted", label.predicted)):
            _check(what, numbers)
        self._store.add_label(label)
        self.num_by_source[label.source] = self.num_by_source.get(label.source, 0) + 1
        for tell in self.on_label:
            tell(label)


def _check(what: str, numbers: Mapping[str, float]) -> None:
    for tier, number in numbers.items():
        if not (math.isfinite(number) and 0.0 <= number <= 1.0):
            raise ValueError(f"{what}={number} of tier {tier!r} must be a number from 0 to 1")
