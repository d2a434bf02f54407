"""A predictor that is trained again from live labels, shadowed, promoted and taken back."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tandem_router.config import parse_config
from tandem_router.predictor.cli import main as tandem
from tandem_router.predictor.reading.captured import Captured
from tandem_router.quality.measured import Change
from tandem_router.quality.retraining import FolderArchive, Retraining, StoreArchive
from tandem_router.quality.retraining.job import train_once
from tandem_router.quality.retraining.lifecycle import JOB_LIMIT_S
from tandem_router.quality.retraining.training import rows_of, train_apart, write_rows
from tandem_router.routing.predictor_source import ArtifactPredictor
from tandem_router.store.records import Label
from tandem_router.store.sqlite import SqliteStore
from tandem_router.store.writer import Store
from tandem_router.testing.two_tiers import CONFIG

LEARNING = {"shadow_share": 0.5, "judge": {"type": "Numeric"}, "capture": "Prompts"}


def config(**learning: Any) -> Any:
    retraining = {"min_labels": 50, "every_s": 100.0}
    predictor = {"type": "Learned", "retraining": retraining}
    changed = {"learning": {**LEARNING, **learning}, "predictor": predictor}
    return parse_config(json.dumps({**CONFIG, **changed}))


def question(number: int, hard: bool) -> str:
    word = "prove that the integral converges" if hard else "name the capital of the country"
    return f"{word} number {number} please"


def rows(right: bool, num: int = 160, seed: int = 0) -> list[dict[str, Any]]:
    """Hard questions are wrong at the small tier; or, where not `right`, easy ones are."""
    rng, found = random.Random(seed), []
    for number in range(num):
        hard = rng.random() < 0.5
        good = rng.random() < (0.1 if hard == right else 0.95)
        large = float(rng.random() < 0.95)
        quality = {"small": float(good), "large": large}
        found.append({"prompt": question(number, hard), "quality": quality})
    return found


def label(number: int, row: dict[str, Any], at: float) -> Label:
    return Label(
        f"r{number}", "shadow", at, "t", "small", 0.5, row["quality"], prompt=row["prompt"]
    )


def artifact_of(folder: Path, found: Sequence[dict[str, Any]], name: str) -> Path:
    data, artifact = folder / f"{name}.jsonl", folder / name
    data.write_text("".join(json.dumps(row) + "\n" for row in found))
    assert tandem(["train", str(data), "-o", str(artifact), "--quiet"]) == 0
    return artifact


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A predictor that knows which questions are hard, and one that has it the wrong way round."""
    folder = tmp_path_factory.mktemp("artifacts")
    return {
        "right": artifact_of(folder, rows(True), "right"),
        "wrong": artifact_of(folder, rows(False), "wrong"),
    }


class World:
    """A router's part that trains again, on a clock of its own."""

    def __init__(self, folder: Path, mounted: Path, trained: Path | str, **learning: Any) -> None:
        self.now = 1000.0
        self.trained, self.num_trained, self.num_used = trained, 0, 0
        self.source = ArtifactPredictor(mounted, ("small", "large"))
        self.store = Store(None, wall_clock=lambda: self.now, flush_s=1.0)
        self.folder = folder
        self.retraining = Retraining(
            config(**learning),
            self.source,
            self.store,
            FolderArchive(folder),
            self._used,
            lambda: self.now,
            train=self._train,
        )
        self.number = 0
        self.features_alone = learning.get("capture") == "Features"

    def _used(self, labels: Sequence[Label]) -> None:
        self.num_used += 1
        self.told = labels

    async def _train(self, data: Sequence[Path], into: Path) -> str:
        self.num_trained += 1
        if isinstance(self.trained, str):
            return self.trained
        shutil.copyfile(self.trained, into)
        return ""

    async def labels(self, num: int, seed: int, right: bool = True, at_once: bool = False) -> None:
        """at_once: all come between two steps."""
        await self.retraining.prepare()
        for row in rows(right, num, seed):
            self.number += 1
            self.now += 0.1
            found = label(self.number, row, self.now)
            if self.features_alone:
                said = self.source.score(row["prompt"]).quality
                features = Captured.of(row["prompt"]).kept()
                found = replace(found, prompt=None, features=features, predicted=dict(said))
            self.store.add_label(found)
            self.retraining.learn(found)
            if not at_once:
                await self.retraining.step()
        await self.retraining.step()

    @property
    def kinds(self) -> list[str]:
        return [step.kind for step in self.retraining.life.steps]


@pytest.fixture
def world(tmp_path: Path, artifacts: dict[str, Path]) -> Callable[..., World]:
    def make(mounted: str, trained: str, **learning: Any) -> World:
        return World(
            tmp_path / "kept", artifacts[mounted], artifacts.get(trained, trained), **learning
        )

    return make


async def test_a_better_predictor_is_trained_shadowed_and_promoted(world: Any) -> None:
    live = world("wrong", "right")
    before = live.source.version

    await live.labels(49, seed=1)
    assert live.kinds == []
    await live.labels(2, seed=2)
    assert live.kinds == ["trained"]
    assert live.source.version == before
    await live.labels(400, seed=3)

    assert live.kinds[:2] == ["trained", "promoted"]
    assert live.source.version != before
    assert live.num_used == 1
    state = live.retraining.state()
    assert "smaller" in state["steps"][1]["why"]


async def test_labels_that_come_with_the_proof_are_the_first_of_the_next_comparison(
    world: Any,
) -> None:
    live = world("wrong", "right")
    await live.labels(51, seed=1)

    await live.labels(400, seed=3, at_once=True)
    before = live.kinds
    await live.retraining.step()

    assert before == ["trained", "promoted"]
    assert live.kinds == ["trained", "promoted", "kept"]


async def test_from_features_alone_a_better_predictor_is_trained_and_promoted(
    tmp_path: Path, artifacts: dict[str, Path]
) -> None:
    """No text is kept: the candidate reads words, and is held against what was said at the time."""
    live = World(tmp_path / "kept", artifacts["wrong"], "", capture="Features")
    live.retraining.train = train_apart
    before = live.source.version

    await live.labels(51, seed=1)
    assert live.kinds == ["trained"], live.retraining.state()
    await live.labels(120, seed=3)

    predictor = live.source.current
    assert predictor is not None
    assert live.kinds == ["trained", "promoted"]
    assert live.source.version != before
    assert predictor.reads_words_alone
    easy, hard = (predictor.score(question(7, hard)).quality["small"] for hard in (False, True))
    assert easy > hard + 0.3
    assert all(label.prompt is None for label in await live.store.labels(0.0))


async def test_a_worse_one_is_rejected_and_never_used(world: Any) -> None:
    live = world("right", "wrong")
    before = live.source.version

    await live.labels(400, seed=1)

    assert live.kinds[:2] == ["trained", "rejected"]
    assert (live.source.version, live.num_used) == (before, 0)


async def test_a_promotion_is_taken_back_where_measured_quality_falls(world: Any) -> None:
    live = world("wrong", "right")
    before = live.source.version
    while "promoted" not in live.kinds:
        await live.labels(20, seed=len(live.kinds) + live.num_trained)

    live.now += 1.0
    live.retraining.changed(Change(live.now, "small", True, 9.5, 40, 0.5, 0.8))
    await live.retraining.step()
    assert live.source.version != before
    live.retraining.changed(Change(live.now, "small", False, 9.5, 40, 0.8, 0.5))
    await live.retraining.step()

    assert live.source.version == before
    assert live.kinds[-1] == "rolled back"
    assert "fell to about 0.50" in live.retraining.life.steps[-1].why


async def test_a_restart_goes_on_with_the_promoted_one_until_another_file_is_mounted(
    world: Any, tmp_path: Path, artifacts: dict[str, Path]
) -> None:
    live = world("wrong", "right")
    while "promoted" not in live.kinds:
        await live.labels(20, seed=len(live.kinds) + live.num_trained)

    again = World(live.folder, artifacts["wrong"], "unused")
    other = World(live.folder, artifacts["right"], "unused")
    await again.retraining.prepare()
    await other.retraining.prepare()

    assert again.source.version == live.source.version
    assert "promoted" in again.kinds
    assert again.retraining.life.phase == "watched"
    assert other.source.version == ArtifactPredictor(artifacts["right"], ()).version


async def test_a_training_that_dies_is_told_and_changes_nothing(world: Any) -> None:
    live = world("wrong", "training ended with status -9: ")
    before = live.source.version

    await live.labels(60, seed=1)
    await live.labels(60, seed=2)

    assert live.kinds == ["failed"]
    assert live.num_trained == 1  # not again before its time
    assert "status -9" in live.retraining.state()["steps"][0]["why"]
    assert live.source.version == before


@pytest.mark.parametrize(
    ("learning", "says"),
    [
        ({"capture": "None"}, "set learning.capture to Features or Prompts"),
        ({"shadow_share": 0.0}, "nothing makes labels"),
    ],
)
async def test_what_is_missing_for_training_is_said(
    world: Any, learning: dict[str, Any], says: str
) -> None:
    live = world("wrong", "right", **learning)

    await live.labels(60, seed=1)

    assert live.num_trained == 0
    assert says in live.retraining.state()["problem"]


async def test_another_mounted_file_ends_the_comparison(world: Any) -> None:
    live = world("wrong", "right")
    await live.labels(52, seed=1)
    assert live.retraining.state()["candidate"] is not None

    live.retraining.mounted()

    assert live.retraining.state()["candidate"] is None
    assert live.retraining.life.phase == "idle"


def test_gold_goes_before_what_was_judged() -> None:
    judged = Label("a", "judge", 2.0, "t", "small", 0.5, {"small": 0.0, "large": 1.0}, prompt="q")
    gold = Label("a", "gold", 1.0, "t", "small", 0.5, {"small": 1.0}, gold=True, prompt="q")

    assert rows_of([gold, judged]) == [{"prompt": "q", "quality": {"small": 1.0, "large": 1.0}}]


async def test_a_restart_goes_on_comparing_the_candidate(
    world: Any, artifacts: dict[str, Path]
) -> None:
    live = world("wrong", "right")
    await live.labels(70, seed=1)
    assert live.retraining.life.phase == "shadowed"

    again = World(live.folder, artifacts["wrong"], "unused")
    again.now = live.now
    await again.retraining.prepare()

    for name in ("phase", "candidate", "comparison", "steps"):
        assert again.retraining.state()[name] == live.retraining.state()[name], name
    await again.labels(400, seed=3)
    assert again.kinds[:2] == ["trained", "promoted"]


async def test_who_takes_over_is_told_what_it_says_of_labels_that_it_was_not_trained_from(
    world: Any,
) -> None:
    live = world("wrong", "right")
    while "promoted" not in live.kinds:
        await live.labels(20, seed=len(live.kinds) + live.num_trained)

    trained, promoted = live.retraining.life.steps
    assert len(live.told) >= 30
    assert all(trained.at < told.at <= promoted.at for told in live.told)
    hard, easy = question(1, hard=True), question(2, hard=False)
    said = {one.prompt.split()[0]: one.predicted["small"] for one in live.told}
    assert said[hard.split()[0]] < 0.5 < said[easy.split()[0]]


async def test_after_a_change_of_quality_only_what_came_since_is_learned_from(
    world: Any, tmp_path: Path
) -> None:
    live = world("wrong", "right")
    data = tmp_path / "base.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows(True, 200)))
    live.retraining.data = data
    seen: list[int] = []
    train = live.retraining.train

    async def counted(files: Sequence[Path], into: Path) -> str:
        seen.append(sum(len(file.read_text().splitlines()) for file in files))
        said: str = await train(files, into)
        return said

    live.retraining.train = counted
    await live.labels(52, seed=1)
    assert live.retraining.life.phase == "shadowed"
    live.retraining.changed(Change(live.now, "small", False, 9.5, 40, 0.8, 0.5))
    live.now += 100.0
    await live.labels(52, seed=2)

    assert live.kinds == ["trained", "rejected", "trained"]
    assert "fell to about 0.50 after it was trained" in live.retraining.life.steps[1].why
    # Fifty labels and as many rows of the data; then fifty labels, and no row of before.
    assert seen == [100, 50]


def test_no_more_of_the_first_data_is_taken_than_there_are_labels(tmp_path: Path) -> None:
    data = tmp_path / "base.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows(True, 80)))
    labels = [label(number, row, 1.0) for number, row in enumerate(rows(False, 30))]

    few = write_rows(tmp_path / "a", labels, data).read_text().splitlines()
    alone = write_rows(tmp_path / "b", labels, None).read_text().splitlines()

    assert (len(few), len(alone)) == (60, 30)
    assert few[:30] == alone


class Replica(World):
    """One of several routers, whose store is shared."""

    def __init__(self, folder: Path, mounted: Path, backend: SqliteStore, by: str) -> None:
        super().__init__(folder, mounted, "unused")
        self.store = Store(backend, wall_clock=lambda: self.now, flush_s=1.0)
        changed = config()
        retraining = changed.predictor.retraining.model_copy(update={"by": by})
        predictor = changed.predictor.model_copy(update={"retraining": retraining})
        self.archive = StoreArchive(backend, folder, lambda: self.now)
        self.retraining = Retraining(
            changed.model_copy(update={"predictor": predictor}),
            self.source,
            self.store,
            self.archive,
            self._used,
            lambda: self.now,
            train=self._train,
        )

    async def step(self) -> None:
        assert await self.store.step()
        await self.retraining.step()


@pytest.fixture
async def shared(tmp_path: Path) -> AsyncIterator[SqliteStore]:
    backend = SqliteStore(tmp_path / "shared.db", max_decisions=9)
    yield backend
    await backend.close()


async def test_routers_that_share_a_store_use_the_same_predictor_that_a_job_trained(
    shared: SqliteStore, tmp_path: Path, artifacts: dict[str, Path]
) -> None:
    leads, follows = (
        Replica(tmp_path / name, artifacts["wrong"], shared, "Job") for name in ("a", "b")
    )
    for router in (leads, follows):
        await router.step()

    async def labels(num: int, seed: int) -> None:
        for row in rows(True, num, seed):
            leads.number += 1
            leads.now = follows.now = leads.now + 0.1
            found = label(leads.number, row, leads.now)
            leads.store.add_label(found)
            leads.retraining.learn(found)
            follows.retraining.learn(found)
        await leads.step()
        await follows.step()

    await labels(55, seed=1)
    before, run = leads.source.version, leads.retraining.state()["run"]
    assert run
    assert follows.retraining.state()["run"] == ""

    async def train(files: Sequence[Path], into: Path) -> str:
        shutil.copyfile(artifacts["right"], into)
        return ""

    assert await train_once(shared, "another", None, train) == (
        "training another is not wanted any more"
    )
    assert await train_once(shared, run, None, train) == ""
    await labels(5, seed=2)
    assert leads.kinds == ["trained"]
    assert "from 55 labels" in leads.retraining.life.steps[0].why
    while "promoted" not in leads.kinds:
        await labels(20, seed=len(leads.kinds) + leads.number)
    await follows.step()

    assert leads.source.version == follows.source.version != before
    assert follows.kinds == leads.kinds
    # The one that decides is gone; the other one goes on with what it watched.
    follows.now += 60.0
    await shared.claim("retraining", leads.archive.holder, 0.0)
    await follows.step()
    assert follows.retraining.state()["leads"]
    assert follows.retraining.life.phase == leads.retraining.life.phase


async def test_a_job_that_fails_or_never_ends_is_told_and_changes_nothing(
    shared: SqliteStore, tmp_path: Path, artifacts: dict[str, Path]
) -> None:
    live = Replica(tmp_path / "a", artifacts["wrong"], shared, "Job")
    before = live.source.version

    async def killed(files: Sequence[Path], into: Path) -> str:
        return "training ended with status -9"

    for seed in (1, 2):
        await live.step()
        for row in rows(True, 60, seed):
            live.number += 1
            live.now += 0.1
            live.store.add_label(found := label(live.number, row, live.now))
            live.retraining.learn(found)
        await live.step()
        run = live.retraining.state()["run"]
        assert run
        if seed == 1:
            assert await train_once(shared, run, None, killed) == "training ended with status -9"
        else:
            live.now += JOB_LIMIT_S
        await live.step()
        live.now += 200.0

    assert live.kinds == ["failed", "failed"]
    first, second = live.retraining.life.steps
    assert first.why == "training ended with status -9"
    assert second.why == "there was no result within 75 minutes"
    assert live.source.version == before


async def test_training_apart_says_why_it_learned_nothing(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "a", "quality": {"small": 1, "large": 0}}\n')

    said = await train_apart([data], tmp_path / "out")

    assert "status" in said
    assert not (tmp_path / "out").exists()


async def test_training_apart_leaves_an_artifact(
    tmp_path: Path, artifacts: dict[str, Path]
) -> None:
    said = await train_apart([artifacts["right"].with_name("right.jsonl")], tmp_path / "out")

    assert said == ""
    assert ArtifactPredictor(tmp_path / "out", ()).loaded
