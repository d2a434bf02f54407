"""A store in PostgreSQL, which several routers share: asyncpg, two connections."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import asyncpg

from tandem_router.store import tables
from tandem_router.store.records import MOST_LABELS_READ, Batch, Key, Label, Spend, StoreError

CALL_TIMEOUT_S = 5.0


class PostgresStore:
    """url: `postgresql://user:password@host:port/database`; it is shown to nobody."""

    kind = "postgres"

    def __init__(self, url: str, *, max_decisions: int) -> None:
        self._url = url
        self._max_decisions = max_decisions
        self._pool: asyncpg.Pool | None = None

    async def open(self) -> None:
        async with self._connection() as db:
            await db.execute("SELECT 1")

    async def close(self) -> None:
        if self._pool is not None:
            pool, self._pool = self._pool, None
            pool.terminate()

    async def write(self, batch: Batch) -> None:
        async with self._connection() as db, db.transaction():
            noted = await db.execute(_sql(tables.NOTE_BATCH, 2), batch.writer, batch.sequence)
            if noted.endswith(" 0"):
                return  # it was written, and only the answer was lost
            # In one order everywhere, so that two routers never wait for each other's rows.
            spend = sorted(batch.spend, key=lambda row: (row.day, row.tenant, row.tier))
            await db.executemany(
                _sql(tables.ADD_SPEND, len(tables.SPEND_COLUMNS)),
                [_values(row, tables.SPEND_COLUMNS) for row in spend],
            )
            await db.executemany(
                _sql(tables.ADD_DECISION, 3),
                [(d["request_id"], d["time"], json.dumps(d)) for d in batch.decisions],
            )
            await db.executemany(
                _sql(tables.ADD_LABEL, len(tables.LABEL_COLUMNS)),
                [tables.label_values(label) for label in batch.labels],
            )
            if batch.decisions:
                await db.execute(
                    "DELETE FROM decisions WHERE time < (SELECT time FROM decisions "
                    "ORDER BY time DESC LIMIT 1 OFFSET $1)",
                    self._max_decisions,
                )

    async def spend(self, since_day: str = "") -> Sequence[Spend]:
        sql = tables.select("spend", tables.SPEND_COLUMNS) + " WHERE day >= $1 ORDER BY day"
        return [Spend(*row) for row in await self._rows(sql, since_day)]

    async def decisions(self, limit: int, before: float | None = None) -> list[dict[str, Any]]:
        sql = "SELECT body FROM decisions WHERE time < $1 ORDER BY time DESC LIMIT $2"
        rows = await self._rows(sql, before if before is not None else 1e18, limit)
        return [json.loads(row[0]) for row in rows]

    async def decision(self, request_id: str) -> dict[str, Any] | None:
        rows = await self._rows("SELECT body FROM decisions WHERE request_id = $1", request_id)
        return json.loads(rows[0][0]) if rows else None

    async def labels(self, since: float = 0.0, limit: int = MOST_LABELS_READ) -> Sequence[Label]:
        sql = tables.select("quality_labels", tables.LABEL_COLUMNS)
        rows = await self._rows(f"{sql} WHERE at >= $1 ORDER BY at LIMIT $2", since, limit)
        return [tables.label_of(row) for row in rows]

    async def forget_labels(self, before: float, captured_before: float) -> int:
        async with self._connection() as db, db.transaction():
            gone = await db.execute(_sql(tables.FORGET_LABELS, 1), before)
            emptied = await db.execute(_sql(tables.FORGET_CAPTURED, 1), captured_before)
        return sum(int(said.split()[-1]) for said in (gone, emptied))

    async def keys(self) -> Sequence[Key]:
        sql = tables.select("keys", tables.KEY_COLUMNS) + " ORDER BY created"
        return [Key(*row) for row in await self._rows(sql)]

    async def put_key(self, key: Key) -> None:
        async with self._connection() as db:
            await db.execute(
                _sql(tables.PUT_KEY, len(tables.KEY_COLUMNS)), *_values(key, tables.KEY_COLUMNS)
            )

    async def secret(self, proposed: str) -> str:
        async with self._connection() as db:
            await db.execute(_sql(tables.KEEP_META, 2), "key_secret", proposed)
            return str(await db.fetchval("SELECT value FROM meta WHERE name = 'key_secret'"))

    async def keep(self, name: str, body: bytes | None) -> None:
        async with self._connection() as db:
            if body is None:
                await db.execute(_sql(tables.DROP_KEPT, 1), name)
            else:
                await db.execute(_sql(tables.KEEP, 2), name, body)

    async def kept(self, name: str) -> bytes | None:
        rows = await self._rows(_sql(tables.KEPT, 1), name)
        return bytes(rows[0][0]) if rows else None

    async def kept_names(self, prefix: str) -> list[str]:
        rows = await self._rows("SELECT name FROM kept")
        return [row[0] for row in rows if row[0].startswith(prefix)]

    async def claim(self, name: str, holder: str, for_s: float) -> bool:
        now = "extract(epoch from clock_timestamp())"
        sql = tables.CLAIM.format(values=f"$1, $2, {now} + $3", now=now)
        async with self._connection() as db:
            said: str = await db.execute(sql, name, holder, for_s)
        return not said.endswith(" 0")

    async def lease(
        self, bucket: str, want: float, per_s: float, capacity: float, owed: float = 0.0
    ) -> float:
        async with self._connection() as db, db.transaction():
            await db.execute(
                "INSERT INTO buckets (name, level, at) VALUES "
                "($1, $2, extract(epoch from clock_timestamp())) ON CONFLICT (name) DO NOTHING",
                bucket,
                capacity,
            )
            row = await db.fetchrow(
                "SELECT level, extract(epoch from clock_timestamp())::float8 - at FROM buckets "
                "WHERE name = $1 FOR UPDATE",
                bucket,
            )
            level, elapsed = float(row[0]), max(0.0, float(row[1]))
            level = min(capacity, level + elapsed * per_s)
            moved = tables.leased(level, want, owed)
            await db.execute(
                "UPDATE buckets SET level = $2, at = at + $3 WHERE name = $1",
                bucket,
                min(capacity, level - moved),
                elapsed,
            )
            return moved

    async def _rows(self, sql: str, *values: Any) -> list[Any]:
        async with self._connection() as db:
            rows: list[Any] = await db.fetch(sql, *values)
            return rows

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[Any]:
        try:
            if self._pool is None:
                self._pool = await self._connect()
            async with asyncio.timeout(CALL_TIMEOUT_S), self._pool.acquire() as db:
                yield db
        except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError) as error:
            await self.close()
            raise StoreError(f"PostgreSQL: {type(error).__name__}: {error}") from error
        except ValueError as error:
            raise StoreError("PostgreSQL: the URL cannot be used") from error

    async def _connect(self) -> asyncpg.Pool:
        pool = await asyncpg.create_pool(
            self._url,
            min_size=1,
            max_size=2,
            timeout=CALL_TIMEOUT_S,
            command_timeout=CALL_TIMEOUT_S,
        )
        try:
            async with pool.acquire() as db, db.transaction():
                # Routers that start together make the tables one after the other.
                await db.execute("SELECT pg_advisory_xact_lock(7461756)")
                for statement in tables.TABLES:
                    await db.execute(statement)
                version = str(tables.VERSION)
                await db.execute(_sql(tables.KEEP_META, 2), "version", version)
                found = await db.fetchval("SELECT value FROM meta WHERE name = 'version'")
            if found != version:
                raise StoreError(f"PostgreSQL: has version {found}; this router writes {version}")
        except BaseException:
            pool.terminate()
            raise
        return pool


def _sql(statement: str, num_values: int) -> str:
    return statement.format(values=", ".join(f"${i + 1}" for i in range(num_values)))


def _values(row: Any, columns: tuple[str, ...]) -> tuple[Any, ...]:
    return tuple(getattr(row, name) for name in columns)
