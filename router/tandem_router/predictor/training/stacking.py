"""From many views to one answer: which combination of views this pair of models rewards.

Everything here is linear in the view outputs, so serving a prompt costs two small matrix products.
Per tier, the views are weighed by non-negative least squares and calibrated. Per pair of tiers,
several rankings of the prompts compete on out-of-fold predictions: a fixed average of the views, a
stacked regression, every view alone, prompt length, and "the first tier is wrong". The average
is the favourite; a rival gains weight as its lead over the average exceeds the noise of that lead,
so that little data leaves the average in place and much data may overrule it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from tandem_router.predictor.artifact import Arrays
from tandem_router.predictor.linear_algebra import FloatArray, add_steps, combine
from tandem_router.predictor.training.combining import BEYOND, MonotoneCalibrator, NonNegativeStack

Curve = tuple[FloatArray, FloatArray]

MIN_ROWS = 20
#: Prior weight of a rival ranking beside the average's 1, and how fast a lead of one standard
#: error counts: with many rows a rival equals the average after 2.5 standard errors, has four
#: times its say after 3.7. The content-blind rivals start higher: few labels suffice to learn them.
RIVAL_PRIOR = 0.05
PLAIN_PRIOR = 0.15
PLAIN = ("length", "first tier wrong")
LEAD_RATE = 1.2
MAX_LEAD = 5.0
#: Rows at which a lead counts half: what was cross-fitted on few rows is further from what all rows
#: will say than the standard error knows.
LEAD_ROWS = 800.0
#: Rows' worth of belief that the average needs no rescaling.
SLOPE_ROWS = 2000.0
#: Share of the rows that must grade both tiers of a pair for the rankings to compete on them.
SIDE_BY_SIDE = 0.1
#: Rows' worth of belief, in each of 20 parts of its range, that a gain that is bent needs none.
CURVE_ROWS = 60.0
#: Standard errors by which bending has to lower the squared error on rows left out.
CURVE_ERRORS = 2.0


@dataclass(frozen=True, slots=True)
class Layout:
    """What the out-of-fold array ``(num_rows, num_views, num_outputs)`` holds."""

    tiers: tuple[str, ...]
    views: tuple[str, ...]
    core: Mapping[str, float]  # the views in the average, with their weights
    pairs: tuple[tuple[int, int], ...]
    outputs: tuple[str, ...]  # the tiers, then one per pair where its label is not the gain

    @property
    def average(self) -> FloatArray:
        """Weights ``(num_views,)`` of the average, summing to one."""
        inside = np.array([self.core.get(name, 0.0) for name in self.views])
        return np.asarray(inside / inside.sum())

    def pair_output(self, index: int) -> int | None:
        """The output that learned the pair's own label, if there is one."""
        return len(self.tiers) + index if len(self.outputs) > len(self.tiers) else None


@dataclass(frozen=True, slots=True)
class Stack:
    """Linear maps from all view outputs to qualities and to utilities, and the calibration.

    `curves` has the knots of one monotone curve per tier's quality, `steps` of one per step from a
    tier to the next: an average of shrunken views says too little where a gain is large or none.
    """

    quality: FloatArray  # (num_tiers, num_views * num_outputs)
    quality_bias: FloatArray
    utility: FloatArray
    utility_bias: FloatArray
    curves: tuple[Curve, ...]
    steps: tuple[Curve, ...]
    report: dict[str, Any]

    def apply(self, outputs: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Calibrated qualities and utilities ``(num_rows, num_tiers)`` of view outputs."""
        flat = outputs.reshape(len(outputs), -1)
        raw = flat @ self.quality.T + self.quality_bias
        heads = np.stack(
            [np.interp(raw[:, i], x, y) for i, (x, y) in enumerate(self.curves)], axis=1
        )
        utility = self.raw_utility(outputs)
        bent = [
            np.interp(step, x, y)
            for step, (x, y) in zip(np.diff(utility, axis=1).T, self.steps, strict=True)
        ]
        utility = add_steps(np.array(bent).reshape(len(self.steps), len(flat)).T)
        return combine(heads, utility), utility

    def raw_utility(self, outputs: FloatArray) -> FloatArray:
        """Utilities ``(num_rows, num_tiers)`` before the steps' curves."""
        flat = outputs.reshape(len(outputs), -1)
        return np.asarray(flat @ self.utility.T + self.utility_bias)

    def without_last_view(self, layout: Layout) -> Stack:
        """This stack for outputs that end with one more view than it knows, which it ignores."""
        missing = ((0, 0), (0, len(layout.outputs)))
        return replace(
            self, quality=np.pad(self.quality, missing), utility=np.pad(self.utility, missing)
        )

    def arrays(self) -> Arrays:
        arrays: Arrays = {
            "stack/quality": self.quality,
            "stack/quality_bias": self.quality_bias,
            "stack/utility": self.utility,
            "stack/utility_bias": self.utility_bias,
        }
        for name, curves in (("calibration", self.curves), ("steps", self.steps)):
            for index, (x, y) in enumerate(curves):
                arrays[f"{name}/{index}/x"] = x
                arrays[f"{name}/{index}/y"] = y
        return arrays


def fit(oof: FloatArray, labels: FloatArray, folds: npt.NDArray[np.int64], layout: Layout) -> Stack:
    """The stack for all rows; `labels` may hold NaN."""
    num_tiers, num_views, num_outputs = len(layout.tiers), *oof.shape[1:]
    quality = np.zeros((num_tiers, num_views, num_outputs))
    quality_bias = np.zeros(num_tiers)
    curves: list[Curve] = []
    report: dict[str, Any] = {"quality": {}, "gain": {}}
    prior = tuple(layout.average.tolist())
    for tier, name in enumerate(layout.tiers):
        rows = np.flatnonzero(~np.isnan(labels[:, tier]))
        stack = NonNegativeStack(prior=prior).fit(oof[rows, :, tier], labels[rows, tier])
        quality[tier, :, tier], quality_bias[tier] = stack.coef_, stack.intercept_
        raw = stack.predict(oof[rows, :, tier])
        curve = MonotoneCalibrator().fit(raw[:, None], labels[rows, tier])
        curves.append((curve.x_, np.clip(curve.y_, 0.0, 1.0)))
        report["quality"][name] = _rounded(layout.views, stack.coef_)
    gain = np.zeros((num_tiers, num_tiers, num_views, num_outputs))
    gain_bias = np.zeros((num_tiers, num_tiers))
    for index, (first, second) in enumerate(layout.pairs):
        gain_seen = labels[:, second] - labels[:, first]
        weights, bias, shares = _fit_gain(oof, gain_seen, folds, layout, index)
        gain[first, second], gain_bias[first, second] = weights, bias
        gain[second, first], gain_bias[second, first] = -weights, -bias
        report["gain"][f"{layout.tiers[first]} -> {layout.tiers[second]}"] = shares
    straight = Stack(
        quality.reshape(num_tiers, -1),
        quality_bias,
        # The closest additive utilities to the pairwise gains (least squares, HodgeRank).
        gain.mean(axis=0).reshape(num_tiers, -1),
        gain_bias.mean(axis=0),
        tuple(curves),
        (),
        report,
    )
    steps = np.diff(straight.raw_utility(oof), axis=1)
    known = np.diff(labels, axis=1)
    return replace(
        straight,
        steps=tuple(_step_curve(steps[:, i], known[:, i], folds) for i in range(num_tiers - 1)),
    )


def _step_curve(step: FloatArray, gain: FloatArray, folds: npt.NDArray[np.int64]) -> Curve:
    """From the predicted gain of one tier over the one before it to the gain that was seen.

    Straight unless bending it clearly helps on the rows left out: where it does not, a curve adds
    noise, and the scores of two training parts become harder to compare.
    """
    straight = np.array([-BEYOND, BEYOND]), np.array([-BEYOND, BEYOND])
    rows = np.flatnonzero(~np.isnan(gain))
    if len(rows) < MIN_ROWS or len(np.unique(folds[rows])) < 2:
        return straight
    step, gain, folds = step[rows, None], gain[rows], folds[rows]
    curve = MonotoneCalibrator(strength=CURVE_ROWS, in_units=True)
    bent = np.zeros(len(rows))
    for fold in np.unique(folds):
        outside = folds == fold
        bent[outside] = curve.fit(step[~outside], gain[~outside]).predict(step[outside])
    saved = (step[:, 0] - gain) ** 2 - (bent - gain) ** 2
    if saved.mean() <= CURVE_ERRORS * saved.std() / np.sqrt(len(saved)):
        return straight
    curve.fit(step, gain)
    return curve.x_, curve.y_


def out_of_fold(
    oof: FloatArray, labels: FloatArray, folds: npt.NDArray[np.int64], layout: Layout
) -> tuple[FloatArray, FloatArray]:
    """Qualities and utilities of each row by a stack that has not seen the row's fold."""
    quality = np.zeros((len(oof), len(layout.tiers)))
    utility = np.zeros_like(quality)
    for fold in range(int(folds.max()) + 1):
        inside, outside = folds != fold, folds == fold
        stack = fit(oof[inside], labels[inside], folds[inside], layout)
        quality[outside], utility[outside] = stack.apply(oof[outside])
    return quality, utility


def _fit_gain(
    oof: FloatArray,
    gain: FloatArray,
    folds: npt.NDArray[np.int64],
    layout: Layout,
    index: int,
) -> tuple[FloatArray, float, dict[str, float]]:
    """Weights ``(num_views, num_outputs)`` and offset of one pair's gain; what each rival got."""
    rows = np.flatnonzero(~np.isnan(gain))
    directions = _rankings(layout, index, oof.shape[1:])
    if len(rows) < max(MIN_ROWS, SIDE_BY_SIDE * len(gain)):
        # Hardly graded side by side: the difference of the heads is all there is. Weighing each
        # row by how rarely a tier is graded instead (doubly robust) let noise choose the ranking.
        return directions["average"], 0.0, {"average": 1.0}
    flat, known = oof[rows].reshape(len(rows), -1), gain[rows]
    scores = {name: flat @ weights.ravel() for name, weights in directions.items()}
    columns = [name for name in directions if name not in ("average", "first tier wrong")]
    columns.append("first tier wrong")
    matrix = np.stack([scores[name] for name in columns], axis=1)
    prior = (*layout.average.tolist(), 0.0)
    honest = np.zeros(len(rows))
    for fold in np.unique(folds[rows]):
        outside = folds[rows] == fold
        inside = ~outside
        if inside.sum() >= MIN_ROWS:
            stack = NonNegativeStack(prior=prior).fit(matrix[inside], known[inside])
            honest[outside] = stack.predict(matrix[outside])
    stack = NonNegativeStack(prior=prior).fit(matrix, known)
    directions["stacked"] = sum(
        (weight * directions[name] for name, weight in zip(columns, stack.coef_, strict=True)),
        np.zeros(oof.shape[1:]),
    )
    scores["stacked"] = honest
    shares = _shares(scores, known)
    blend, direction = np.zeros(len(rows)), np.zeros(oof.shape[1:])
    unit = float(scores["average"].std())
    for name, share in shares.items():
        spread = float(scores[name].std())
        if share > 0.0 and spread > 1e-12:
            blend += share * unit / spread * scores[name]
            direction += share * unit / spread * directions[name]
    slope = max(float(np.cov(blend, known)[0, 1]), 0.0) / max(float(blend.var(ddof=1)), 1e-12)
    # The average is in units of the gain already, and its level is right: few rows would add noise,
    # not knowledge, and an offset fitted to them leans away from the very rows left out.
    trust = len(rows) / (len(rows) + SLOPE_ROWS)
    slope = (trust * slope + 1.0 - trust) * _belief(blend, known)
    bias = float(scores["average"].mean() - slope * blend.mean())
    return slope * direction, bias, {name: round(share, 3) for name, share in shares.items()}


def _belief(score: FloatArray, gain: FloatArray) -> float:
    """How far a ranking's spread is believed, 0 to 1: z^2 / (1 + z^2) of the gap it recovers.

    Where it recovers no more than chance, nothing is left and every prompt has the mean gain: then
    the better tier answers all, or calls are mixed, and noise moves nobody.
    """
    terms = _area_terms(score, gain)
    error = float(terms.std(ddof=1)) / np.sqrt(len(terms))
    in_errors = max(float(terms.mean()) / max(error, 1e-12), 0.0)
    return float(in_errors**2 / (1.0 + in_errors**2))


def _rankings(layout: Layout, index: int, shape: tuple[int, ...]) -> dict[str, FloatArray]:
    """Each competing ranking as weights on the view outputs, in the direction of the gain."""
    first, second = layout.pairs[index]
    own = layout.pair_output(index)
    found: dict[str, FloatArray] = {}
    for position, view in enumerate(layout.views):
        weights = np.zeros(shape)
        if own is None:
            weights[position, second], weights[position, first] = 1.0, -1.0
        else:
            weights[position, own] = 1.0
        found[view] = weights
    wrong = np.zeros(shape)
    wrong[:, first] = -layout.average
    average = sum(
        (part * found[view] for part, view in zip(layout.average, layout.views, strict=True)),
        np.zeros(shape),
    )
    return found | {"first tier wrong": wrong, "average": average}


def _shares(scores: dict[str, FloatArray], gain: FloatArray) -> dict[str, float]:
    """Weights of the rankings by their lead over the average in units of its standard error."""
    areas = {name: _area_terms(score, gain) for name, score in scores.items()}
    weights: dict[str, float] = {}
    rate = LEAD_RATE * len(gain) / (len(gain) + LEAD_ROWS)
    for name, terms in areas.items():
        if name == "average":
            weights[name] = 1.0
            continue
        lead = terms - areas["average"]
        error = float(lead.std(ddof=1)) / np.sqrt(len(lead))
        in_errors = float(np.clip(lead.mean() / max(error, 1e-12), -MAX_LEAD, MAX_LEAD))
        prior = PLAIN_PRIOR if name in PLAIN else RIVAL_PRIOR
        weights[name] = prior * float(np.exp(rate * in_errors))
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def _area_terms(score: FloatArray, gain: FloatArray) -> FloatArray:
    """Per row, its part of the area under the routing curve: gain times the share routed after it.

    Their mean is APGR up to scale; as a mean it has a standard error, and so has a difference.
    """
    order = np.argsort(-score, kind="stable")
    _, inverse, sizes = np.unique(-score[order], return_inverse=True, return_counts=True)
    after = 1.0 - (np.cumsum(sizes) - sizes / 2.0) / len(score)
    terms = np.empty(len(score))
    terms[order] = gain[order] * (after[inverse] - 0.5)
    return terms


def _rounded(names: Sequence[str], weights: FloatArray) -> dict[str, float]:
    return {name: round(float(w), 4) for name, w in zip(names, weights, strict=True)}
