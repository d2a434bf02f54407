"""The cascade's verifier, trained with the predictor where the data holds answers.

The tier that is worst on average answers first; where its answers (`responses`) are in the data,
an :class:`~tandem_router.predictor.cascade.AnswerVerifier` learns to tell right from wrong ones.
It travels in the same artifact, with its power: how its score falls for right and for wrong
answers held out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tandem_router.predictor.artifact import Arrays
from tandem_router.predictor.cascade.stored import inputs, weighed
from tandem_router.predictor.cascade.token_statistics import TokenStatistics
from tandem_router.predictor.cascade.verifier import (
    NO_SPREAD,
    VIEWS,
    AnswerVerifier,
    VerifierViews,
    features_of,
    logit,
    scaled_features,
    sigmoid,
)
from tandem_router.predictor.cascade.zones import VerifierPower
from tandem_router.predictor.evaluation import metrics
from tandem_router.predictor.linear_algebra import FloatArray
from tandem_router.predictor.records.dataset import Dataset
from tandem_router.predictor.training.corpus import Corpus
from tandem_router.predictor.training.estimators import TextView

MIN_ROWS = 100
NUM_FOLDS = 3
#: Rows a verifier needs at least.
VERIFIER_MIN_ROWS = 40
MAX_REFERENCES = 2048
MAX_WORDS = 2**14
#: Ridge penalty of the weights of views.
MIXTURE_PENALTY = 2.0
#: Points of APGR by which verdict and prediction together have to lead out of fold; on GSM8K's 791
#: rows, where the prompt says little, they lost .013.
LEAST_LEAD = 0.02


def fit_verifier(
    prompts: Sequence[str],
    answers: Sequence[str],
    quality: FloatArray,
    tokens: Sequence[TokenStatistics | None] | None = None,
    *,
    seed: int = 0,
) -> AnswerVerifier:
    """Learn from answered prompts.

    Args:
        prompts, answers: the small tier's answers and what they answer.
        quality: measured quality of small and large, 0..1, (num_rows, 2).
        tokens: per row how sure the small tier was of its tokens, where known.
        seed: of the calibration folds and the choice of references.

    Raises:
        ValueError: fewer than 40 rows, misaligned inputs, or labels outside 0..1.
    """
    quality = np.asarray(quality, dtype=np.float64)
    if quality.shape != (len(prompts), 2) or len(answers) != len(prompts):
        raise ValueError(
            f"{len(prompts)} prompts, {len(answers)} answers and qualities of shape "
            f"{quality.shape} do not belong together; give one row of (small, large) each"
        )
    if len(prompts) < VERIFIER_MIN_ROWS:
        raise ValueError(
            f"{len(prompts)} answered prompts are too few to learn a verifier; "
            f"label at least {VERIFIER_MIN_ROWS}"
        )
    if not ((quality >= 0.0) & (quality <= 1.0)).all():
        raise ValueError("a quality is NaN or outside 0..1; rescale the labels")
    x = features_of(prompts, answers, tokens)
    asked, said = Corpus.of_words(prompts), Corpus.of_words(answers)
    folds = np.random.default_rng(seed).permutation(len(x)) % 5
    held_out = np.zeros((len(x), 2, len(VIEWS)))
    for fold in range(5):
        inside, outside = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
        part = _fit_views(x[inside], asked.take(inside), said.take(inside), quality[inside], seed)
        held_out[outside] = part.logits(
            x[outside], [prompts[int(i)] for i in outside], [answers[int(i)] for i in outside]
        )
    mixture = np.stack(
        [fit_logistic(held_out[:, head], quality[:, head], MIXTURE_PENALTY) for head in range(2)]
    )
    return AnswerVerifier(_fit_views(x, asked, said, quality, seed), mixture)


def _fit_views(
    x: FloatArray, asked: Corpus, said: Corpus, quality: FloatArray, seed: int
) -> VerifierViews:
    mean, scale = x.mean(axis=0), np.maximum(x.std(axis=0), NO_SPREAD)
    scaled = scaled_features(x, mean, scale)
    keep = np.random.default_rng(seed).permutation(len(x))[:MAX_REFERENCES]
    answer_words, prompt_words = (
        TextView("word", "logistic", 1.0, 2, MAX_WORDS).fit(part, quality).export_logit()
        for part in (said, asked)
    )
    return VerifierViews(
        mean,
        scale,
        np.stack([fit_logistic(scaled, quality[:, head], 20.0) for head in range(2)]),
        answer_words,
        prompt_words,
        scaled[keep],
        quality[keep],
    )


def fit_logistic(x: FloatArray, y: FloatArray, penalty: float, steps: int = 25) -> FloatArray:
    """Ridge logistic regression on soft labels by Newton's method; bias last, hardly penalised."""
    design = np.column_stack([x, np.ones(len(x))])
    ridge = np.diag(np.append(np.full(x.shape[1], penalty), 1e-6))
    weights = np.zeros(design.shape[1])
    for _ in range(steps):
        p = sigmoid(design @ weights)
        gradient = design.T @ (p - y) + ridge @ weights
        hessian = (design * np.maximum(p * (1 - p), 1e-6)[:, None]).T @ design + ridge
        move = np.linalg.solve(hessian, gradient)
        weights = weights - move * min(1.0, 5.0 / max(1e-12, float(np.abs(move).max())))
        if np.abs(move).max() < 1e-8:
            break
    return weights


@dataclass(frozen=True, slots=True)
class _Answered:
    """The rows with an answer of the tier that goes first, and both grades."""

    tiers: tuple[str, str]
    rows: npt.NDArray[np.int64]
    prompts: list[str]
    answers: list[str]
    tokens: list[TokenStatistics | None]
    quality: FloatArray  # (num_answered, 2)


def _answered(dataset: Dataset) -> _Answered | None:
    labels = dataset.quality()
    means = np.array([np.nanmean(column) for column in labels.T])
    first, second = int(np.argmin(means)), int(np.argmax(means))
    name = dataset.tiers[first]
    rows = np.array(
        [
            index
            for index, row in enumerate(dataset.rows)
            if name in row.responses and not np.isnan(labels[index, [first, second]]).any()
        ],
        dtype=np.int64,
    )
    if first == second or len(rows) < MIN_ROWS:
        return None
    return _Answered(
        (name, dataset.tiers[second]),
        rows,
        [dataset.rows[i].prompt for i in rows],
        [dataset.rows[i].responses[name] for i in rows],
        [dataset.rows[i].token_statistics.get(name) for i in rows],
        labels[rows][:, [first, second]],
    )


def _can_hold_out(folds: npt.NDArray[np.int64]) -> bool:
    """Whether there are parts to leave out, and enough rows left to learn from without each."""
    _, sizes = np.unique(folds, return_counts=True)
    return len(sizes) > 1 and len(folds) - int(sizes.max()) >= VERIFIER_MIN_ROWS


def _combined(x: FloatArray, quality: FloatArray) -> FloatArray:
    """Weights of verdicts and predictions, and a bias, per tier (2, 5)."""
    return np.stack([fit_logistic(x, quality[:, head], 1.0) for head in range(2)])


def _held_out(known: _Answered, folds: npt.NDArray[np.int64], seed: int) -> FloatArray:
    out = np.zeros_like(known.quality)
    for fold in np.unique(folds):
        inside, outside = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
        part = fit_verifier(
            [known.prompts[i] for i in inside],
            [known.answers[i] for i in inside],
            known.quality[inside],
            [known.tokens[i] for i in inside],
            seed=seed,
        )
        out[outside] = part.predict(
            [known.prompts[i] for i in outside],
            [known.answers[i] for i in outside],
            [known.tokens[i] for i in outside],
        )
    return out


def train(
    dataset: Dataset,
    folds: npt.NDArray[np.int64],
    seed: int,
    progress: Callable[[str], None],
    predicted: FloatArray,
) -> tuple[dict[str, Any] | None, Arrays]:
    """Metadata and arrays of a verifier, or None where too few graded answers are given.

    predicted: out-of-fold quality of each tier by the prompt alone, (num_rows, num_tiers): what is
    told of an answer is verdict and prediction together, and the verifier's power is what it adds.
    """
    known = _answered(dataset)
    if known is None:
        return None, {}
    parts = folds[known.rows] % NUM_FOLDS
    if not _can_hold_out(parts):
        progress(
            f"note: the answers of {known.tiers[0]} are in too few groups to check a verifier of "
            "answers on; it is left out"
        )
        return None, {}
    progress(f"learning to read the answers of {known.tiers[0]}")
    quality = known.quality
    held_out = _held_out(known, parts, seed)
    verifier = fit_verifier(known.prompts, known.answers, quality, known.tokens, seed=seed)
    tiers = [dataset.tiers.index(tier) for tier in known.tiers]
    prior = predicted[known.rows][:, tiers]
    x = inputs(held_out, prior)
    combination = _combined(x, quality)
    together = np.zeros_like(held_out)
    for part in np.unique(parts):
        inside, outside = parts != part, parts == part
        rest = _combined(x[inside], quality[inside])
        together[outside] = weighed(rest, held_out[outside], prior[outside])
    added = logit(together[:, 0]) - logit(np.clip(prior[:, 0], 0.0, 1.0))
    power = VerifierPower.measure(added, quality[:, 0])
    apgr = metrics.apgr(together[:, 1] - together[:, 0], quality[:, 0], quality[:, 1])
    alone = metrics.apgr(held_out[:, 1] - held_out[:, 0], quality[:, 0], quality[:, 1])
    joins = apgr is None or alone is None or apgr >= alone + LEAST_LEAD
    if not joins:
        # What the verifier says holds the prompt's prediction already.
        power, apgr = VerifierPower.measure(held_out[:, 0], quality[:, 0]), alone
    described = {
        "first": known.tiers[0],
        "second": known.tiers[1],
        "num_rows": len(known.rows),
        "given_right": [round(float(value), 9) for value in power.given_right],
        "given_wrong": [round(float(value), 9) for value in power.given_wrong],
        "apgr_out_of_fold": None if apgr is None else round(apgr, 6),
    }
    arrays = {f"cascade/{key}": value for key, value in verifier.to_arrays().items()}
    if joins:
        arrays["cascade/combination"] = combination
    return described, arrays
