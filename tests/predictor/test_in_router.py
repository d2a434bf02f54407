"""An artifact as the router holds it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tandem_router.config import PredictorConfig, TierConfig
from tandem_router.predictor import artifact
from tandem_router.predictor.runtime import Predictor
from tandem_router.routing.predictor_source import ArtifactPredictor, UnlearnedPredictor


def test_a_trained_artifact_tells_the_router_the_gains_of_typical_prompts(
    content: bytes, predictor: Predictor, tmp_path: Path
) -> None:
    path = tmp_path / "artifact"
    path.write_bytes(content)
    cheapest, dearest = predictor.tiers[0], predictor.tiers[-1]

    held = ArtifactPredictor(path, predictor.tiers)
    gains = held.training_gains(dearest, cheapest)

    assert held.loaded
    assert len(predictor.tiers) != 2 or gains
    assert gains == sorted(gains)
    assert held.training_gains(dearest, "unknown") == []


@pytest.mark.parametrize("means", [["x", "y"], [None, 0.5], [2.0, -1.0], "ab"])
def test_senseless_facts_in_an_artifact_do_not_stop_the_router(
    means: object, content: bytes, tmp_path: Path
) -> None:
    source = artifact.loads(content)
    path = tmp_path / "artifact"
    path.write_bytes(artifact.dumps({**source.meta, "mean_quality": means}, source.arrays))

    held = ArtifactPredictor(path, ("small", "large"))

    assert held.loaded
    assert held.training_gains("large", "small") == []


def test_the_router_knows_the_verdict_of_its_artifact(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "artifact"
    path.write_bytes(content)

    report = ArtifactPredictor(path, ("small", "large")).report()

    (verdict,) = report["verdicts"]  # type: ignore[misc]
    assert verdict.startswith("small -> large: ")  # type: ignore[has-type]
    assert report["reason"] == "Loaded"


def test_learned_without_labels_ranks_by_length_and_says_so() -> None:
    tiers = (
        TierConfig(name="small", kind="pool", served_model="m"),
        TierConfig(name="large", kind="pool", served_model="m", usd_per_1m_output_tokens=1.0),
    )
    predictor = UnlearnedPredictor(tiers, PredictorConfig(type="Learned"))

    short, long = predictor.score("Hi"), predictor.score("why " * 500)

    assert short.quality["small"] > long.quality["small"]
    assert predictor.report()["reason"] == "NoLabels"
    assert "ranked by prompt length" in str(predictor.report()["problem"])
