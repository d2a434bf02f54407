"""A predictor that is trained again from live labels, shadowed, promoted and taken back."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tandem_router.config import parse_config
from tandem_router.predictor.cli import main as tandem
from tandem_router.quality.measured import Change
from tandem_router.quality.retraining import Retraining, rows_of, train_apart
from tandem_router.routing.predictor_source import ArtifactPredictor
from tandem_router.store.records import Label
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
            folder,
            self._used,
            lambda: self.now,
            train=self._train,
        )
        self._number = 0

    def _used(self) -> None:
        self.num_used += 1

    async def _train(self, data: Sequence[Path], into: Path) -> str:
        self.num_trained += 1
        if isinstance(self.trained, str):
            return self.trained
        shutil.copyfile(self.trained, into)
        return ""

    async def labels(self, num: int, seed: int, right: bool = True) -> None:
        for row in rows(right, num, seed):
            self._number += 1
            self.now += 0.1
            found = label(self._number, row, self.now)
            self.store.add_label(found)
            self.retraining.learn(found)
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

    live.retraining.changed(Change(live.now, "small", True, 9.5, 40, 0.5, 0.8))
    assert live.source.version != before
    live.retraining.changed(Change(live.now, "small", False, 9.5, 40, 0.8, 0.5))

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

    assert again.source.version == live.source.version
    assert "promoted" in again.kinds
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
        ({"capture": "Features"}, "set learning.capture to Prompts"),
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
