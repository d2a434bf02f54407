"""A store keeps spend, decisions, keys and labels exactly, and never gets in a request's way."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from clock import Clock
from postgres_server import Server, running
from tandem_router.store.postgres import PostgresStore
from tandem_router.store.records import Backend, Batch, Key, Label, Spend, StoreError
from tandem_router.store.sqlite import SqliteStore
from tandem_router.store.writer import MOST_WAITING, Store


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    # Below /tmp itself: the server's user may not enter the folders that pytest makes for root.
    folder = Path(tempfile.mkdtemp(prefix="tandem-postgres-"))
    folder.chmod(0o755)
    try:
        with running(folder) as server:
            yield server
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgres"])
async def make_backend(request: Any, tmp_path: Path) -> AsyncIterator[Any]:
    """Backends on one fresh place: each call is another router's."""
    made: list[Backend] = []
    if request.param == "postgres":
        url = request.getfixturevalue("server").url
        import asyncpg

        db = await asyncpg.connect(url)
        await db.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
        await db.close()

    def make(max_decisions: int = 100) -> Backend:
        if request.param == "sqlite":
            backend: Backend = SqliteStore(
                tmp_path / "router.db", max_decisions=max_decisions, busy_s=0.05
            )
        else:
            backend = PostgresStore(url, max_decisions=max_decisions)
        made.append(backend)
        return backend

    yield make
    for backend in made:
        await backend.close()


def spent(usd: float, tier: str = "big", day: str = "2026-11-30", tenant: str = "a") -> Spend:
    return Spend(day, tenant, tier, 1, 10, 20, usd, 2 * usd)


def decision(number: int) -> dict[str, Any]:
    return {"request_id": f"r{number}", "time": float(number), "tier": "big"}


async def test_spend_of_several_routers_adds_up(make_backend: Any) -> None:
    first, second = make_backend(), make_backend()
    await asyncio.gather(first.open(), second.open())

    await asyncio.gather(
        first.write(Batch("x", 1, spend=[spent(0.25), spent(1.0, "small")])),
        second.write(Batch("y", 1, spend=[spent(1.0, "small"), spent(0.25)])),
    )

    assert await first.spend() == await second.spend()
    assert {(row.tier, row.cost_usd, row.num_requests) for row in await first.spend()} == {
        ("big", 0.5, 2),
        ("small", 2.0, 2),
    }
    assert await first.spend("2026-12-01") == []


async def test_a_batch_that_is_written_again_counts_once(make_backend: Any) -> None:
    """The answer to a commit may be lost; the writer cannot know."""
    backend = make_backend()
    batch = Batch("x", 1, spend=[spent(0.25)], decisions=[decision(1)])

    await backend.write(batch)
    await backend.write(batch)

    assert [row.cost_usd for row in await backend.spend()] == [0.25]


async def test_decisions_are_kept_up_to_a_number_newest_first(make_backend: Any) -> None:
    backend = make_backend(max_decisions=3)

    for number in range(8):
        batch = Batch("x", number + 1, decisions=[decision(number)])
        await backend.write(batch)

    kept = [each["request_id"] for each in await backend.decisions(10)]
    assert kept[:3] == ["r7", "r6", "r5"]
    assert len(kept) <= 4
    assert await backend.decision("r7") == decision(7)
    assert await backend.decision("r0") is None
    assert [each["request_id"] for each in await backend.decisions(1, before=7.0)] == ["r6"]


LABEL = Label(
    "r1",
    "shadow",
    100.0,
    "a",
    "big",
    0.05,
    {"small": 0.0, "big": 0.8},
    predicted={"small": 0.4, "big": 0.9},
    cost_usd=0.002,
    features={"hand": [1.0, 2.0]},
    prompt=[{"role": "user", "content": "Wozu\u2028?"}],
)


async def test_a_label_comes_back_as_it_was_and_a_second_word_of_its_source_replaces_it(
    make_backend: Any,
) -> None:
    backend = make_backend()
    feedback = Label("r1", "feedback", 200.0, "a", "big", 1.0, {"big": 0.0}, gold=True)

    await backend.write(Batch("x", 1, labels=[LABEL, feedback]))
    await backend.write(Batch("x", 2, labels=[replace(LABEL, quality={"small": 0.9})]))

    assert await backend.labels() == [replace(LABEL, quality={"small": 0.9}), feedback]
    assert await backend.labels(since=150.0) == [feedback]
    assert await backend.labels(limit=1) == [replace(LABEL, quality={"small": 0.9})]


async def test_old_labels_go_and_old_prompts_before_them(make_backend: Any) -> None:
    backend = make_backend()
    labels = [replace(LABEL, request_id=f"r{at}", at=at) for at in (100.0, 200.0, 300.0)]
    await backend.write(Batch("x", 1, labels=labels))

    changed = await backend.forget_labels(150.0, 250.0)

    bare = replace(labels[1], features=None, prompt=None)
    assert changed == 2
    assert await backend.labels() == [bare, labels[2]]


@pytest.mark.parametrize("durable", [False, True])
async def test_labels_are_read_the_same_with_and_without_a_place_to_keep_them(
    durable: bool, tmp_path: Path
) -> None:
    backend = SqliteStore(tmp_path / "router.db", max_decisions=9) if durable else None
    store = Store(backend, wall_clock=Clock(1_000_000.0))
    old, new = LABEL, replace(LABEL, request_id="r2", at=200.0)

    store.add_label(old)
    store.add_label(new)
    waiting = await store.labels()
    await store.step()
    written = await store.labels()
    num_changed = await store.forget_labels(150.0, 250.0)

    assert waiting == written == [old, new]
    assert num_changed == 2
    assert await store.labels() == [replace(new, features=None, prompt=None)]
    if backend is not None:
        await backend.close()


async def test_a_revocation_wins_over_whoever_had_not_seen_it(make_backend: Any) -> None:
    first, second = make_backend(), make_backend()
    key = Key("k", "a", "hmac-sha256:0", 1.0, usd_per_hour=2.0)
    await first.put_key(key)

    await second.put_key(replace(key, revoked=5.0))
    await first.put_key(replace(key, usd_per_hour=9.0))

    assert await second.keys() == [replace(key, revoked=5.0, usd_per_hour=9.0)]
    assert await first.secret("one") == await second.secret("two") == "one"


async def test_leases_of_several_routers_never_exceed_the_bucket(make_backend: Any) -> None:
    first, second = make_backend(), make_backend()
    await asyncio.gather(first.open(), second.open())

    taken = await asyncio.gather(
        *(backend.lease("budget", 0.3, 0.0, 1.0) for backend in (first, second) for _ in range(4))
    )
    back = await first.lease("budget", -0.5, 0.0, 1.0)

    assert sum(taken) == pytest.approx(1.0)
    assert back == -0.5
    assert await second.lease("budget", 9.0, 0.0, 1.0) == pytest.approx(0.5)


# The writer.


async def test_totals_outlive_a_restart(make_backend: Any) -> None:
    clock = Clock(1_000_000.0)
    before = Store(make_backend(), wall_clock=clock)
    await before.step()
    before.add_spend(spent(0.25))
    before.add_spend(spent(0.5))
    before.add_decision(lambda: decision(1))
    assert await before.step()

    known: list[Spend] = []
    after = Store(make_backend(), wall_clock=clock)
    after.on_open = known.extend
    assert await after.step()

    assert [(row.cost_usd, row.num_requests) for row in known] == [(0.75, 2)]
    assert before.secret == after.secret
    assert after.health.durable


async def test_a_store_that_is_away_for_a_while_loses_no_money(server: Server) -> None:
    """Spend is added up meanwhile, decisions wait; status says what is wrong."""
    import asyncpg

    db = await asyncpg.connect(server.url)
    await db.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    await db.close()
    backend = PostgresStore(server.url, max_decisions=100)
    store = Store(backend, wall_clock=Clock(1_000_000.0))
    assert await store.step()
    server.stop()

    for number in range(5):
        store.add_spend(spent(0.25))
        store.add_decision(lambda number=number: decision(number))
        assert not await store.step()
    away = store.state()
    server.start()
    assert await store.step()
    rows = await backend.spend()
    kept = await backend.decisions(10)
    await backend.close()

    assert "PostgreSQL" in away["error"]
    assert away["num_waiting"] > 0
    assert store.health.ok
    assert store.health.num_waiting == 0
    assert [(row.cost_usd, row.num_requests) for row in rows] == [(1.25, 5)]
    assert len(kept) == 5


async def test_a_locked_file_is_said_and_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "router.db"
    store = Store(SqliteStore(path, max_decisions=9, busy_s=0.01), wall_clock=Clock(1_000_000.0))
    assert await store.step()
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")

    store.add_spend(spent(1.0))
    assert not await store.step()
    error = store.health.error
    other.execute("ROLLBACK")
    assert await store.step()
    rows = await store.spend()
    other.close()

    assert error is not None
    assert "locked" in error
    assert [row.cost_usd for row in rows] == [1.0]


async def test_a_full_disk_is_said_and_nothing_is_lost(tmp_path: Path) -> None:
    backend = SqliteStore(tmp_path / "router.db", max_decisions=10**6)
    store = Store(backend, wall_clock=Clock(1_000_000.0))
    assert await store.step()
    await backend._run(lambda db: db.execute("PRAGMA max_page_count = 20").fetchone())

    for number in range(2000):
        store.add_decision(lambda number=number: {**decision(number), "fill": "x" * 200})
    store.add_spend(spent(1.0))
    assert not await store.step()
    error = store.health.error
    await backend._run(lambda db: db.execute("PRAGMA max_page_count = 99999").fetchone())
    assert await store.step()

    assert error is not None
    assert "full" in error
    assert [row.cost_usd for row in await store.spend()] == [1.0]


class Away:
    """A store that never answers."""

    kind = "away"

    def __getattr__(self, name: str) -> Any:
        async def fail(*_: Any) -> None:
            raise StoreError("away")

        return fail


async def test_what_waits_is_bounded_and_what_is_dropped_is_counted() -> None:
    store = Store(Away(), wall_clock=Clock(1_000_000.0))  # type: ignore[arg-type]

    for number in range(MOST_WAITING + 7):
        store.add_decision(lambda number=number: decision(number))
        store.add_spend(spent(1.0))

    assert store.health.num_dropped == 7
    assert not await store.step()
    assert store.health.error == "away"


def test_a_killed_process_loses_at_most_its_last_batch(tmp_path: Path) -> None:
    """Killed between a batch and the next: everything up to that batch is there."""
    path = tmp_path / "router.db"
    script = f"""
import asyncio, os, signal, time
from pathlib import Path
from tandem_router.store.records import Spend
from tandem_router.store.sqlite import SqliteStore
from tandem_router.store.writer import Store

async def main():
    store = Store(SqliteStore(Path({str(path)!r}), max_decisions=9), wall_clock=time.time)
    await store.step()
    for number in range(50):
        store.add_spend(Spend("2026-11-30", "a", "big", 1, 1, 1, 1.0, 1.0))
        if number < 40:
            await store.step()
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""
    subprocess.run([sys.executable, "-c", script], timeout=60, check=False)

    db = sqlite3.connect(path)
    assert db.execute("SELECT num_requests FROM spend").fetchall() == [(40,)]
    db.close()


async def test_two_routers_over_one_database_share_limits_keys_and_totals(
    server: Server, run_router: Any, make_worker: Any
) -> None:
    """A key minted at one opens the other, counts once, and is revoked at both."""
    import asyncpg

    db = await asyncpg.connect(server.url)
    await db.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    await db.close()
    worker = await make_worker()
    options = {
        "tenants": [{"name": "team", "requests_per_minute": 12}],
        "store": {"type": "postgres"},
        "store_url": server.url,
        "replicas": 2,
        "peer_token": "peer",
    }
    admin = {"x-tandem-peer-token": "peer", "content-type": "application/json"}
    table = {"large": {"decode": [worker]}}

    async with (
        run_router(table, **options) as (first, one),
        run_router(table, **options) as (second, two),
    ):
        minted = await first.request("POST", "/admin/keys", {"tenant": "team"}, admin)
        headers = {"authorization": f"Bearer {minted.json['key']}"}
        two.services.store.keys_s = 0.0
        statuses = []
        for _ in range(12):
            for app in (one, two):
                await app.services.store.step()
            for client in (first, second):
                reply = await client.chat(model="large", headers=headers)
                statuses.append(reply.status)
        for app in (one, two):
            await app.services.store.step()
        spend = (await second.get("/admin/spend", headers=admin)).json["spend"]
        await second.request("DELETE", f"/admin/keys/{minted.json['id']}", None, admin)
        one.services.store.keys_s = 0.0
        await one.services.store.step()
        revoked = [(await c.chat(model="large", headers=headers)).status for c in (first, second)]

    assert set(statuses) == {200, 429}
    assert 10 <= statuses.count(200) <= 14
    assert sum(row["num_requests"] for row in spend) == statuses.count(200)
    assert revoked == [401, 401]


class Slow(SqliteStore):
    """A store that is asked some time before it reads, or answers some time after."""

    def __init__(self, path: Path, pause: str) -> None:
        super().__init__(path, max_decisions=9)
        self._pause = pause
        self.goes_on = asyncio.Event()

    async def spend(self, since_day: str = "") -> list[Spend]:
        if self._pause == "before it reads":
            await self.goes_on.wait()
        rows = list(await super().spend(since_day))
        await self.goes_on.wait()
        return rows


@pytest.mark.parametrize("pause", ["before it reads", "after it has read"])
async def test_what_is_written_while_somebody_asks_is_counted_once(
    tmp_path: Path, pause: str
) -> None:
    backend = Slow(tmp_path / "s.db", pause)
    backend.goes_on.set()
    store = Store(backend, wall_clock=lambda: 0.0, flush_s=1.0)
    await store.step()
    store.add_spend(Spend("2026-11-30", "team", "small", 1, 1, 1, 0.5, 1.0))
    backend.goes_on.clear()

    asked, written = asyncio.create_task(store.spend()), asyncio.create_task(store.step())
    await asyncio.wait({written}, timeout=0.05)
    backend.goes_on.set()
    rows = await asked
    await written
    await backend.close()

    assert sum(row.num_requests for row in rows) == 1
