"""The cascade as an artifact holds it: a verifier, the tiers it stands between, and its power."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tandem_router.predictor.artifact import Arrays
from tandem_router.predictor.cascade.verifier import AnswerVerifier, Verdict, logit, sigmoid
from tandem_router.predictor.cascade.zones import VerifierPower
from tandem_router.predictor.errors import ArtifactError


@dataclass(frozen=True, slots=True)
class Cascade:
    """A verifier with the tiers it stands between."""

    first: str
    second: str
    verifier: AnswerVerifier
    power: VerifierPower
    # (2, 5): per tier, weights of the logits of both verdicts and both predictions, and a bias;
    # None: the verdict alone counts.
    combination: NDArray[np.float64] | None = None

    def weigh(self, verdict: Verdict, small: float, large: float) -> Verdict:
        """The verdict together with what was predicted of the prompt.

        The predictor has seen many more prompts than the verifier has seen answers.
        """
        if self.combination is None:
            return verdict
        found = weighed(
            self.combination,
            np.array([[verdict.quality_small, verdict.quality_large]]),
            np.array([[small, large]]),
        )
        return Verdict(float(found[0, 0]), float(found[0, 1]))


def weighed(
    combination: NDArray[np.float64],
    verdicts: NDArray[np.float64],
    predicted: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Quality of both tiers from verdicts and predictions, each (num_rows, 2)."""
    return sigmoid(inputs(verdicts, predicted) @ combination[:, :-1].T + combination[:, -1])


def inputs(verdicts: NDArray[np.float64], predicted: NDArray[np.float64]) -> NDArray[np.float64]:
    """What is combined: logits, (num_rows, 4)."""
    return np.column_stack([logit(verdicts), logit(np.clip(predicted, 0.0, 1.0))])


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
        return Cascade(
            first,
            second,
            AnswerVerifier.from_arrays(arrays),
            VerifierPower(*power),
            _combination(arrays),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"its verifier cannot be used ({error}): damaged; train again"
        ) from error


def _combination(arrays: Arrays) -> NDArray[np.float64] | None:
    found = arrays.get("combination")
    if found is None:
        return None
    if found.shape != (2, 5) or found.dtype.kind != "f" or not np.isfinite(found).all():
        raise ArtifactError("its verifier's combination is not two rows of five numbers: damaged")
    return np.asarray(found, dtype=np.float64)
