"""The cascade's verifier, trained and judged with the predictor where the data holds answers.

The tier that is worst on average answers first; where its answers (`responses`) are in the data,
:class:`tandem_router.predictor.cascade.AnswerVerifier` learns to tell right from wrong ones. It
travels in the same artifact, with its power: how its score falls for right and for wrong answers
held out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tandem_router.predictor.artifact import Arrays
from tandem_router.predictor.cascade import AnswerVerifier, VerifierPower
from tandem_router.predictor.cascade.verifier import MIN_ROWS as VERIFIER_MIN_ROWS
from tandem_router.predictor.errors import ArtifactError
from tandem_router.predictor.evaluation import metrics
from tandem_router.predictor.linear_algebra import FloatArray
from tandem_router.predictor.training.dataset import Dataset

MIN_ROWS = 100
NUM_FOLDS = 3


@dataclass(frozen=True, slots=True)
class Cascade:
    """A verifier with the tiers it stands between."""

    first: str
    second: str
    verifier: AnswerVerifier
    power: VerifierPower


@dataclass(frozen=True, slots=True)
class _Answered:
    """The rows with an answer of the tier that goes first, and both grades."""

    tiers: tuple[str, str]
    rows: npt.NDArray[np.int64]
    prompts: list[str]
    answers: list[str]
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
        labels[rows][:, [first, second]],
    )


def _can_hold_out(folds: npt.NDArray[np.int64]) -> bool:
    """Whether there are parts to leave out, and enough rows left to learn from without each."""
    _, sizes = np.unique(folds, return_counts=True)
    return len(sizes) > 1 and len(folds) - int(sizes.max()) >= VERIFIER_MIN_ROWS


def _held_out(known: _Answered, folds: npt.NDArray[np.int64], seed: int) -> FloatArray:
    out = np.zeros_like(known.quality)
    for fold in np.unique(folds):
        inside, outside = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
        part = AnswerVerifier(seed).fit(
            [known.prompts[i] for i in inside],
            [known.answers[i] for i in inside],
            known.quality[inside],
        )
        out[outside] = part.predict(
            [known.prompts[i] for i in outside], [known.answers[i] for i in outside]
        )
    return out


def cross_fit(
    dataset: Dataset, folds: npt.NDArray[np.int64], seed: int
) -> tuple[tuple[str, str], FloatArray] | None:
    """The tiers of the cascade and each row's verdict by a verifier of other folds."""
    known = _answered(dataset)
    if known is None or not _can_hold_out(folds[known.rows]):
        return None
    out = np.full((len(dataset.rows), 2), np.nan)
    out[known.rows] = _held_out(known, folds[known.rows], seed)
    return known.tiers, out


def train(
    dataset: Dataset, folds: npt.NDArray[np.int64], seed: int, progress: Callable[[str], None]
) -> tuple[dict[str, Any] | None, Arrays]:
    """Metadata and arrays of a verifier, or None where too few graded answers are given."""
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
    verifier = AnswerVerifier(seed).fit(known.prompts, known.answers, quality)
    power = VerifierPower.measure(held_out[:, 0], quality[:, 0])
    apgr = metrics.apgr(held_out[:, 1] - held_out[:, 0], quality[:, 0], quality[:, 1])
    described = {
        "first": known.tiers[0],
        "second": known.tiers[1],
        "num_rows": len(known.rows),
        "given_right": [round(float(value), 9) for value in power.given_right],
        "given_wrong": [round(float(value), 9) for value in power.given_wrong],
        "apgr_out_of_fold": None if apgr is None else round(apgr, 6),
    }
    arrays = {
        f"cascade/{key}": value.astype(np.int32) if value.dtype.kind == "i" else value
        for key, value in verifier.to_arrays().items()
    }
    return described, arrays


def build(described: Any, arrays: Arrays, tiers: tuple[str, ...]) -> Cascade | None:
    """The cascade of an artifact; :class:`ArtifactError` where its parts do not fit."""
    if described is None:
        return None
    try:
        first, second = described["first"], described["second"]
        if first not in tiers or second not in tiers:
            raise ArtifactError("its verifier is for unknown tiers: damaged")
        power = [
            tuple(float(value) for value in described[key])
            for key in ("given_right", "given_wrong")
        ]
        lengths = {len(shares) for shares in power}
        if len(lengths) != 1 or not 2 <= lengths.pop() <= 64 or min(map(min, power)) <= 0:
            raise ArtifactError("its verifier's power is not two rows of shares: damaged")
        return Cascade(first, second, AnswerVerifier.from_arrays(arrays), VerifierPower(*power))
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"its verifier cannot be used ({error}): damaged; train again"
        ) from error


def verdicts(cascade: Cascade, dataset: Dataset) -> FloatArray:
    """Quality of both tiers after the first one's answer ``(num_rows, 2)``; NaN without one."""
    out = np.full((len(dataset.rows), 2), np.nan)
    rows = [i for i, row in enumerate(dataset.rows) if cascade.first in row.responses]
    if rows:
        out[rows] = cascade.verifier.predict(
            [dataset.rows[i].prompt for i in rows],
            [dataset.rows[i].responses[cascade.first] for i in rows],
        )
    return out


def report(
    found: FloatArray,
    quality: FloatArray,
    names: tuple[str, str],
    groups: npt.NDArray[Any],
    folds: npt.NDArray[np.int64],
    repeats: int,
    seed: int,
) -> Mapping[str, Any] | None:
    """What routing gains when the first tier's answer is read before deciding."""
    rows = np.flatnonzero(~np.isnan(found).any(axis=1) & ~np.isnan(quality).any(axis=1))
    if len(rows) < 5:
        return None
    score, low, high = found[rows, 1] - found[rows, 0], quality[rows, 0], quality[rows, 1]
    curve = metrics.curve(score, low, high)
    apgr = curve.apgr()
    if apgr is None:
        return None
    drawn = metrics.resamples(groups[rows], repeats, seed)
    interval = metrics.interval([metrics.apgr(score[r], low[r], high[r]) for r in drawn])
    by_fold = [
        metrics.apgr(score[folds[rows] == f], low[folds[rows] == f], high[folds[rows] == f])
        for f in np.unique(folds[rows])
    ]
    usable = [value for value in by_fold if value is not None]
    first, second = names
    return {
        "first": first,
        "second": second,
        "num_rows": len(rows),
        "apgr": apgr,
        "apgr_interval": interval,
        "apgr_mean_of_folds": float(np.mean(usable)) if usable else None,
        "cpt50": curve.cpt(50.0),
        "cpt80": curve.cpt(80.0),
        "saved_at_no_drop": curve.saved(0.0),
        "saved_at_1_percent_drop": curve.saved(0.01),
        "ece": metrics.expected_calibration_error(found[rows, 0], low),
        "sentence": (
            f"reading {first}'s answer first: share of the gap recovered {apgr:.3f}, "
            f"{curve.saved(0.0):.0%} of the {second} calls saved at no drop, "
            f"{curve.saved(0.01):.0%} at a 1 % drop"
        ),
    }
