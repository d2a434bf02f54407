"""The report says what a pair saves, or that it is not routable and why."""

from __future__ import annotations

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tandem_router.predictor import ArtifactError, DataError, Predictor
from tandem_router.predictor.evaluation import baselines, html_report, terminal
from tandem_router.predictor.evaluation.predictions import Predictions, predict_rows
from tandem_router.predictor.evaluation.report import NUM_SURPRISES, make_report
from tandem_router.predictor.records.dataset import Dataset, read_dataset
from tandem_router.predictor.training import crossval
from tandem_router.predictor.training.options import Options

Write = Callable[..., Path]


@pytest.fixture(scope="module")
def report(predictor: Predictor, dataset: Dataset) -> dict[str, Any]:
    return make_report(dataset, predict_rows(predictor, dataset), repeats=30)


def test_every_baseline_stands_beside_the_predictor(report: dict[str, Any]) -> None:
    methods = report["pairs"]["small -> large"]["methods"]

    assert set(methods) == {
        "predictor",
        "random",
        "prompt length",
        "task table",
        "TF-IDF pair",
        "ridge gain",
        "kNN",
        "P(small wrong)",
        "oracle",
    }
    assert methods["random"]["apgr"] == pytest.approx(0.5)
    assert methods["oracle"]["apgr"] >= methods["predictor"]["apgr"]


def test_every_number_has_an_interval_around_it(report: dict[str, Any]) -> None:
    own = report["pairs"]["small -> large"]["methods"]["predictor"]

    for name in ("apgr", "cpt50", "cpt80", "saved_at_no_drop", "saved_at_1_percent_drop"):
        low, high = own[f"{name}_interval"]
        assert low <= high
    assert own["apgr_interval"][0] - 0.05 <= own["apgr"] <= own["apgr_interval"][1] + 0.05
    for head in report["heads"].values():
        for name in ("ece", "brier"):
            assert head[f"{name}_interval"][0] <= head[f"{name}_interval"][1]
    for length in report["lengths"].values():
        for name in ("pinball_q10", "pinball_q50", "pinball_q90"):
            assert length[f"{name}_interval"][0] <= length[name] <= length[f"{name}_interval"][1]


def test_the_report_is_plain_json(report: dict[str, Any]) -> None:
    assert json.loads(json.dumps(report, allow_nan=False))["data"]["num_rows"] == 400


def test_a_pair_is_reported_once_from_the_cheaper_to_the_dearer_tier(
    report: dict[str, Any],
) -> None:
    assert list(report["pairs"]) == ["small -> large"]


def constructed(gain: np.ndarray, dataset: Dataset) -> Predictions:
    count = len(gain)
    utility = np.stack([np.zeros(count), gain], axis=1)
    return Predictions(
        ("small", "large"),
        np.full((count, 2), 0.5),
        utility,
        {"random": np.zeros((count, 2))},
        {},
        np.zeros(count, dtype=bool),
        np.zeros(count, dtype=np.int64),
        {},
    )


def test_a_ranking_no_better_than_chance_is_called_not_routable(dataset: Dataset) -> None:
    noise = np.random.default_rng(0).normal(size=len(dataset.rows))

    found = make_report(dataset, constructed(noise, dataset), repeats=100)

    pair = found["pairs"]["small -> large"]
    assert not pair["routable"]
    assert "chance" in pair["sentence"]


def test_saved_calls_of_a_perfect_ranking(dataset: Dataset) -> None:
    labels = dataset.quality()
    gain = labels[:, 1] - labels[:, 0]

    found = make_report(dataset, constructed(gain, dataset), repeats=0)

    own = found["pairs"]["small -> large"]["methods"]["predictor"]
    assert own["saved_at_no_drop"] >= np.mean(gain <= 0.0)


def test_the_most_surprising_rows_are_the_farthest_from_the_forecast(
    report: dict[str, Any],
) -> None:
    first = report["surprises"][0]
    expected = first["predicted"]["large"] - first["predicted"]["small"]
    actual = first["quality"]["large"] - first["quality"]["small"]

    assert abs(actual - expected) > 0.5


def test_the_page_is_whole_escaped_and_needs_no_network(
    predictor: Predictor, write: Write, rows: list[dict[str, Any]]
) -> None:
    hostile = [{**row, "prompt": row["prompt"] + "<script>alert(1)</script>"} for row in rows[:60]]
    dataset = read_dataset([write(hostile)])
    found = make_report(dataset, predict_rows(predictor, dataset), repeats=10)

    html = html_report.render(found, "Predictor <b>")

    assert "<script" not in html
    assert "http://" not in html.replace("http://www.w3.org", "")
    assert html.count("<svg") == html.count("</svg>") == 2
    assert "Predictor &lt;b&gt;" in html
    open_tags: list[str] = []

    class Balance(HTMLParser):
        def handle_starttag(self, tag: str, attrs: Any) -> None:
            if tag not in ("meta", "br", "line", "polyline", "circle"):
                open_tags.append(tag)

        def handle_startendtag(self, tag: str, attrs: Any) -> None:
            pass

        def handle_endtag(self, tag: str) -> None:
            assert open_tags.pop() == tag

    Balance().feed(html)
    assert open_tags == []


def test_data_that_grades_other_tiers_is_refused(predictor: Predictor, write: Write) -> None:
    rows = [{"prompt": f"p{i}", "quality": {"tiny": 1, "huge": 0}} for i in range(30)]
    dataset = read_dataset([write(rows)])

    with pytest.raises(DataError, match="the predictor knows small, large; evaluation needs two"):
        make_report(dataset, predict_rows(predictor, dataset))


def test_rows_graded_apart_cannot_be_evaluated(predictor: Predictor, write: Write) -> None:
    rows = [{"prompt": f"p{i}", "quality": {"small" if i % 2 else "large": 1}} for i in range(30)]
    dataset = read_dataset([write(rows)])

    with pytest.raises(DataError, match="needs prompts that both tiers answered"):
        make_report(dataset, predict_rows(predictor, dataset))


def test_cross_validation_predicts_every_row_once_by_a_stranger(
    dataset: Dataset,
) -> None:
    part = dataset.take(range(120))
    options = Options(num_trees=4, num_folds=2, max_features=500)

    predictions = crossval.cross_validate(part, options, 2)

    assert predictions.quality.shape == (120, 2)
    assert set(np.unique(predictions.fold)) == {0, 1}
    assert (predictions.quality.sum(axis=1) > 0).all()


@pytest.mark.parametrize("num_folds", [1, 99])
def test_impossible_numbers_of_folds_are_refused(dataset: Dataset, num_folds: int) -> None:
    with pytest.raises(DataError, match=r"folds are not possible .* use --cross-validate 2 to"):
        crossval.cross_validate(dataset.take(range(60)), Options(), num_folds)


def test_a_bad_ranking_is_not_routable_without_intervals_either(dataset: Dataset) -> None:
    labels = dataset.quality()

    found = make_report(dataset, constructed(labels[:, 0] - labels[:, 1], dataset), repeats=0)

    assert not found["pairs"]["small -> large"]["routable"]


def test_a_pair_that_saves_no_more_than_mixing_near_the_better_tier_is_not_routed(
    write: Write,
) -> None:
    """Most of the gap is found at once, but five rows that need the large tier come last."""
    small = [0] * 100 + [1] * 195 + [0] * 5
    rows = [{"prompt": f"p{i}", "quality": {"small": q, "large": 1}} for i, q in enumerate(small)]
    dataset = read_dataset([write(rows)])

    found = make_report(dataset, constructed(-np.arange(300.0), dataset), repeats=50)

    pair = found["pairs"]["small -> large"]
    assert not pair["routable"]
    assert "too little is predictable of which prompts need it" in pair["sentence"]


def test_a_ranking_that_saves_only_below_half_a_point_gets_its_floors_beside_mixing(
    write: Write,
) -> None:
    """Small is right in two thirds; the ranking finds most of what it cannot, not all."""
    needs_large = [i % 3 == 0 for i in range(300)]
    path = write(
        [
            {"prompt": f"question {i}", "quality": {"small": 1.0 - needs, "large": 1.0}}
            for i, needs in enumerate(needs_large)
        ]
    )
    dataset = read_dataset([path])
    gain = np.array([needs - 2.0 * (i % 30 == 0) + i / 1000 for i, needs in enumerate(needs_large)])

    found = make_report(dataset, constructed(gain, dataset), repeats=50)
    pair = found["pairs"]["small -> large"]
    at_95 = next(row for row in pair["floors"] if row["floor"] == 0.95)
    said = "\n".join(terminal.sentences(found))

    assert not pair["routable"]
    assert at_95["mixed"] == pytest.approx(0.15)
    assert at_95["saved"] > 2 * at_95["mixed"]
    assert at_95["quality"] >= 0.95
    assert "what a floor that loses more than half a point saves all the same" in said
    assert 'objective: {qualityFloor: "0.95"}' in said


def test_surprising_rows_are_of_different_groups(predictor: Predictor, write: Write) -> None:
    same = [{"prompt": "What is 7 + 8?", "quality": {"small": 1, "large": 0}}] * 30
    other = [{"prompt": f"p{i}", "quality": {"small": 0, "large": 1}} for i in range(30)]
    dataset = read_dataset([write(same + other)])

    found = make_report(dataset, predict_rows(predictor, dataset), repeats=0)

    prompts = [row["prompt"] for row in found["surprises"]]
    assert len(prompts) == len(set(prompts)) == NUM_SURPRISES


def test_a_pair_that_too_few_rows_grade_is_named(write: Write) -> None:
    rows = [
        {"prompt": f"p{i}", "quality": {"small": i % 2, ("mid" if i % 3 else "large"): 1}}
        for i in range(60)
    ]
    dataset = read_dataset([write(rows)])
    known = np.zeros((60, 3))
    found = make_report(
        dataset,
        Predictions(
            dataset.tiers,
            known,
            known,
            {"random": known},
            {},
            known[:, 0] > 0,
            known[:, 0].astype(int),
            {},
        ),
        repeats=0,
    )

    assert [sentence[:14] for sentence in found["not_judged"]] == ["large and mid "]
    assert terminal.lines(found)[-1].startswith("large and mid are graded side by side on 0 rows")
    assert "large and mid are graded side by side" in html_report.render(found, "t")


@pytest.mark.parametrize(
    "facts",
    [
        {"mean_quality": ["x", "y"]},
        {"mean_quality": [0.5]},
        {"task_table": {"sums": [1.0]}},
        {"task_table": {"sums": "no"}},
        {"task_table": [1]},
    ],
)
def test_a_damaged_task_table_is_one_sentence(
    facts: dict[str, Any], dataset: Dataset, predictor: Predictor
) -> None:
    views = np.zeros((len(dataset.rows), 0, 2))

    with pytest.raises(ArtifactError, match=r"its task table .* damaged"):
        baselines.baselines(dataset, predictor.tiers, views, (), facts)
