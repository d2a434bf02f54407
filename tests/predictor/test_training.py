"""Training learns from incomplete, constant and conflicting labels, or says why it cannot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tandem_router.predictor import ArtifactError, DataError, artifact, loads
from tandem_router.predictor.evaluation import html_report, terminal
from tandem_router.predictor.evaluation.predictions import predict_rows
from tandem_router.predictor.evaluation.report import make_report
from tandem_router.predictor.records.dataset import Dataset, read_dataset
from tandem_router.predictor.training import stacking, trainer
from tandem_router.predictor.training.labels import hybrid_labels
from tandem_router.predictor.training.options import Options

Write = Callable[..., Path]
Make = Callable[..., list[dict[str, Any]]]
TINY = Options(num_trees=4, num_folds=2, max_features=500)


def trained_on(rows: list[dict[str, Any]], write: Write, **options: Any) -> trainer.Trained:
    chosen = Options(num_trees=4, num_folds=2, max_features=500, **options)
    return trainer.train(read_dataset([write(rows)]), chosen)


def test_it_ranks_unseen_prompts_far_better_than_chance(
    trained: trainer.Trained, make_outcomes: Make, write: Write
) -> None:
    unseen = read_dataset([write(make_outcomes(400, seed=7))])
    predictions = predict_rows(loads(trained.dumps()), unseen)

    found = make_report(unseen, predictions, repeats=20)["pairs"]["small -> large"]

    assert found["methods"]["predictor"]["apgr"] > 0.65
    assert found["routable"]
    assert found["sentence"].startswith("route: saves ")


def test_heads_are_calibrated_on_unseen_prompts(
    trained: trainer.Trained, make_outcomes: Make, write: Write
) -> None:
    unseen = read_dataset([write(make_outcomes(1200, seed=8))])
    predictions = predict_rows(loads(trained.dumps()), unseen)

    heads = make_report(unseen, predictions, repeats=0)["heads"]

    # 400 training labels: each head's level alone has a standard error of 0.02
    assert heads["small"]["ece"] < 0.08
    assert heads["large"]["ece"] < 0.08
    assert heads["small"]["brier"] < heads["small"]["brier_of_the_mean"]


def test_length_quantiles_hold_what_they_say(
    trained: trainer.Trained, make_outcomes: Make, write: Write
) -> None:
    unseen = read_dataset([write(make_outcomes(300, seed=9))])

    found = make_report(unseen, predict_rows(loads(trained.dumps()), unseen), repeats=0)["lengths"][
        "small"
    ]

    assert found["pinball_q50"] < 0.7 * found["pinball_q50_of_a_constant"]
    assert found["inside_q10_to_q90"] > 0.65


def test_three_tiers_partly_graded_are_learned(make_outcomes: Make, write: Write) -> None:
    rows = make_outcomes(150)
    for index, row in enumerate(rows):
        row["quality"]["middle"] = 0.5 * (row["quality"]["small"] + row["quality"]["large"])
        if index % 3 == 1:
            del row["quality"]["large"]

    predictor = loads(trained_on(rows, write).dumps())
    score = predictor.score("What is 55 + 66? Give the sum only.")

    assert predictor.tiers == ("small", "large", "middle")
    direct = score.gain(("small", "large"))
    through = score.gain(("small", "middle")) + score.gain(("middle", "large"))
    assert direct == pytest.approx(through, abs=1e-9)


def test_tiers_never_graded_side_by_side_still_get_a_gain(
    make_outcomes: Make, write: Write
) -> None:
    rows = make_outcomes(120)
    for index, row in enumerate(rows):
        del row["quality"]["small" if index % 2 else "large"]

    score = loads(trained_on(rows, write).dumps()).score("What is 1 + 1?")

    assert -1.0 <= score.gain(("small", "large")) <= 1.0


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_constant_label_is_noted_and_learned_as_a_constant(
    make_outcomes: Make, write: Write, value: float
) -> None:
    rows = make_outcomes(120)
    for row in rows:
        row["quality"]["large"] = value
    said: list[str] = []

    found = trainer.train(read_dataset([write(rows)]), TINY, said.append)

    assert any(f"'large' has quality {value:g}: its head is a constant" in line for line in said)
    quality = loads(found.dumps()).score(rows[0]["prompt"]).quality
    assert 0.0 <= quality["large"] <= 1.0


def test_conflicting_duplicates_stay_in_one_fold_and_are_noted(
    make_outcomes: Make, write: Write
) -> None:
    rows = make_outcomes(80)
    flipped = [
        {**row, "quality": {tier: 1 - q for tier, q in row["quality"].items()}} for row in rows
    ]
    dataset = read_dataset([write(rows + flipped)])

    notes = trainer.notes(dataset)
    folds = trainer.fold_of(dataset.groups(), 4, 0)

    assert any("80 rows repeat a prompt with other labels" in note for note in notes)
    np.testing.assert_array_equal(folds[:80], folds[80:])


@pytest.mark.parametrize("form", ["deterministic", "probabilistic", "transformed"])
def test_hybrid_label_forms_train(make_outcomes: Make, write: Write, form: str) -> None:
    rows = make_outcomes(120)
    for index, row in enumerate(rows):
        row["quality"] = {
            "small": [row["quality"]["small"], float(index % 2)],
            "large": [row["quality"]["large"], 1.0],
        }

    found = trained_on(rows, write, label_form=form)

    assert found.meta["outputs"] == ["small", "large", "small -> large"]
    score = loads(found.dumps()).score(rows[0]["prompt"])
    assert -1.0 <= score.gain(("small", "large")) <= 1.0


def test_hybrid_labels_of_a_known_case(write: Write) -> None:
    rows = [
        {"prompt": "a", "quality": {"s": [0.0, 1.0], "l": [1.0, 1.0]}},
        {"prompt": "b", "quality": {"s": [0.4, 0.4], "l": [0.5, 0.6]}},
        {"prompt": "c", "quality": {"s": [1.0, 1.0], "l": [0.0, 0.0]}},
    ]
    dataset = read_dataset([write(rows)])

    def labels(form: str) -> list[float]:
        return hybrid_labels(dataset, ("s", "l"), form).tolist()

    assert labels("deterministic") == [1.0, 1.0, 0.0]
    assert labels("probabilistic") == [0.5, 1.0, 0.0]
    # a margin above 0.2 tells the large gap of `a` from the small one of `b`
    assert (
        sorted(labels("transformed")) == labels("transformed")[::-1]
        or len(set(labels("transformed"))) >= 2
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[:3], "3 rows with 3 different prompts are too few"),
        (lambda rows: [rows[0]] * 100, "100 rows with 1 different prompts are too few"),
        (
            lambda rows: [{**row, "quality": {"small": 1}} for row in rows],
            r"grades 1 tier\(s\) \(small\); a choice needs at least two",
        ),
        (
            lambda rows: [
                {**row, "quality": {"small": 1} | ({"large": 1} if i < 5 else {})}
                for i, row in enumerate(rows)
            ],
            "tier 'large' is graded on 5 rows; grade at least 20",
        ),
    ],
)
def test_data_nothing_can_be_learned_from_is_refused(
    make_outcomes: Make, write: Write, change: Any, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        trainer.train(read_dataset([write(change(make_outcomes(60)))]), TINY)


def test_probabilistic_labels_without_samples_name_the_other_form(
    make_outcomes: Make, write: Write
) -> None:
    with pytest.raises(DataError, match=r"needs several graded answers.*use `deterministic`"):
        trained_on(make_outcomes(60), write, label_form="probabilistic")


def layout(views: tuple[str, ...], core: tuple[str, ...]) -> stacking.Layout:
    return stacking.Layout(("a", "b"), views, dict.fromkeys(core, 1.0), ((0, 1),), ("a", "b"))


def synthetic(count: int, good: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two useless views and a third that knows the gain; or three that know it equally well."""
    draw = np.random.default_rng(0)
    truth = draw.normal(size=count) * 0.3
    labels = np.stack([np.zeros(count), truth + draw.normal(size=count) * 0.3], axis=1)
    views = draw.normal(size=(count, 3, 2)) * 0.1
    if good:
        views[:, 2, 1] = truth
    else:
        views[:, :, 1] = truth[:, None] + draw.normal(size=(count, 3)) * 0.5
    return views, labels, np.arange(count) % 5


def test_much_evidence_overrules_the_average() -> None:
    views, labels, folds = synthetic(3000, good=True)

    stack = stacking.fit(views, labels, folds, layout(("x", "y", "z"), ("x", "y")))

    shares = stack.report["gain"]["a -> b"]
    assert shares["average"] < 0.1


def test_without_evidence_the_average_stays() -> None:
    views, labels, folds = synthetic(300, good=False)

    stack = stacking.fit(views, labels, folds, layout(("x", "y", "z"), ("x", "y", "z")))

    assert stack.report["gain"]["a -> b"]["average"] > 0.5


def three_views(gain: np.ndarray, tiers: int) -> np.ndarray:
    """Views that know a tier's lead over the one before, but say 0.1 too much and half as much."""
    shy = 0.1 + 0.5 * gain
    steps = np.concatenate((np.zeros((len(gain), 1)), np.cumsum(shy, axis=1)), axis=1)
    return np.repeat(steps[:, None, :tiers], 3, axis=1)


def test_a_shy_average_is_bent_to_the_gain_that_was_seen() -> None:
    draw = np.random.default_rng(0)
    gain = np.where(draw.random(4000) < 0.6, 0.0, 0.9)[:, None]
    labels = np.concatenate((np.zeros((4000, 1)), draw.random((4000, 1)) < gain), axis=1)
    views = three_views(gain, 2) + 0.02 * draw.normal(size=(4000, 3, 2))
    folds = np.arange(4000) % 5

    _, utility = stacking.fit(views, labels, folds, layout(("x", "y", "z"), ("x", "y", "z"))).apply(
        views
    )

    said = utility[:, 1] - utility[:, 0]
    assert abs(said[gain[:, 0] == 0.0].mean()) < 0.02
    assert abs(said[gain[:, 0] == 0.9].mean() - 0.9) < 0.08  # the views say 0.55
    np.testing.assert_allclose(utility.sum(axis=1), 0.0, atol=1e-9)


def test_a_gain_that_is_right_already_is_not_bent() -> None:
    views, labels, folds = synthetic(1500, good=True)

    stack = stacking.fit(views, labels, folds, layout(("x", "y", "z"), ("z",)))

    np.testing.assert_array_equal(stack.steps[0][0], stack.steps[0][1])


def test_bending_a_gain_keeps_the_order_of_the_prompts() -> None:
    draw = np.random.default_rng(2)
    gain = np.where(draw.random(1500) < 0.6, 0.0, 0.9)[:, None]
    labels = np.concatenate((np.zeros((1500, 1)), draw.random((1500, 1)) < gain), axis=1)
    views = three_views(gain, 2) + 0.2 * draw.normal(size=(1500, 3, 2))
    stack = stacking.fit(
        views, labels, np.arange(1500) % 5, layout(("x", "y", "z"), ("x", "y", "z"))
    )
    assert len(stack.steps[0][0]) > 2

    raw = np.diff(stack.raw_utility(views), axis=1)[:, 0]
    said = np.diff(stack.apply(views)[1], axis=1)[:, 0]

    assert (np.diff(said[np.argsort(raw)]) >= -1e-12).all()


def test_of_three_tiers_each_step_is_bent_by_itself() -> None:
    draw = np.random.default_rng(1)
    gain = np.stack([0.4 * (draw.random(4000) < 0.5), 0.2 * (draw.random(4000) < 0.5)], axis=1)
    quality = 0.3 + np.concatenate((np.zeros((4000, 1)), np.cumsum(gain, axis=1)), axis=1)
    labels = (draw.random((4000, 3)) < quality).astype(float)
    labels[:1000, 2] = np.nan
    three = stacking.Layout(
        ("a", "b", "c"), ("x",), {"x": 1.0}, ((0, 1), (0, 2), (1, 2)), ("a", "b", "c")
    )
    views = three_views(gain, 3)[:, :1]

    _, utility = stacking.fit(views, labels, np.arange(4000) % 5, three).apply(views)

    for step in (0, 1):
        for value in np.unique(gain[:, step]):
            rows = gain[:, step] == value
            said = (utility[rows, step + 1] - utility[rows, step]).mean()
            assert abs(said - value) < 0.06


def test_tiers_never_graded_side_by_side_keep_the_difference_of_their_heads() -> None:
    views, labels, folds = synthetic(400, good=True)
    labels[:200, 0], labels[200:, 1] = np.nan, np.nan
    stack = stacking.fit(views, labels, folds, layout(("x", "y", "z"), ("x", "y", "z")))

    raw = np.diff(stack.raw_utility(views), axis=1)
    np.testing.assert_allclose(np.diff(stack.apply(views)[1], axis=1), raw, atol=1e-9)


def test_the_verifier_travels_in_the_artifact(make_outcomes: Make, write: Write) -> None:
    rows = make_outcomes(150)
    for row in rows:
        right = row["quality"]["small"] == 1.0
        row["responses"] = {"small": f"It is {'certainly' if right else 'perhaps'} so."}

    predictor = loads(trained_on(rows, write).dumps())

    assert predictor.cascade is not None
    assert (predictor.cascade.first, predictor.cascade.second) == ("small", "large")
    sure = predictor.cascade.verifier.verify(rows[0]["prompt"], "It is certainly so.")
    unsure = predictor.cascade.verifier.verify(rows[0]["prompt"], "It is perhaps so.")
    assert sure.gain < unsure.gain


def test_each_view_of_the_verifier_is_told_with_its_worth(
    make_outcomes: Make, write: Write
) -> None:
    def answered(num: int, seed: int) -> list[dict[str, Any]]:
        """Words give the answer away, tokens now and then, a judge mostly, its question hardly."""
        rows, rng = make_outcomes(num, seed=seed), np.random.default_rng(seed)
        for row in rows:
            right = bool(row["quality"]["small"] == 1.0)
            row["responses"] = {"small": f"It is {'certainly' if right else 'perhaps'} so."}
            sure = -0.1 if right != (rng.random() < 0.2) else -0.9
            names = ("mean_logprob", "lowest_logprob", "final_logprob")
            tokens = {"num_tokens": 5, "doubtful_share": 0.1, **dict.fromkeys(names, sure)}
            row["token_statistics"] = {"small": tokens}
            row["judged"] = {"small": float(right != (rng.random() < 0.1))}
        return rows

    predictor = loads(trained_on(answered(150, 0), write).dumps())
    unseen = read_dataset([write(answered(100, 7))])
    found = make_report(unseen, predict_rows(predictor, unseen), repeats=20)

    views = found["cascade"]["views"]
    assert set(views) == {
        "form and sums of the answer",
        "words of the answer",
        "words of the question",
        "agreement with reference pairs",
        "certainty of tokens",
        "a judge of the answer",
    }
    words, tokens = views["words of the answer"], views["certainty of tokens"]
    assert (words["auc"], words["false_positive_rate"]) == (1.0, 0.0)
    assert 0.7 < tokens["auc_interval"][0] <= tokens["auc"] <= tokens["auc_interval"][1] < 0.95
    judge = views["a judge of the answer"]
    assert 0.8 < judge["auc_interval"][0] <= judge["auc"] <= judge["auc_interval"][1] < 1.0
    low, high = judge["false_positive_rate_interval"]
    assert low <= judge["false_positive_rate"] <= high < 0.3
    assert any("by itself, certainty of tokens: AUC 0." in line for line in terminal.lines(found))
    assert "By itself, words of the answer: AUC 1.000" in html_report.render(found, "t")


def test_real_outcomes_are_routed_better_than_by_length() -> None:
    path = Path(__file__).resolve().parents[3] / "shared" / "data" / "routing" / "gsm8k.jsonl.gz"
    if not path.exists():
        pytest.skip(
            f"{path} is not on this machine: only made-up outcomes are learned from here, and that "
            "real ones are ranked is shown where the data stands beside the checkout"
        )
    dataset = read_dataset([path])
    folds = trainer.fold_of(dataset.groups(), 3, 0)
    inside, outside = np.flatnonzero(folds != 0), np.flatnonzero(folds == 0)

    options = Options(num_trees=20, num_folds=3, max_bytes=400_000)
    predictor = loads(trainer.train(dataset.take(inside), options).dumps())
    rest = dataset.take(outside)
    found = make_report(rest, predict_rows(predictor, rest), repeats=0)

    methods = found["pairs"]["small -> large"]["methods"]
    assert methods["predictor"]["apgr"] > max(0.57, methods["prompt length"]["apgr"])


def test_tiers_that_are_always_right_are_not_routable(write: Write, make_outcomes: Make) -> None:
    rows = [{**row, "quality": {"small": 1, "large": 1}} for row in make_outcomes(60)]
    dataset = read_dataset([write(rows)])

    predictor = loads(trainer.train(dataset, TINY).dumps())
    found = make_report(dataset, predict_rows(predictor, dataset), repeats=5)

    assert all(not pair["routable"] for pair in found["pairs"].values())
    assert predictor.score("anything").gain(("small", "large")) == pytest.approx(0.0, abs=1e-3)


def test_ten_megabyte_and_binary_prompts_can_be_trained_on(
    write: Write, make_outcomes: Make
) -> None:
    rows = make_outcomes(60)
    rows[3]["prompt"] = "many words " * 900_000
    rows[4]["prompt"] = "\x00\ud800\x1b" * 300

    predictor = loads(trainer.train(read_dataset([write(rows)]), TINY).dumps())

    assert 0.0 <= predictor.score("What is 1 + 1?").quality["small"] <= 1.0


def test_a_size_limit_that_cannot_be_kept_is_said(
    make_outcomes: Make, write: Write, small_options: Options
) -> None:
    dataset = read_dataset([write(make_outcomes(60))])
    trained = trainer.train(dataset, replace(small_options, max_bytes=1000))

    with pytest.raises(ArtifactError, match=r"more than the 1,000 of --max-bytes.*: allow"):
        trained.dumps()


def test_answers_that_cannot_be_held_out_give_no_verifier(
    make_outcomes: Make, write: Write, small_options: Options
) -> None:
    rows = [{**row, "responses": {"small": "4"}, "group": "g"} for row in make_outcomes(110)]
    said: list[str] = []

    trained = trainer.train(
        read_dataset([write(rows + make_outcomes(60, seed=1))]), small_options, said.append
    )

    assert trained.meta["cascade"] is None
    assert any("in too few groups to check a verifier" in line for line in said)


def test_many_tiers_graded_here_and_there_share_out_the_size_of_an_artifact(
    make_outcomes: Make,
    write: Write,
    small_options: Options,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every tier graded on rows of its own has forests of its own."""
    draw = np.random.default_rng(0)
    rows = [
        {**row, "quality": {f"t{i}": float(draw.random() < 0.5) for i in draw.permutation(8)[:5]}}
        for row in make_outcomes(300)
    ]
    dataset = read_dataset([write(rows)])
    options = replace(small_options, num_trees=60)
    unlimited = len(trainer.train(dataset, options).dumps())

    monkeypatch.setattr(artifact, "MAX_BYTES", unlimited - 100_000)
    limited = trainer.train(dataset, options).dumps()

    assert len(limited) <= unlimited - 100_000
    assert loads(limited).tiers == dataset.tiers


@pytest.mark.parametrize(
    "option",
    [{"num_folds": 1}, {"num_trees": 0}, {"max_features": 0}, {"seed": -1}, {"seed": 2**32}],
)
def test_an_option_out_of_bounds_is_named(option: dict[str, int], dataset: Dataset) -> None:
    ((name, value),) = option.items()

    with pytest.raises(DataError, match=f"{name}={value} is not between "):
        trainer.train(dataset, Options(**option))  # type: ignore[arg-type]
