"""Conditions of a status: collected in order, each with the time of its last change."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tandem_operator.resources.base import Object

MAX_MESSAGE = 1024


def condition(
    old: Iterable[Mapping[str, Any]],
    kind: str,
    status: str,
    reason: str,
    message: str,
    *,
    generation: int,
    now: str,
) -> Object:
    """A condition; its transition time is kept while its status stays."""
    before = next((c for c in old if c.get("type") == kind), None)
    changed = before is None or before.get("status") != status
    return {
        "type": kind,
        "status": status,
        "reason": reason,
        "message": message[:MAX_MESSAGE],
        "lastTransitionTime": now if changed or before is None else before["lastTransitionTime"],
        "observedGeneration": generation,
    }


class Conditions:
    """Collects conditions in order."""

    def __init__(self, old: Iterable[Mapping[str, Any]], generation: int, now: str) -> None:
        self._old, self._generation, self._now = list(old), generation, now
        self.items: list[Object] = []

    def add(self, kind: str, ok: bool | None, reason: str, message: str = "") -> None:
        """One more; ok None is Unknown."""
        status = "Unknown" if ok is None else "True" if ok else "False"
        self.items.append(
            condition(
                self._old,
                kind,
                status,
                reason,
                message,
                generation=self._generation,
                now=self._now,
            )
        )
