"""After the small tier has answered: how likely is it right, and would the large tier be?

Four views of the pair (prompt, answer), each with one head per tier: a logistic head on the
answer's features, hashed words of the answer, hashed words of the prompt, and agreement with
reference pairs, a vote as in meta-ranking (Liu et al. 2024): of the pairs of known outcome that
look most like this one, how many were right. View scores are averaged on the logit scale with
fixed weights and calibrated out of fold. Tried and left out: extremely randomised trees on the
features (APGR no better on gsm8k, ten times the training time).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tandem_router.predictor.cascade.answer import FEATURE_NAMES, answer_features
from tandem_router.predictor.cascade.words import (
    NUM_BUCKETS,
    fit_words,
    hash_texts,
    inverse_document_frequency,
    sigmoid,
    weighted,
)

Floats = NDArray[np.float64]

VIEWS: Mapping[str, float] = {
    "features": 1.0,
    "answer_words": 1.2,
    "prompt_words": 1.2,
    "references": 0.5,
}
MIN_ROWS = 40
_MAX_REFERENCES = 2048
_NEIGHBOURS = 40


@dataclass(frozen=True, slots=True)
class Verdict:
    """Calibrated beliefs after reading the small tier's answer."""

    quality_small: float
    quality_large: float

    @property
    def gain(self) -> float:
        """What escalating is expected to add, quality points."""
        return self.quality_large - self.quality_small


class AnswerVerifier:
    """Judge of small-tier answers, pure numpy.

    Args:
        seed: of the calibration folds and the choice of references.
        views: weights of the views; a weight of zero leaves a view out. Default `VIEWS`.
    """

    def __init__(self, seed: int = 0, views: Mapping[str, float] | None = None) -> None:
        self.seed = seed
        self.views = views

    def fit(
        self,
        prompts: Sequence[str],
        answers: Sequence[str],
        quality: Floats,
        logprobs: Sequence[Sequence[float] | None] | None = None,
    ) -> AnswerVerifier:
        """Learn from answered prompts.

        Args:
            prompts, answers: the small tier's answers and what they answer.
            quality: measured quality of small and large, 0..1, (num_rows, 2).
            logprobs: per row the answer's token log probabilities, where known.

        Raises:
            ValueError: fewer than 40 rows, misaligned inputs, or labels outside 0..1.
        """
        quality = np.asarray(quality, dtype=np.float64)
        if quality.shape != (len(prompts), 2) or len(answers) != len(prompts):
            raise ValueError(
                f"{len(prompts)} prompts, {len(answers)} answers and qualities of shape "
                f"{quality.shape} do not belong together; give one row of (small, large) each"
            )
        if len(prompts) < MIN_ROWS:
            raise ValueError(
                f"{len(prompts)} answered prompts are too few to learn a verifier; "
                f"label at least {MIN_ROWS}"
            )
        if not ((quality >= 0.0) & (quality <= 1.0)).all():
            raise ValueError("a quality is NaN or outside 0..1; rescale the labels")
        x = self._features(prompts, answers, logprobs)
        rng = np.random.default_rng(self.seed)
        folds = rng.permutation(len(x)) % 5
        held_out = np.zeros_like(quality)
        for fold in range(5):
            train, test = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
            self._fit_views(x[train], _pick(prompts, train), _pick(answers, train), quality[train])
            held_out[test] = self._logits(x[test], _pick(prompts, test), _pick(answers, test))
        self._fit_views(x, prompts, answers, quality)
        self.calibration_ = np.stack(
            [fit_logistic(held_out[:, [head]], quality[:, head], 0.01) for head in range(2)]
        )
        return self

    def predict(
        self,
        prompts: Sequence[str],
        answers: Sequence[str],
        logprobs: Sequence[Sequence[float] | None] | None = None,
    ) -> Floats:
        """Calibrated quality of small and large after each answer, (num_rows, 2)."""
        z = self._logits(self._features(prompts, answers, logprobs), prompts, answers)
        slope, bias = self.calibration_[:, 0], self.calibration_[:, 1]
        calibrated: Floats = z * slope + bias
        return sigmoid(calibrated)

    def judge(
        self, prompt: str, answer: str, token_logprobs: Sequence[float] | None = None
    ) -> Verdict:
        """One answer."""
        small, large = self.predict([prompt], [answer], [token_logprobs])[0]
        return Verdict(float(small), float(large))

    def to_arrays(self) -> dict[str, NDArray[np.generic]]:
        """Everything learned, for an artifact of plain arrays."""
        return {
            "version": np.array([1]),
            "views": np.array([self._weight(name) for name in VIEWS]),
            "mean": self.mean_,
            "scale": self.scale_,
            "linear": self.linear_,
            "idf": self.idf_.astype(np.float32),
            "words": self.words_.astype(np.float32),
            "references": self.references_.astype(np.float32),
            "reference_quality": self.reference_quality_.astype(np.float32),
            "calibration": self.calibration_,
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[np.generic]]) -> AnswerVerifier:
        """Rebuild from `to_arrays`, checking every shape before use.

        Raises:
            ValueError: an array is missing, of another version, mis-shaped or not finite.
        """
        got = {name: _checked(arrays, name) for name in _SHAPES}
        if len(got["references"]) != len(got["reference_quality"]):
            raise ValueError("verifier arrays: references and their qualities differ in number")
        self = cls(views=dict(zip(VIEWS, map(float, got["views"]), strict=True)))
        self.mean_, self.scale_, self.linear_ = got["mean"], got["scale"], got["linear"]
        self.idf_, self.words_ = got["idf"], got["words"]
        self.references_, self.reference_quality_ = got["references"], got["reference_quality"]
        self.calibration_ = got["calibration"]
        return self

    # ------------------------------------------------------------------ views

    def _weight(self, name: str) -> float:
        return float((VIEWS if self.views is None else self.views).get(name, 0.0))

    def _features(
        self,
        prompts: Sequence[str],
        answers: Sequence[str],
        logprobs: Sequence[Sequence[float] | None] | None,
    ) -> Floats:
        certainty = logprobs if logprobs is not None else [None] * len(prompts)
        rows = zip(prompts, answers, certainty, strict=True)
        return np.stack([answer_features(*row) for row in rows])

    def _fit_views(
        self, x: Floats, prompts: Sequence[str], answers: Sequence[str], quality: Floats
    ) -> None:
        self.mean_, self.scale_ = x.mean(axis=0), np.maximum(x.std(axis=0), 1e-6)
        scaled = self._scaled(x)
        penalty = 20.0
        self.linear_ = np.stack([fit_logistic(scaled, quality[:, h], penalty) for h in range(2)])
        rng = np.random.default_rng(self.seed)
        idf, words = [], []
        for texts in (answers, prompts):
            rows = hash_texts(texts)
            idf.append(inverse_document_frequency(rows))
            shaped = weighted(rows, idf[-1])
            words.append(np.stack([fit_words(shaped, quality[:, h]) for h in range(2)]))
        self.idf_, self.words_ = np.stack(idf), np.stack(words)
        keep = rng.permutation(len(x))[:_MAX_REFERENCES]
        self.references_, self.reference_quality_ = scaled[keep], quality[keep]

    def _scaled(self, x: Floats) -> Floats:
        return np.asarray(np.clip((x - self.mean_) / self.scale_, -4.0, 4.0))

    def _logits(self, x: Floats, prompts: Sequence[str], answers: Sequence[str]) -> Floats:
        """Weighted mean of the views' logits, (num_rows, 2)."""
        scaled = self._scaled(x)
        total = np.zeros((len(x), 2))
        if weight := self._weight("features"):
            total += weight * (scaled @ self.linear_[:, :-1].T + self.linear_[:, -1])
        for view, name, texts in ((0, "answer_words", answers), (1, "prompt_words", prompts)):
            if weight := self._weight(name):
                rows = weighted(hash_texts(texts), self.idf_[view])
                for head in range(2):
                    learned = self.words_[view, head]
                    total[:, head] += weight * (rows.dot(learned[:-1]) + learned[-1])
        if weight := self._weight("references"):
            total += weight * logit(self._agreement(scaled))
        mean: Floats = total / sum(self._weight(name) for name in VIEWS)
        return mean

    def _agreement(self, scaled: Floats) -> Floats:
        """Share of the most similar reference pairs that were right, per tier, (num_rows, 2)."""
        squares = (self.references_**2).sum(axis=1)
        votes = np.empty((len(scaled), 2))
        count = min(_NEIGHBOURS, len(squares))
        for i, row in enumerate(scaled):
            distance = squares - 2.0 * self.references_ @ row + row @ row
            near = np.argpartition(distance, count - 1)[:count]
            weight = 1.0 / (1.0 + np.maximum(distance[near], 0.0))
            votes[i] = weight @ self.reference_quality_[near] / weight.sum()
        return votes


_F = len(FEATURE_NAMES)
# Name -> shape; -1 is any length.
_SHAPES: Mapping[str, tuple[int, ...]] = {
    "version": (1,),
    "views": (len(VIEWS),),
    "mean": (_F,),
    "scale": (_F,),
    "linear": (2, _F + 1),
    "idf": (2, NUM_BUCKETS),
    "words": (2, 2, NUM_BUCKETS + 1),
    "references": (-1, _F),
    "reference_quality": (-1, 2),
    "calibration": (2, 2),
}


def _checked(arrays: Mapping[str, NDArray[np.generic]], name: str) -> NDArray[np.float64]:
    if name not in arrays:
        raise ValueError(f"verifier arrays lack {name!r}; retrain the artifact")
    array = np.asarray(arrays[name])
    if array.dtype.kind not in "fiu":
        raise ValueError(f"verifier array {name!r} has dtype {array.dtype}, not numbers; retrain")
    shape = _SHAPES[name]
    fits = array.ndim == len(shape) and all(
        want in (-1, have) for want, have in zip(shape, array.shape, strict=True)
    )
    if not fits or array.size == 0:
        raise ValueError(
            f"verifier array {name!r} has shape {array.shape}, expected {shape}; "
            "the artifact is from another version, retrain it"
        )
    values = array.astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError(f"verifier array {name!r} holds NaN or infinity; retrain the artifact")
    if name == "version" and values[0] != 1:
        raise ValueError(f"verifier version {values[0]:g} is not 1; retrain the artifact")
    return values


def fit_logistic(x: Floats, y: Floats, penalty: float, steps: int = 25) -> Floats:
    """Ridge logistic regression by Newton's method; (num_features + 1,), bias last."""
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


def logit(p: Floats) -> Floats:
    """Log odds, bounded to +-4 so that a unanimous vote does not silence the other views."""
    return np.asarray(np.log((p + 0.018) / (1.018 - p)))


def _pick(texts: Sequence[str], rows: NDArray[np.int64]) -> list[str]:
    return [texts[i] for i in rows]
