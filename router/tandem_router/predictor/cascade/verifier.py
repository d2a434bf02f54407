"""After the small tier has answered: how likely is it right, and would the large tier be?

Four views of the pair (prompt, answer), each with one head per tier: a logistic head on the
answer's features, words of the answer, words of the prompt, and agreement with reference pairs, a
vote as in meta-ranking (Liu et al. 2024): of the pairs of known outcome that look most like this
one, how many were right. View scores are averaged on the logit scale with fixed weights and
calibrated out of fold. Tried and left out: extremely randomised trees on the features (APGR no
better on gsm8k, ten times the training time). Fitted in
:mod:`tandem_router.predictor.training.answer_verifier`; only numpy is needed here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tandem_router.predictor.artifact import Arrays
from tandem_router.predictor.cascade.answer_features import FEATURE_NAMES, answer_features
from tandem_router.predictor.cascade.token_statistics import TokenStatistics
from tandem_router.predictor.linear_algebra import TextLinear, scoped
from tandem_router.predictor.reading import ngrams

Floats = NDArray[np.float64]

VIEWS: Mapping[str, float] = {
    "features": 1.0,
    "answer_words": 1.2,
    "prompt_words": 1.2,
    "references": 0.5,
}
NUM_NEIGHBOURS = 40
NO_SPREAD = 1e-6
_WORDS = {"kind": "word", "min_n": 1, "max_n": 2, "link": "identity"}


@dataclass(frozen=True, slots=True)
class Verdict:
    """Calibrated beliefs after reading the small tier's answer."""

    quality_small: float
    quality_large: float

    @property
    def gain(self) -> float:
        """What escalating is expected to add, quality points."""
        return self.quality_large - self.quality_small


@dataclass(frozen=True, slots=True)
class VerifierViews:
    """The fitted views; each has a head for the small and one for the large tier."""

    mean: Floats  # (num_features,)
    scale: Floats  # (num_features,)
    linear: Floats  # (2, num_features + 1), bias last
    answer_words: TextLinear
    prompt_words: TextLinear
    references: Floats  # (num_references, num_features), scaled
    reference_quality: Floats  # (num_references, 2)

    def logits(
        self, x: Floats, prompts: Sequence[str], answers: Sequence[str], views: Mapping[str, float]
    ) -> Floats:
        """Weighted mean of the views' logits, (num_rows, 2)."""
        scaled = scaled_features(x, self.mean, self.scale)
        total = np.zeros((len(x), 2))
        if weight := views.get("features", 0.0):
            total += weight * (scaled @ self.linear[:, :-1].T + self.linear[:, -1])
        for head, name, texts in (
            (self.answer_words, "answer_words", answers),
            (self.prompt_words, "prompt_words", prompts),
        ):
            if weight := views.get(name, 0.0):
                total += weight * np.stack([_words_logit(head, text) for text in texts])
        if weight := views.get("references", 0.0):
            total += weight * logit(self._agreement(scaled))
        mean: Floats = total / sum(views.get(name, 0.0) for name in VIEWS)
        return mean

    def _agreement(self, scaled: Floats) -> Floats:
        """Share of the most similar reference pairs that were right, per tier, (num_rows, 2)."""
        squares = (self.references**2).sum(axis=1)
        votes = np.empty((len(scaled), 2))
        count = min(NUM_NEIGHBOURS, len(squares))
        for i, row in enumerate(scaled):
            distance = squares - 2.0 * self.references @ row + row @ row
            near = np.argpartition(distance, count - 1)[:count]
            weight = 1.0 / (1.0 + np.maximum(distance[near], 0.0))
            votes[i] = weight @ self.reference_quality[near] / weight.sum()
        return votes


def _words_logit(head: TextLinear, text: str) -> Floats:
    keys, counts = ngrams.count(ngrams.word_grams(ngrams.read(text), head.max_n))
    linear, _ = head(keys, counts)
    return np.clip(linear, -30.0, 30.0)


@dataclass(frozen=True, slots=True)
class AnswerVerifier:
    """Judge of small-tier answers: the views, their weights (0 leaves one out), calibration."""

    views: VerifierViews
    calibration: Floats  # (2, 2): slope and bias of the logit, per tier
    weights: Mapping[str, float]

    def predict(
        self,
        prompts: Sequence[str],
        answers: Sequence[str],
        tokens: Sequence[TokenStatistics | None] | None = None,
    ) -> Floats:
        """Calibrated quality of small and large after each answer, (num_rows, 2)."""
        x = features_of(prompts, answers, tokens)
        z = self.views.logits(x, prompts, answers, self.weights)
        slope, bias = self.calibration[:, 0], self.calibration[:, 1]
        calibrated: Floats = z * slope + bias
        return sigmoid(calibrated)

    def verify(self, prompt: str, answer: str, tokens: TokenStatistics | None = None) -> Verdict:
        """One answer."""
        small, large = self.predict([prompt], [answer], [tokens])[0]
        return Verdict(float(small), float(large))

    def to_arrays(self) -> Arrays:
        """Everything learned, for an artifact of plain arrays."""
        views = self.views
        arrays: Arrays = {
            "weights": np.array([self.weights.get(name, 0.0) for name in VIEWS]),
            "mean": views.mean,
            "scale": views.scale,
            "linear": views.linear,
            "references": views.references.astype(np.float32),
            "reference_quality": views.reference_quality.astype(np.float32),
            "calibration": self.calibration,
        }
        for name, head in (("answer", views.answer_words), ("prompt", views.prompt_words)):
            arrays |= {f"{name}/{key}": value for key, value in head.arrays().items()}
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> AnswerVerifier:
        """Rebuild from `to_arrays`, checking every shape before use.

        Raises:
            ValueError: an array is missing, mis-shaped or not finite.
            ArtifactError: a text part is damaged.
        """
        got = {name: _checked(arrays, name) for name in _SHAPES}
        if len(got["references"]) != len(got["reference_quality"]):
            raise ValueError("verifier arrays: references and their qualities differ in number")
        answer, prompt = (
            TextLinear.build(_WORDS, scoped(arrays, f"{name}/"), 2) for name in ("answer", "prompt")
        )
        return cls(
            VerifierViews(
                got["mean"],
                got["scale"],
                got["linear"],
                answer,
                prompt,
                got["references"],
                got["reference_quality"],
            ),
            got["calibration"],
            dict(zip(VIEWS, map(float, got["weights"]), strict=True)),
        )


def features_of(
    prompts: Sequence[str],
    answers: Sequence[str],
    tokens: Sequence[TokenStatistics | None] | None = None,
) -> Floats:
    """Features of every (prompt, answer), (num_rows, len(FEATURE_NAMES))."""
    certainty = tokens if tokens is not None else [None] * len(prompts)
    return np.stack(
        [answer_features(*row) for row in zip(prompts, answers, certainty, strict=True)]
    )


def scaled_features(x: Floats, mean: Floats, scale: Floats) -> Floats:
    """Standardised, and clipped so that one absurd answer cannot silence the other views.

    A feature that never varied in training says nothing: token certainty, where no row had any.
    """
    varied = scale > NO_SPREAD
    return np.asarray(np.where(varied, np.clip((x - mean) / scale, -4.0, 4.0), 0.0))


def sigmoid(z: Floats) -> Floats:
    """Logistic function without overflow."""
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * z)))


def logit(p: Floats) -> Floats:
    """Log odds, bounded to +-4 so that a unanimous vote does not silence the other views."""
    return np.asarray(np.log((p + 0.018) / (1.018 - p)))


_F = len(FEATURE_NAMES)
# Name -> shape; -1 is any length.
_SHAPES: Mapping[str, tuple[int, ...]] = {
    "weights": (len(VIEWS),),
    "mean": (_F,),
    "scale": (_F,),
    "linear": (2, _F + 1),
    "references": (-1, _F),
    "reference_quality": (-1, 2),
    "calibration": (2, 2),
}


def _checked(arrays: Arrays, name: str) -> Floats:
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
    return values
