"""After the small tier has answered: how likely is it right, and would the large tier be?

Four views of the pair (prompt, answer), each with one head per tier: a logistic head on the
answer's features, words of the answer, words of the prompt, and agreement with reference pairs, a
vote as in meta-ranking (Liu et al. 2024): of the pairs of known outcome that look most like this
one, how many were right. How much each view's logit counts is learned out of fold. Tried and left
out: extremely randomised trees on the features (APGR no better on three pairs, ten times the
training time), and answers of the large tier as further examples. Fitted in
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

VIEWS: tuple[str, ...] = ("features", "answer_words", "prompt_words", "references")
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

    def logits(self, x: Floats, prompts: Sequence[str], answers: Sequence[str]) -> Floats:
        """What each view says, (num_rows, 2 tiers, num_views)."""
        scaled = scaled_features(x[:, : len(self.mean)], self.mean, self.scale)
        return np.stack(
            [
                scaled @ self.linear[:, :-1].T + self.linear[:, -1],
                np.stack([_words_logit(self.answer_words, text) for text in answers]),
                np.stack([_words_logit(self.prompt_words, text) for text in prompts]),
                logit(self._agreement(scaled)),
            ],
            axis=2,
        )

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
    """Judge of small-tier answers: the views, and how much each counts."""

    views: VerifierViews
    mixture: Floats  # (2, num_views + 1): weights of the views' logits and a bias, per tier

    def predict(
        self,
        prompts: Sequence[str],
        answers: Sequence[str],
        tokens: Sequence[TokenStatistics | None] | None = None,
    ) -> Floats:
        """Calibrated quality of small and large after each answer, (num_rows, 2)."""
        x = features_of(prompts, answers, tokens)
        return sigmoid(mixed(self.views.logits(x, prompts, answers), self.mixture))

    def verify(self, prompt: str, answer: str, tokens: TokenStatistics | None = None) -> Verdict:
        """One answer."""
        small, large = self.predict([prompt], [answer], [tokens])[0]
        return Verdict(float(small), float(large))

    def to_arrays(self) -> Arrays:
        """Everything learned, for an artifact of plain arrays."""
        views = self.views
        arrays: Arrays = {
            "mean": views.mean,
            "scale": views.scale,
            "linear": views.linear,
            "references": views.references.astype(np.float32),
            "reference_quality": views.reference_quality.astype(np.float32),
            "mixture": self.mixture,
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
        arrays = _as_today(arrays)
        got = {name: _checked(arrays, name, shape) for name, shape in _shapes(arrays).items()}
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
            got["mixture"],
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


def mixed(logits: Floats, mixture: Floats) -> Floats:
    """Logits of the views, (num_rows, 2, num_views), as one per tier, (num_rows, 2)."""
    return np.asarray(np.einsum("rtv,tv->rt", logits, mixture[:, :-1]) + mixture[:, -1])


#: Artifacts of earlier versions hold a verifier of so many features, the first of today's.
_EARLIER_FEATURES = 33


def _as_today(arrays: Arrays) -> Arrays:
    """An earlier version had fixed weights of the views, and one slope and bias per tier."""
    weights, slopes = arrays.get("weights"), arrays.get("calibration")
    if weights is None or slopes is None or "mixture" in arrays:
        return arrays
    if weights.shape != (len(VIEWS),) or slopes.shape != (2, 2) or not weights.sum() > 0:
        raise ValueError("the weights of the verifier's views are damaged; retrain it")
    shares = weights / weights.sum()
    return {**arrays, "mixture": np.column_stack([np.outer(slopes[:, 0], shares), slopes[:, 1]])}


def _shapes(arrays: Arrays) -> Mapping[str, tuple[int, ...]]:
    """Name -> shape; -1 is any length."""
    mean = arrays.get("mean")
    earlier = mean is not None and mean.shape == (_EARLIER_FEATURES,)
    num = _EARLIER_FEATURES if earlier else len(FEATURE_NAMES)
    return {
        "mean": (num,),
        "scale": (num,),
        "linear": (2, num + 1),
        "references": (-1, num),
        "reference_quality": (-1, 2),
        "mixture": (2, len(VIEWS) + 1),
    }


def _checked(arrays: Arrays, name: str, shape: tuple[int, ...]) -> Floats:
    if name not in arrays:
        raise ValueError(f"verifier arrays lack {name!r}; retrain the artifact")
    array = np.asarray(arrays[name])
    if array.dtype.kind not in "fiu":
        raise ValueError(f"verifier array {name!r} has dtype {array.dtype}, not numbers; retrain")
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
