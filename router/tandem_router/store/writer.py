"""Batches what a router has to keep, and writes it while requests go on.

A request adds plain values to lists; a task writes them every `flush_s`. A store that is full,
locked or away slows and fails nobody: spend is added up meanwhile (it loses nothing), decisions and
labels wait in bounded queues that drop their oldest, and status says so. A process that is killed
loses at most what was added since the last batch.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass, replace
from typing import Any

from tandem_router.store.records import (
    MOST_LABELS_READ,
    Backend,
    Batch,
    Key,
    Label,
    Spend,
    StoreError,
)

logger = logging.getLogger("tandem.router")

MOST_WAITING = 20_000
MOST_IN_A_BATCH = 200  # a few milliseconds of work between which requests go on
LONGEST_PAUSE_S = 10.0


@dataclass
class Health:
    """How the store does. since: Unix time from which it has been as it is."""

    kind: str
    durable: bool
    ok: bool = False
    error: str | None = "it has not answered yet"
    since: float = 0.0
    num_waiting: int = 0
    num_dropped: int = 0
    num_batches: int = 0


class Store:
    """The store of one router. backend: None keeps nothing beyond the process.

    on_keys: called with all keys whenever they may have changed. on_open: called once, when the
    store answers first, with what it knew before. on_flush: awaited at each step that the store
    answers; on_trouble: called at each that it does not; on_close: awaited before it is closed.
    before_read: called before spend is read or written, for who has not told it all yet.
    """

    def __init__(
        self,
        backend: Backend | None,
        *,
        wall_clock: Callable[[], float],
        flush_s: float = 0.5,
        keys_s: float = 2.0,
    ) -> None:
        self._backend = backend
        self._wall_clock = wall_clock
        self._flush_s = flush_s
        self.keys_s = keys_s
        self._writer = secrets.token_hex(8)
        self._sequence = 0
        self._spend: dict[tuple[str, str, str], Spend] = {}
        self._decisions: deque[Callable[[], Mapping[str, Any]]] = deque(maxlen=MOST_WAITING)
        self._labels: deque[Label] = deque(maxlen=MOST_WAITING)
        self._unwritten: Batch | None = None
        self._one_at_a_time = asyncio.Lock()  # a batch is written, or what is kept is read
        self._keys_at = 0.0
        self.keys: dict[str, Key] = {}
        self.secret: str | None = None
        self.on_keys: Callable[[], None] = lambda: None
        self.on_open: Callable[[list[Spend]], None] = lambda spend: None
        self.on_trouble: Callable[[], None] = lambda: None
        self.on_close: Callable[[Backend], Awaitable[None]] | None = None
        self.on_flush: Callable[[Backend], Awaitable[None]] | None = None
        self.before_read: Callable[[], None] = lambda: None
        self._known = False
        self.health = Health(
            backend.kind if backend is not None else "memory", durable=backend is not None
        )
        if backend is None:
            self.health.ok, self.health.error = True, None
            self.secret = secrets.token_hex(32)

    # -- what requests do: nothing here waits ------------------------------------------------

    def add_spend(self, spend: Spend) -> None:
        key = (spend.day, spend.tenant, spend.tier)
        known = self._spend.get(key)
        self._spend[key] = spend if known is None else known.plus(spend)

    def add_decision(self, decision: Callable[[], Mapping[str, Any]]) -> None:
        """`decision` is called when a batch is made, away from the request."""
        if self._backend is not None:
            self.health.num_dropped += len(self._decisions) == MOST_WAITING
            self._decisions.append(decision)

    def add_label(self, label: Label) -> None:
        """Without a backend the last labels are kept here, and gone with the process."""
        if self._backend is not None:
            self.health.num_dropped += len(self._labels) == MOST_WAITING
        self._labels.append(label)

    # -- what people ask ---------------------------------------------------------------------

    @property
    def backend(self) -> Backend | None:
        return self._backend

    async def put_key(self, key: Key) -> None:
        """In force here at once, elsewhere within seconds. Raises StoreError: then nowhere."""
        if self._backend is not None:
            await self._backend.put_key(key)
        self.keys[key.id] = key
        self.on_keys()

    async def spend(self, since_day: str = "") -> list[Spend]:
        """By day, tenant and tier: what is kept, and what waits to be. Raises StoreError."""
        kept: Sequence[Spend] = ()
        if self._backend is not None:
            async with self._one_at_a_time:  # or what is written meanwhile counts twice
                kept = await self._backend.spend(since_day)
        self.before_read()
        rows = {key: copy(row) for key, row in self._spend.items() if row.day >= since_day}
        waiting = self._unwritten.spend if self._unwritten is not None else []
        for row in (*kept, *waiting):
            key = (row.day, row.tenant, row.tier)
            rows[key] = row.plus(rows[key]) if key in rows else row
        return sorted(rows.values(), key=lambda row: (row.day, row.tenant, row.tier))

    async def labels(self, since: float = 0.0, limit: int = MOST_LABELS_READ) -> list[Label]:
        """Oldest first: what is kept, and what waits to be. Raises StoreError."""
        kept: Sequence[Label] = ()
        if self._backend is not None:
            async with self._one_at_a_time:
                kept = await self._backend.labels(since, limit)
        waiting = self._unwritten.labels if self._unwritten is not None else []
        rows = {
            (label.request_id, label.source): label
            for label in (*kept, *waiting, *self._labels)
            if label.at >= since
        }
        return sorted(rows.values(), key=lambda label: label.at)[:limit]

    async def forget_labels(self, before: float, captured_before: float) -> int:
        """Delete old labels, and old prompts and features before them. Raises StoreError."""
        if self._backend is not None:
            return await self._backend.forget_labels(before, captured_before)
        kept = [label for label in self._labels if label.at >= before]
        num_changed = len(self._labels) - len(kept)
        self._labels.clear()
        for label in kept:
            if label.at < captured_before and (label.features, label.prompt) != (None, None):
                label, num_changed = replace(label, features=None, prompt=None), num_changed + 1
            self._labels.append(label)
        return num_changed

    # -- the task ----------------------------------------------------------------------------

    async def run(self) -> None:
        """Write batches until cancelled, and what is left then."""
        pause_s = 0.0
        try:
            while self._backend is not None:
                await asyncio.sleep(pause_s)
                ok = await self.step()
                pause_s = self._flush_s if ok else min(LONGEST_PAUSE_S, max(0.5, 2 * pause_s))
        finally:
            if self._backend is not None:
                if await self.step() and self.on_close is not None:
                    with contextlib.suppress(StoreError):
                        await self.on_close(self._backend)
                await self._backend.close()

    async def step(self) -> bool:
        """One batch and a look at the keys; whether the store answered. Never raises."""
        backend = self._backend
        if backend is None:
            return True
        now = self._wall_clock()
        try:
            if not self._known:
                await backend.open()
                before = list(await backend.spend())
                self.secret = await backend.secret(secrets.token_hex(32))
                await self._read_keys(backend)
                self._known = True
                self.on_open(before)
            while (batch := self._next_batch()) is not None:
                async with self._one_at_a_time:
                    await backend.write(batch)
                    self._unwritten = None
                self.health.num_batches += 1
            if now - self._keys_at >= self.keys_s:
                await self._read_keys(backend)
            if self.on_flush is not None:
                await self.on_flush(backend)
        except StoreError as error:
            self._say(False, str(error), now)
            return False
        except Exception as error:
            logger.exception("the store failed")
            self._say(False, f"{type(error).__name__}: {error}", now)
            return False
        self._say(True, None, now)
        return True

    async def _read_keys(self, backend: Backend) -> None:
        self._keys_at = self._wall_clock()
        found = {key.id: key for key in await backend.keys()}
        if found != self.keys:
            self.keys = found
            self.on_keys()

    def _next_batch(self) -> Batch | None:
        """The batch that could not be written yet, else a new one of what came since."""
        if self._unwritten is not None:
            return self._unwritten
        self.before_read()
        batch = Batch(self._writer, self._sequence + 1, spend=list(self._spend.values()))
        while self._decisions and len(batch.decisions) < MOST_IN_A_BATCH:
            batch.decisions.append(self._decisions.popleft()())
        while self._labels and len(batch.labels) < MOST_IN_A_BATCH:
            batch.labels.append(self._labels.popleft())
        if not batch:
            return None
        self._sequence += 1
        self._spend.clear()
        self._unwritten = batch
        return batch

    def _say(self, ok: bool, error: str | None, now: float) -> None:
        if not ok:
            self.on_trouble()
        health = self.health
        unwritten = self._unwritten
        health.num_waiting = len(self._decisions) + len(self._labels) + len(self._spend)
        if unwritten is not None:
            health.num_waiting += (
                len(unwritten.spend) + len(unwritten.decisions) + len(unwritten.labels)
            )
        if ok != health.ok or health.since == 0.0:
            health.since = now
            if not ok:
                logger.error("the store does not take what is written: %s", error)
            elif health.error is not None:
                logger.info("the store answers")
        health.ok, health.error = ok, error

    def state(self) -> dict[str, Any]:
        return asdict(self.health)
