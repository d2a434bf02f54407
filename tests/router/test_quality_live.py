"""Quality measured live: covered by its interval, a drop told and acted on, kept through a kill."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from eventually import eventually
from quality_world import World
from router_process import router_process
from tandem_operator.cli import main
from tandem_router.policy import PlainScore
from tandem_router.predictor.records import files
from tandem_router.quality.labels import Labels
from tandem_router.quality.live import LiveQuality
from tandem_router.routing.predictor_source import ArtifactPredictor
from tandem_router.store.records import Label, StoreError
from tandem_router.store.sqlite import SqliteStore
from tandem_router.store.writer import Store
from tandem_router.testing.planted_quality import FakeJudge, PlantedProvider, uniform

ERRS = 0.1


def gain_of(question: str) -> float:
    return 0.02 if uniform("gain", question) < 0.7 else 0.4


class Trained(ArtifactPredictor):
    """Knows both tiers, except that it thinks the large one .05 better than it is."""

    def __init__(self) -> None:
        super().__init__(Path("none"), ("small", "large"))

    def training_gains(self, dearest: str, cheapest: str) -> list[tuple[float, float]]:
        return [(0.02, 0.95)] * 7 + [(0.4, 0.95)] * 3

    def score(self, prompt: str) -> PlainScore:
        return PlainScore({"small": 0.9 - gain_of(prompt), "large": 0.95})


@asynccontextmanager
async def world_of(errs: float = 0.0) -> AsyncIterator[World]:
    small = await PlantedProvider(quality=lambda question: 0.9 - gain_of(question)).start()
    large = await PlantedProvider(quality=lambda _: 0.9).start()
    judge = await FakeJudge(errs=errs).start()
    yield World(small, large, judge)
    for server in (small, large, judge):
        await server.stop()


async def test_a_judge_that_errs_is_corrected_and_a_planted_drop_is_told_and_acted_on(
    run_router: Any,
) -> None:
    delivered: list[tuple[bool, bool]] = []
    async with world_of(ERRS) as world:
        config = world.config(daily_usd=1000.0)
        del config["threshold"]
        config["objective"] = {"quality_floor": 0.9}
        async with run_router({}, predictor=Trained(), **config) as (client, app):
            learner = app.services.learner

            async def ask(numbers: range) -> str:
                tier = ""
                for number in numbers:
                    question = f"question {number}"
                    reply = await client.chat(question)
                    tier = reply.headers["x-tandem-tier"]
                    providers = {"small": world.small, "large": world.large}
                    right = {
                        name: provider.is_right(question, f"{name}-model")
                        for name, provider in providers.items()
                    }
                    delivered.append((right[tier], right["large"]))
                    await learner.idle()
                    if number % 3 == 0:  # a person looks at a third of what is judged
                        label = {
                            "request_id": reply.headers["x-request-id"],
                            "quality": {name: float(good) for name, good in right.items()},
                            "probability": 1 / 3,
                        }
                        posted = await client.request(
                            "POST",
                            "/admin/labels",
                            {"labels": [label]},
                            {"content-type": "application/json"},
                        )
                        assert posted.json == {"num_taken": 1, "unknown": []}
                return tier

            await ask(range(450))
            before = (await client.get("/admin/state")).json
            truth = sum(a for a, _ in delivered) / sum(b for _, b in delivered)
            world.small.quality = lambda question: 0.35
            await ask(range(450, 650))
            after = (await client.get("/admin/state")).json
            last = [await ask(range(number, number + 1)) for number in range(650, 670)]
            metrics = (await client.get("/metrics")).body.decode()

    quality = before["quality"]
    assert quality["num_labels"] == 450
    assert quality["num_gold"] == 150
    assert quality["labels_by_source"] == {"judge": 450, "gold": 150}
    assert quality["low"] <= truth <= quality["high"]
    assert not quality["changes"]
    assert before["threshold"]["basis"] in ("Predicted", "Certified")
    # The drop: told with its statistic, learned anew, and everything goes to the large tier.
    (change,) = after["quality"]["changes"]
    assert (change["tier"], change["rose"]) == ("small", False)
    assert after["quality"]["num_labels"] < 200
    assert after["threshold"]["basis"] == "Refuted"
    assert after["threshold"]["limit"] < 0.07  # the smallest gain that is predicted
    assert set(last) == {"large"}
    assert 'tandem_quality_labels_total{source="gold"}' in metrics
    assert "tandem_measured_quality_ratio_low " in metrics


async def test_a_floor_that_was_broken_is_held_again_and_measured_anew(run_router: Any) -> None:
    """Length sends most to a small tier that is bad: refuted, all to the large one, proven."""
    async with world_of() as world:
        world.small.quality = lambda question: 0.5
        config = world.config(daily_usd=1000.0)
        config |= {"objective": {"quality_floor": 0.9}, "predictor": {"type": "Length"}}
        async with run_router({}, **config) as (client, app):
            measured, steering = app.services.quality.measured, app.services.steering

            async def asked_until(done: Callable[[], bool]) -> int:
                for number in range(400):
                    if done():
                        return number
                    await client.chat(f"question {number} of {len(measured.history)}")
                    await app.services.learner.idle()
                return 400

            taken = await asked_until(lambda: steering.threshold_limit["basis"] == "Refuted")
            at_once = measured.ratio()
            again = await asked_until(lambda: (measured.ratio().low or 0.0) >= 0.9)

    assert 30 < taken < 200
    assert (at_once.ratio, at_once.num_labels) == (None, 0)
    assert again <= 60


# A process of its own, killed.


def process_of(folder: Path, config: dict[str, Any]) -> Any:
    (folder / "peer").write_text("peer-token\n")
    return router_process(
        folder, config, store_file=folder / "router.db", peer_token_file=folder / "peer"
    )


async def labelled(client: httpx.AsyncClient, url: str, num: int) -> dict[str, Any]:
    """The state once the router has so many labels."""

    async def state() -> dict[str, Any]:
        said: dict[str, Any] = (await client.get(f"{url}/admin/state")).json()
        return said if said["quality"]["num_labels"] >= num else {}

    return await eventually(state)


async def stored(path: Path, number: int) -> None:
    """Until so many labels are on the disk."""
    store = SqliteStore(path, max_decisions=10)

    async def there() -> bool:
        return len(await store.labels()) >= number

    await eventually(there)
    await store.close()


async def test_labels_survive_a_killed_router_and_are_exported_for_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with world_of() as world, httpx.AsyncClient(trust_env=False) as client:
        config = {
            "name": "chat",
            "fallback_tier": "large",
            **world.config(capture="Prompts", redact=["Emails"]),
            "store": {"type": "sqlite", "flush_s": 0.02},
        }

        async def ask(url: str, number: int) -> None:
            content = f"question {number} of me@example.org {'and more ' * (40 * (number % 2))}"
            body = {"model": "chat", "messages": [{"role": "user", "content": content}]}
            assert (await client.post(f"{url}/v1/chat/completions", json=body)).status_code == 200

        async with process_of(tmp_path, config) as (url, process):
            for number in range(40):
                await ask(url, number)
                await labelled(client, url, number + 1)
            before = await labelled(client, url, 40)
            await stored(tmp_path / "router.db", 40)
            process.send_signal(signal.SIGKILL)
            await process.wait()
        async with process_of(tmp_path, config) as (url, _):
            after = await labelled(client, url, 40)

            async def estimated_as_before() -> bool:
                """Predictions of earlier requests, which the estimate leans on, are read last."""
                nonlocal after
                after = await labelled(client, url, 40)
                measured = before["quality"]["measured"]
                return after["quality"]["measured"] == pytest.approx(measured, abs=0.01)

            await eventually(estimated_as_before)
            await ask(url, 1000)
            await labelled(client, url, 41)
            await stored(tmp_path / "router.db", 41)
            options = ["--url", url, "--token-file", str(tmp_path / "peer")]
            rows = tmp_path / "rows.jsonl"
            exported = await asyncio.to_thread(
                main, ["labels", "export", "-o", str(rows), "--redact", "tr a-z A-Z", *options]
            )
            known = json.loads(rows.read_text().splitlines()[0])["id"]
            gold = tmp_path / "gold.jsonl"
            gold.write_text(
                json.dumps({"request_id": known, "quality": {"small": 0.25}})
                + "\n"
                + json.dumps({"request_id": "nobody", "quality": {"small": 1.0}})
            )
            added = await asyncio.to_thread(main, ["labels", "gold", str(gold), *options])
            said = capsys.readouterr()
            again = await asyncio.to_thread(main, ["labels", "export", "-o", str(rows), *options])

    # What was measured, spent and said before is what is measured, spent and said again.
    for name in ("num_labels", "labels_by_source", "since"):
        assert after["quality"][name] == before["quality"][name], name
    for name in ("measured", "low", "high"):
        assert after["quality"][name] == pytest.approx(before["quality"][name], abs=0.01), name
    assert after["learning"]["spent_today_usd"] == pytest.approx(
        before["learning"]["spent_today_usd"]
    )
    assert (exported, added, again) == (0, 0, 0)
    assert "41 rows of 41 labels" in said.err
    assert "1 gold labels taken" in said.out
    assert "1 requests are not known here, such as nobody" in said.err
    table = [row for _, row in files.read(rows, _Nothing())]
    assert len(table) == 41
    assert all(set(row["quality"]) == {"small", "large"} for row in table)
    assert all(row["prompt"].count("[email]") == 1 for row in table)
    assert next(row for row in table if row["id"] == known)["quality"]["small"] == 0.25


class _Nothing:
    def update(self, _: bytes) -> None:
        """Nobody asks for the digest."""


async def test_a_store_that_is_full_or_locked_stops_neither_answers_nor_learning(
    run_router: Any, tmp_path: Path
) -> None:
    import sqlite3

    path = tmp_path / "router.db"
    place = {"store": {"type": "sqlite", "flush_s": 0.01}, "store_file": path}
    async with world_of() as world:
        config = world.config()
        async with run_router({}, predictor=Trained(), **config, **place) as (client, app):
            await client.chat("question 0")
            await app.services.learner.idle()
            await stored(path, 1)
            other = sqlite3.connect(path, isolation_level=None)
            other.execute("BEGIN EXCLUSIVE")
            statuses = [(await client.chat(f"question {n}")).status for n in range(1, 6)]
            await app.services.learner.idle()
            state = (await client.get("/admin/state")).json
            other.execute("ROLLBACK")
            other.close()
            await stored(path, 6)

    assert statuses == [200] * 5
    assert state["quality"]["num_labels"] == 6


async def test_routers_that_share_a_store_learn_what_the_others_found(
    run_router: Any, make_config: Any, tmp_path: Path
) -> None:
    config = make_config(store={"type": "postgres"})
    async with run_router({}, predictor=Trained(), background=False) as (_, app):

        def router_of(store: Store) -> tuple[Labels, LiveQuality]:
            labels, services = Labels(store), app.services
            quality = LiveQuality(
                config,
                labels,
                store,
                services.steering,
                services.metrics,
                "small",
                "large",
                lambda: 1e9,
            )
            return labels, quality

        stores = [
            Store(SqliteStore(tmp_path / "shared.db", max_decisions=9), wall_clock=lambda: 1e9)
            for _ in range(2)
        ]
        (first_labels, first), (second_labels, second) = map(router_of, stores)
        for store, quality in zip(stores, (first, second), strict=True):
            assert await store.step()
            await quality.step()
        for number in range(3):
            for labels, name in ((first_labels, "a"), (second_labels, "b")):
                quality = {"small": 1.0, "large": 1.0}
                label = Label(f"{name}{number}", "judge", 1e9, "t", "small", 0.1, quality)
                labels.add(label)
        for _ in range(2):
            for store, live in zip(stores, (first, second), strict=True):
                assert await store.step()
                await live.step()
        found = [live.state() for live in (first, second)]
        for store in stores:
            if store.backend is not None:
                await store.backend.close()

    assert [state["num_labels"] for state in found] == [6, 6]
    assert [state["labels_by_source"] for state in found] == [{"judge": 6}] * 2


async def test_labels_that_cannot_be_read_are_told_and_read_later(
    run_router: Any, make_config: Any
) -> None:
    class Away(SqliteStore):
        away = True

        async def labels(self, since: float = 0.0, limit: int = 100_000) -> Any:
            if self.away:
                raise StoreError("it is locked")
            return await super().labels(since, limit)

    async with run_router({}, predictor=Trained(), background=False) as (_, app):
        backend = Away(Path(":memory:"), max_decisions=9)
        store, services = Store(backend, wall_clock=lambda: 1e9), app.services
        live = LiveQuality(
            make_config(),
            Labels(store),
            store,
            services.steering,
            services.metrics,
            "small",
            "large",
            lambda: 1e9,
        )
        assert await store.step()
        await live.step()
        told = live.state()["error"]
        backend.away = False
        await live.step()
        await backend.close()

    assert told == "labels cannot be read: it is locked"
    assert live.state()["error"] is None
    assert live.replayed


async def test_another_judge_begins_anew_and_a_restart_does_not_mix_their_verdicts(
    run_router: Any, make_config: Any, tmp_path: Path
) -> None:
    def judged_by(model: str) -> Any:
        judge = {"type": "External", "url": "http://judge.test/v1", "model": model}
        return make_config(learning={"shadow_share": 0.5, "judge": judge})

    async with run_router({}, predictor=Trained(), background=False) as (_, app):
        services, now = app.services, [1000.0]
        backend = SqliteStore(tmp_path / "router.db", max_decisions=9)

        def live_of(model: str) -> LiveQuality:
            config, store = judged_by(model), Store(backend, wall_clock=lambda: now[0])
            return LiveQuality(
                config,
                Labels(store),
                store,
                services.steering,
                services.metrics,
                "small",
                "large",
                lambda: now[0],
            )

        async def labels(live: LiveQuality, name: str, num: int) -> None:
            assert await live.store.step()
            await live.step()
            for number in range(num):
                now[0] += 1.0
                quality = {"small": 1.0, "large": 1.0}
                found = Label(f"{name}{number}", "judge", now[0], "t", "small", 0.5, quality)
                live.store.add_label(found)
                live.learn_new(found)
            assert await live.store.step()
            await live.step()

        first = live_of("one")
        await labels(first, "a", 40)
        again = live_of("one")
        await labels(again, "b", 0)
        other = live_of("two")
        await labels(other, "c", 5)
        changed_at = other.measured.since
        once_more = live_of("two")
        await labels(once_more, "d", 0)
        restarted = once_more.measured.num_labels
        once_more.reconfigure(judged_by("three"), "small", "large")
        await backend.close()

    assert again.measured.num_labels == 40
    assert (other.measured.num_labels, restarted) == (5, 5)
    assert changed_at is not None
    assert changed_at >= 1040.0
    assert once_more.measured.num_labels == 0
