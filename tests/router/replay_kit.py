"""A router's run as it was recorded: what its picker was asked and told, and the same replayed."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

from tandem_router.api.app import RouterApp
from tandem_router.balancing.endpoint_picker import Pick, Picker
from tandem_router.balancing.worker import Worker
from tandem_router.config import PickingConfig

TOLD = ("first_token", "finished", "answered_well", "outcome", "observed", "failed", "answered")


class Journal:
    """All that is asked of and told to a picker, in order, by name instead of object."""

    def __init__(self, picker: Picker, clock: Callable[[], float]) -> None:
        self.entries: list[tuple[Any, ...]] = []
        self._picks: dict[int, int] = {}
        self._kept: list[Pick] = []  # so that no two have one id
        self._clock = clock
        self._inside = False
        self._reported = asyncio.Event()
        for name in ("pick", *TOLD):
            setattr(picker, name, self._wrapped(name, getattr(picker, name)))

    def _wrapped(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            if self._inside:  # one method of the picker calls another
                return method(*args, **named)
            self._inside = True
            try:
                now, told = self._clock(), tuple(map(self._named, args))
                found = method(*args, **named)
            finally:
                self._inside = False
            self.entries.append((now, name, told, named, self._result(found)))
            if name == "observed":
                self._reported.set()
            return found

        return call

    async def next_report(self) -> None:
        """Until another load report has come."""
        self._reported.clear()
        await self._reported.wait()

    def _named(self, value: Any) -> Any:
        if isinstance(value, Worker):
            return ("worker", value.tier, value.url)
        if isinstance(value, Pick):
            return ("pick", self._picks[id(value)])
        return value

    def _result(self, found: Any) -> Any:
        if not isinstance(found, Pick):
            return None
        self._picks[id(found)] = len(self._kept)
        self._kept.append(found)
        return urls(found)


def urls(pick: Pick) -> tuple[str, str | None]:
    return pick.decode.url, None if pick.prefill is None else pick.prefill.url


def replayed(
    journal: Journal, table: Any, config: PickingConfig, seed: int
) -> list[tuple[Any, Any]]:
    """(then, now) of each choice, by a new picker of the same seed."""
    clock = [0.0]
    picker = Picker(config, random.Random(seed), lambda: clock[0])
    picker.set_table(table)
    picks: list[Pick] = []

    def meant(value: Any) -> Any:
        if isinstance(value, tuple) and value[:1] == ("worker",):
            return picker.worker(value[1], value[2])
        if isinstance(value, tuple) and value[:1] == ("pick",):
            return picks[value[1]]
        return value

    found = []
    for now, name, args, named, result in journal.entries:
        clock[0] = now
        made = getattr(picker, name)(*map(meant, args), **named)
        if name == "pick":
            picks.append(made)
            found.append((result, urls(made)))
    return found


def decisions(app: RouterApp) -> list[Any]:
    """The run's records, first one first."""
    return sorted(app.services.decisions.records(), key=lambda record: record.sequence)
