"""Numeric estimators that combine and calibrate what the views say.

They take plain matrices and pass scikit-learn's own estimator checks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.optimize import nnls
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.isotonic import IsotonicRegression
from sklearn.utils.validation import check_is_fitted, validate_data

from tandem_router.predictor.linear_algebra import FloatArray

#: How far a curve in the label's units goes on beyond its knots: farther than any gain.
BEYOND = 4.0


class NonNegativeStack(RegressorMixin, BaseEstimator):  # type: ignore[misc]
    """Least squares with weights >= 0, pulled towards a prior (Breiman 1996, stacked regressions).

    Parameters
    ----------
    strength : how many rows' worth of evidence the prior counts for.
    prior : weight per column the data has to argue against; uniform, summing to one, where absent.
    """

    def __init__(self, strength: float = 300.0, prior: tuple[float, ...] | None = None) -> None:
        self.strength = strength
        self.prior = prior

    def fit(self, X: FloatArray, y: FloatArray) -> NonNegativeStack:
        X, y = validate_data(self, X, y, y_numeric=True)
        count = X.shape[1]
        prior = np.full(count, 1.0 / count) if self.prior is None else np.asarray(self.prior)
        center = X.mean(axis=0)
        moved = X - center
        # In units of the columns' common spread, so that `strength` means rows at any scale.
        spread = float(np.sqrt(np.mean(moved * moved))) or 1.0
        pull = np.sqrt(self.strength) * spread
        design = np.vstack((moved, pull * np.eye(count)))
        target = np.concatenate((y - y.mean(), pull * prior))
        # Normal equations keep NNLS at the number of views, not of rows.
        gram = design.T @ design + 1e-9 * np.eye(count)
        root = np.linalg.cholesky(gram)
        self.coef_, _ = nnls(root.T, np.linalg.solve(root, design.T @ target))
        self.intercept_ = float(y.mean() - center @ self.coef_)
        return self

    def predict(self, X: FloatArray) -> FloatArray:
        check_is_fitted(self)
        X = validate_data(self, X, reset=False)
        return np.asarray(X @ self.coef_ + self.intercept_)


class MonotoneCalibrator(RegressorMixin, BaseEstimator):  # type: ignore[misc]
    """Isotonic regression over equal-count bins, shrunk towards a line.

    Plain isotonic steps tie neighbouring scores and follow the noise where rows are few; here the
    bins' means are joined linearly, and each is a compromise with the line as if `strength` rows
    lay on it. The order of scores survives almost everywhere.

    Parameters
    ----------
    num_knots : most bins; 40 rows each where there are fewer rows.
    strength : rows' worth of belief in the line.
    slope_rows : rows' worth of belief in a flat line: a slope fitted to few rows is too steep on
        the next ones. The line is the least-squares one, flattened by so much.
    in_units : the score is in the label's units already, so that the line is the score itself,
        and goes on beyond the outermost knots.
    """

    def __init__(
        self,
        num_knots: int = 20,
        strength: float = 60.0,
        slope_rows: float = 150.0,
        in_units: bool = False,
    ) -> None:
        self.num_knots = num_knots
        self.strength = strength
        self.slope_rows = slope_rows
        self.in_units = in_units

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.regressor_tags.poor_score = True  # reads the first column only
        return tags

    def fit(self, X: FloatArray, y: FloatArray) -> MonotoneCalibrator:
        X, y = validate_data(self, X, y, y_numeric=True)
        score = X[:, 0].astype(np.float64)
        line = score if self.in_units else self._flattened_line(score, y)
        steps = IsotonicRegression(out_of_bounds="clip").fit(score, y).predict(score)
        bins = np.array_split(
            np.argsort(score, kind="stable"),
            max(1, min(self.num_knots, max(2, len(score) // 40), len(score))),
        )
        x = np.array([score[rows].mean() for rows in bins])
        value = np.array(
            [
                (steps[rows].sum() + self.strength * line[rows].mean())
                / (len(rows) + self.strength)
                for rows in bins
            ]
        )
        x, first = np.unique(x, return_index=True)
        y = np.maximum.accumulate(value[first])
        if self.in_units:
            x = np.concatenate(([x[0] - BEYOND], x, [x[-1] + BEYOND]))
            y = np.concatenate(([y[0] - BEYOND], y, [y[-1] + BEYOND]))
        self.x_, self.y_ = x, y
        return self

    def _flattened_line(self, score: FloatArray, y: FloatArray) -> FloatArray:
        centered = score - score.mean()
        slope = max(float(centered @ y) / max(float(centered @ centered), 1e-12), 0.0)
        line: FloatArray = y.mean() + slope * len(y) / (len(y) + self.slope_rows) * centered
        return line

    def predict(self, X: FloatArray) -> FloatArray:
        check_is_fitted(self)
        X = validate_data(self, X, reset=False)
        return np.asarray(np.interp(X[:, 0], self.x_, self.y_))
