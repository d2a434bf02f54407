"""The cascade as an artifact holds it: a verifier, the tiers it stands between, and its power."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tandem_router.predictor.artifact import Arrays
from tandem_router.predictor.cascade.verifier import AnswerVerifier
from tandem_router.predictor.cascade.zones import VerifierPower
from tandem_router.predictor.errors import ArtifactError


@dataclass(frozen=True, slots=True)
class Cascade:
    """A verifier with the tiers it stands between."""

    first: str
    second: str
    verifier: AnswerVerifier
    power: VerifierPower


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
