"""Where a router's predictor comes from: configuration alone, or an artifact file that may change.

An artifact that is missing, broken or hostile never stops the router: it is said in the log, each
request is counted as `predictor-failed` and the fallback tier answers until a good file is there.
"""

from __future__ import annotations

import logging
from itertools import pairwise
from pathlib import Path
from typing import Protocol

from tandem_router.config import PredictorConfig, RouterConfig, TierConfig
from tandem_router.errors import RouterError
from tandem_router.policy import PlainScore, Score
from tandem_router.predictor import Predictor as LearnedPredictor
from tandem_router.predictor import PredictorError
from tandem_router.predictor import load as load_artifact
from tandem_router.predictor.cascade.stored import Cascade
from tandem_router.predictor.reading.embedding import EmbeddingError, StaticEmbedding

logger = logging.getLogger("tandem.router")

ARTIFACT_POLL_S = 2.0
TRAINING_SAMPLES = 200


class Predictor(Protocol):
    """What routing needs of a predictor."""

    def score(self, prompt: str) -> Score: ...


class PredictorUnavailableError(RouterError):
    """There is no usable artifact at present."""


class LengthPredictor:
    """Longer prompts are harder: the content-blind baseline, as a predictor.

    Gain of the dearest tier over the cheapest rises from 0 and is one half at
    `length_midpoint_chars`; tiers between them are spaced evenly.
    """

    def __init__(self, tiers: tuple[TierConfig, ...], config: PredictorConfig) -> None:
        by_price = sorted(
            tiers, key=lambda tier: tier.usd_per_1m_input_tokens + tier.usd_per_1m_output_tokens
        )
        top = max(1, len(by_price) - 1)
        self._heights = {tier.name: rank / top for rank, tier in enumerate(by_price)}
        self._midpoint = config.length_midpoint_chars

    def score(self, prompt: str) -> Score:
        hardness = len(prompt) / (len(prompt) + self._midpoint)
        return PlainScore(
            {name: 1.0 - hardness * (1.0 - height) for name, height in self._heights.items()}
        )


class UnlearnedPredictor(LengthPredictor):
    """Learned, and nothing to learn from yet: prompt length ranks until there are labels.

    A predictor of public outcomes does not know pairs of models it has not seen (the study's
    leave-one-pair-out table), so none is shipped to take this place.
    """

    def report(self) -> dict[str, object]:
        return {
            "version": None,
            "tiers": [],
            "verdicts": [],
            "reason": "NoLabels",
            "problem": "NoLabels: there is no artifact and nothing to learn from yet; requests are "
            "ranked by prompt length until one is trained (`tandem grade`, then `tandem train`)",
        }


class ArtifactPredictor:
    """The predictor in a file; a new file is taken into use while requests go on."""

    def __init__(self, path: Path, tiers: tuple[str, ...], embedding: str | None = None) -> None:
        self._path = path
        self._tiers = tiers
        self._embedding, self._embedding_dir = _embedding(embedding), embedding
        self._stamp: tuple[int, int, int] | None = None
        self._loaded: LearnedPredictor | None = None
        self._problem = f"{path} has not been read"
        self.version: str | None = None
        self.reload()

    def reconfigure(self, path: Path, tiers: tuple[str, ...], embedding: str | None) -> bool:
        """Take another file, tiers or embedding; whether there is something to read anew."""
        anew = (path, embedding) != (self._path, self._embedding_dir)
        if embedding != self._embedding_dir:
            self._embedding, self._embedding_dir = _embedding(embedding), embedding
        if anew:
            self._path, self._stamp = path, None
        self._tiers = tiers
        return anew

    @property
    def loaded(self) -> bool:
        return self._loaded is not None

    @property
    def known_tiers(self) -> tuple[str, ...] | None:
        """Those that it was trained on; None where there is nothing to learn beside."""
        return None if self._loaded is None else self._loaded.tiers

    @property
    def current(self) -> LearnedPredictor | None:
        """The predictor in use."""
        return self._loaded

    def adopt(self, predictor: LearnedPredictor) -> None:
        """Take another one into use; the mounted file comes back when it changes."""
        self._loaded, self._problem, self.version = predictor, "", predictor.version

    @property
    def cascade(self) -> Cascade | None:
        """The verifier of the artifact in use, with the tiers it stands between."""
        return None if self._loaded is None else self._loaded.cascade

    def report(self) -> dict[str, object]:
        """What whoever mounted the file wants to know: is it in use, and is it this router's."""
        return {
            "version": self.version,
            "tiers": [] if self._loaded is None else list(self._loaded.tiers),
            "problem": self._problem,
            "reason": "NotLoaded" if self._loaded is None else "Loaded",
            "verdicts": [] if self._loaded is None else list(self._loaded.verdicts),
        }

    def score(self, prompt: str) -> Score:
        """Raises PredictorUnavailableError while there is no usable artifact."""
        if self._loaded is None:
            raise PredictorUnavailableError(self._problem)
        return self._loaded.score(prompt)

    def reload(self) -> bool:
        """Read the file if it changed; True when a new predictor is in use.

        A file that turns bad leaves the good one in use.
        """
        try:
            stat = self._path.stat()
            stamp = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
            if stamp == self._stamp:
                return False
            self._stamp = stamp
            loaded = load_artifact(self._path, self._embedding)
        except (OSError, PredictorError) as error:
            if str(error) != self._problem:
                self._problem = str(error)
                logger.error("predictor not loaded: %s", error)
            return False
        missing = [tier for tier in self._tiers if tier not in loaded.tiers]
        if missing:
            logger.warning(
                "predictor %s knows tiers %s but not %s; train it on outcomes of every tier",
                loaded.version,
                ", ".join(loaded.tiers),
                ", ".join(missing),
            )
        if loaded.embedding_problem:
            logger.warning("predictor %s: %s", loaded.version, loaded.embedding_problem)
        self._loaded = loaded
        self._problem = ""
        self.version = loaded.version
        logger.info("predictor %s loaded from %s", loaded.version, self._path)
        return True

    def training_gains(self, dearest: str, cheapest: str) -> list[tuple[float, float]]:
        """(gain, quality of the dearest tier) of typical prompts; empty where nothing is known."""
        return [] if self._loaded is None else training_gains(self._loaded, dearest, cheapest)


def training_gains(
    predictor: LearnedPredictor, dearest: str, cheapest: str
) -> list[tuple[float, float]]:
    """(gain, quality of the dearest tier) of typical prompts; empty where nothing is known.

    The artifact holds deciles of its out-of-fold utilities, which sum to zero over tiers;
    with two tiers a gain is therefore twice the dearest tier's utility.
    """
    if set(predictor.tiers) != {dearest, cheapest}:
        return []
    deciles = predictor.utility_deciles
    means = predictor.meta.get("mean_quality")
    if not isinstance(means, list) or len(means) != len(predictor.tiers):
        return []
    if not all(isinstance(mean, float | int) and 0.0 <= mean <= 1.0 for mean in means):
        return []  # a damaged file that still scores: the router goes on without them
    column = predictor.tiers.index(dearest)
    gains = [2.0 * float(value) for value in deciles[:, column]]
    steps = TRAINING_SAMPLES // (len(gains) - 1)
    between = [
        low + (high - low) * (step + 0.5) / steps
        for low, high in pairwise(gains)
        for step in range(steps)
    ]
    return [(gain, float(means[column])) for gain in between]


def _embedding(directory: str | None) -> StaticEmbedding | None:
    """None, said in the log, where the directory will not do: the other views go on."""
    if directory is None:
        return None
    try:
        return StaticEmbedding(Path(directory))
    except EmbeddingError as error:
        logger.error("embedding not loaded: %s", error)
        return None


def configured_predictor(config: RouterConfig) -> Predictor | None:
    """Length comes from the configuration alone; None for Fixed, which scores nothing, and for
    Learned."""
    if config.predictor.type == "Length":
        return LengthPredictor(config.tiers, config.predictor)
    return None
