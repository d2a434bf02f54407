"""A store in one SQLite file, for one router: every call runs on a thread of its own."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from tandem_router.store import tables
from tandem_router.store.records import MOST_LABELS_READ, Batch, Key, Label, Spend, StoreError

T = TypeVar("T")


class SqliteStore:
    """busy_s: how long another process may hold the file before a call gives up."""

    kind = "sqlite"

    def __init__(self, path: Path, *, max_decisions: int, busy_s: float = 2.0) -> None:
        self._path = path
        self._max_decisions = max_decisions
        self._busy_s = busy_s
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="store")
        self._db: sqlite3.Connection | None = None

    async def open(self) -> None:
        await self._run(lambda db: None)

    async def close(self) -> None:
        def close() -> None:
            if self._db is not None:
                self._db.close()
                self._db = None

        await asyncio.get_running_loop().run_in_executor(self._thread, close)
        self._thread.shutdown(wait=False)

    async def write(self, batch: Batch) -> None:
        def write(db: sqlite3.Connection) -> None:
            noted = db.execute(_sql(tables.NOTE_BATCH, 2), (batch.writer, batch.sequence))
            if noted.rowcount == 0:
                return  # it was written, and only the answer was lost
            db.executemany(
                _sql(tables.ADD_SPEND, len(tables.SPEND_COLUMNS)),
                [_values(row, tables.SPEND_COLUMNS) for row in batch.spend],
            )
            db.executemany(
                _sql(tables.ADD_DECISION, 3),
                [(d["request_id"], d["time"], json.dumps(d)) for d in batch.decisions],
            )
            db.executemany(
                _sql(tables.ADD_LABEL, len(tables.LABEL_COLUMNS)),
                [tables.label_values(label) for label in batch.labels],
            )
            if batch.decisions:
                db.execute(
                    "DELETE FROM decisions WHERE time < (SELECT time FROM decisions "
                    "ORDER BY time DESC LIMIT 1 OFFSET ?)",
                    (self._max_decisions,),
                )

        await self._run(write)

    async def spend(self, since_day: str = "") -> Sequence[Spend]:
        sql = tables.select("spend", tables.SPEND_COLUMNS) + " WHERE day >= ? ORDER BY day"
        return [Spend(*row) for row in await self._rows(sql, (since_day,))]

    async def decisions(self, limit: int, before: float | None = None) -> list[dict[str, Any]]:
        sql = "SELECT body FROM decisions WHERE time < ? ORDER BY time DESC LIMIT ?"
        rows = await self._rows(sql, (before if before is not None else 1e18, limit))
        return [json.loads(body) for (body,) in rows]

    async def decision(self, request_id: str) -> dict[str, Any] | None:
        sql = "SELECT body FROM decisions WHERE request_id = ?"
        rows = await self._rows(sql, (request_id,))
        return json.loads(rows[0][0]) if rows else None

    async def labels(self, since: float = 0.0, limit: int = MOST_LABELS_READ) -> Sequence[Label]:
        sql = tables.select("quality_labels", tables.LABEL_COLUMNS)
        rows = await self._rows(f"{sql} WHERE at >= ? ORDER BY at LIMIT ?", (since, limit))
        return [tables.label_of(row) for row in rows]

    async def forget_labels(self, before: float, captured_before: float) -> int:
        def forget(db: sqlite3.Connection) -> int:
            gone = db.execute(_sql(tables.FORGET_LABELS, 1), (before,))
            emptied = db.execute(_sql(tables.FORGET_CAPTURED, 1), (captured_before,))
            return gone.rowcount + emptied.rowcount

        return await self._run(forget)

    async def keys(self) -> Sequence[Key]:
        sql = tables.select("keys", tables.KEY_COLUMNS) + " ORDER BY created"
        return [Key(*row) for row in await self._rows(sql, ())]

    async def put_key(self, key: Key) -> None:
        sql = _sql(tables.PUT_KEY, len(tables.KEY_COLUMNS))
        await self._run(lambda db: db.execute(sql, _values(key, tables.KEY_COLUMNS)))

    async def secret(self, proposed: str) -> str:
        def keep(db: sqlite3.Connection) -> str:
            db.execute(_sql(tables.KEEP_META, 2), ("key_secret", proposed))
            row = db.execute("SELECT value FROM meta WHERE name = 'key_secret'").fetchone()
            return str(row[0])

        return await self._run(keep)

    async def keep(self, name: str, body: bytes | None) -> None:
        if body is None:
            await self._run(lambda db: db.execute(_sql(tables.DROP_KEPT, 1), (name,)))
        else:
            await self._run(lambda db: db.execute(_sql(tables.KEEP, 2), (name, body)))

    async def kept(self, name: str) -> bytes | None:
        rows = await self._rows(_sql(tables.KEPT, 1), (name,))
        return bytes(rows[0][0]) if rows else None

    async def kept_names(self, prefix: str) -> list[str]:
        rows = await self._rows("SELECT name FROM kept", ())
        return [name for (name,) in rows if name.startswith(prefix)]

    async def claim(self, name: str, holder: str, for_s: float) -> bool:
        now = time.time()
        sql = tables.CLAIM.format(values="?, ?, ?", now="?")
        values = (name, holder, now + for_s, now)
        return await self._run(lambda db: db.execute(sql, values).rowcount > 0)

    async def lease(
        self, bucket: str, want: float, per_s: float, capacity: float, owed: float = 0.0
    ) -> float:
        def lease(db: sqlite3.Connection) -> float:
            db.execute("BEGIN IMMEDIATE")  # nobody else between reading and writing
            now = time.time()
            row = db.execute("SELECT level, at FROM buckets WHERE name = ?", (bucket,)).fetchone()
            level, at = row if row is not None else (capacity, now)
            level = min(capacity, level + max(0.0, now - at) * per_s)
            moved = tables.leased(level, want, owed)
            db.execute(
                "INSERT INTO buckets (name, level, at) VALUES (?, ?, ?) ON CONFLICT (name) "
                "DO UPDATE SET level = excluded.level, at = excluded.at",
                (bucket, min(capacity, level - moved), now),
            )
            return moved

        return await self._run(lease)

    async def _rows(self, sql: str, values: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        return await self._run(lambda db: db.execute(sql, values).fetchall())

    async def _run(self, call: Callable[[sqlite3.Connection], T]) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._in_transaction, call)

    def _in_transaction(self, call: Callable[[sqlite3.Connection], T]) -> T:
        """On the store's thread: one transaction, or StoreError and nothing changed."""
        try:
            if self._db is None:
                self._db = self._connect()
            with self._db:
                return call(self._db)
        except (sqlite3.Error, OSError) as error:
            if self._db is not None and not isinstance(error, sqlite3.OperationalError):
                self._db.close()
                self._db = None
            raise StoreError(f"{self._path}: {error}") from error

    def _connect(self) -> sqlite3.Connection:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        db = sqlite3.connect(self._path, timeout=self._busy_s, check_same_thread=False)
        try:
            # Written ahead and synced at checkpoints: a killed process loses nothing, a machine
            # without power at most the last batches.
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = NORMAL")
            with db:
                for statement in tables.TABLES:
                    db.execute(statement)
                version = str(tables.VERSION)
                db.execute(_sql(tables.KEEP_META, 2), ("version", version))
                found = db.execute("SELECT value FROM meta WHERE name = 'version'").fetchone()[0]
            if found != version:
                raise sqlite3.DatabaseError(f"has version {found}; this router writes {version}")
        except BaseException:
            db.close()
            raise
        return db


def _sql(statement: str, num_values: int) -> str:
    return statement.format(values=", ".join("?" * num_values))


def _values(row: Any, columns: tuple[str, ...]) -> tuple[Any, ...]:
    return tuple(getattr(row, name) for name in columns)
