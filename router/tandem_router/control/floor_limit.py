"""How high the gain threshold may go under a quality floor, as far as is known at the moment.

Three bases, one after the other:

* Predicted: the predictor's expectation, corrected by what labels lost beyond it;
* Certified: labels prove at least as much (`QualityFloor`), at a stated risk;
* Refuted: labels prove that the predicted limit breaks the floor, or that the cheap tier got worse
  against its prediction. From then on only what labels certify counts, down to everything to the
  dearest tier, until another predictor comes.

Labels are a judge's, whose losses may be too small: verdicts that err pull two answers together.
Gold labels say by which factor (`judge_leans`), and what may be lost, as the judge sees it, is
divided by it. That is a correction, not part of the certificate.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tandem_router.control.certified_floor import LossDetector, QualityFloor
from tandem_router.control.predicted_floor import PredictedFloor
from tandem_router.control.shadow_sampler import ShadowLabel

Basis = Literal["Predicted", "Certified", "Refuted"]

RISK = 0.1
#: Share of what may be lost that a predicted limit keeps back where labels are to come.
MARGIN = 0.4
#: Labels that correct the prediction, and for which share of new ones they do so again.
OFFSET_WINDOW = 1_000
CORRECT_SHARE = 0.02
#: Labels that are learned again where a judge proves to lean otherwise.
LABELS_KEPT = 1_000
#: A factor that moved by less changes nothing.
LEAN_STEP = 0.05


class FloorLimit:
    """The limit of one router's threshold; pure.

    Args:
        floor: smallest acceptable share of the dearest tier's mean quality, 0..1.
        initial: limit while nothing is known.
        training: (gain, quality of the dearest tier) pairs that stand for traffic at the start.
        predicts: whether the predictor states qualities; without, only labels limit anything.
        thresholds: what may be certified, ascending; default as `QualityFloor`.
        margin: of the predicted limit, until labels correct it (`PredictedFloor`).
    """

    def __init__(
        self,
        floor: float,
        initial: float,
        training: Iterable[tuple[float, float]] = (),
        predicts: bool = True,
        thresholds: NDArray[np.float64] | None = None,
        margin: float = 0.0,
    ) -> None:
        self.predicts = predicts
        self._predicted = PredictedFloor(
            floor, initial if predicts else 1.0, training, margin=margin
        )
        self._thresholds = thresholds
        self._lean = 1.0
        self._begin(floor)

    def _begin(self, floor: float) -> None:
        self._asked = floor
        self._labels: deque[tuple[ShadowLabel, float]] = deque(maxlen=LABELS_KEPT)
        self._new_certificate()
        self._against = LossDetector(1.0)
        self._residuals: deque[tuple[float, float, float]] = deque(maxlen=OFFSET_WINDOW)
        self._since_corrected = 0
        self.refuted = False

    def _new_certificate(self) -> None:
        """Nothing is proven of the floor as the judge sees it."""
        self._floor = 1.0 - (1.0 - self._asked) / self._lean
        self.certified = QualityFloor(
            self._floor, RISK, smallest_probability=1.0, thresholds=self._thresholds
        )

    def judge_leans(self, factor: float) -> bool:
        """Losses are this many times what the judge says; True where that changed the limit."""
        if abs(factor - self._lean) <= LEAN_STEP * self._lean:
            return False
        self._lean = factor
        self._new_certificate()
        self._predicted.set_floor(self._floor)
        for label, in_force in list(self._labels):
            self._learn(label, in_force)
        return True

    @property
    def threshold(self) -> float:
        """The highest gain threshold that may be in force."""
        if self.basis == "Predicted":
            return self._predicted.threshold
        return min(1.0, max(-1.0, self.certified.threshold))

    @property
    def basis(self) -> Basis:
        """What the limit rests on."""
        if self.certified.threshold >= self._predicted.threshold:
            return "Certified"
        return "Refuted" if self.refuted else "Predicted"

    @property
    def lean(self) -> float:
        """By how much losses are larger than the judge says."""
        return self._lean

    @property
    def num_labels(self) -> int:
        return self.certified.num_labels

    def clip(self, asked: float | None) -> float:
        """The threshold where somebody asks for another: no more than the limit."""
        return self.threshold if asked is None else min(asked, self.threshold)

    def set_floor(self, floor: float) -> None:
        """Another floor for the same traffic: what was certified was for the old one."""
        self._begin(floor)
        self._predicted.set_floor(self._floor)

    def observe(self, gain: float, dearest_quality: float, stake: float = 1.0) -> bool:
        """One scored request; True when the limit was computed anew.

        stake: what the dearest tier costs more for it, in units of the usual.
        """
        return self.predicts and self._predicted.observe(gain, dearest_quality, stake)

    def weigh(self, stakes: bool) -> bool:
        """Ask each request for the threshold times its stake, where the limit allows for that.

        It does while it rests on predictions alone: labels say what is lost below a gain.
        """
        predicted = self._predicted
        weighs = stakes and self.predicts and predicted.stakes_pay and not self.certified.num_labels
        predicted.weigh(weighs)
        return weighs

    def learn(self, label: ShadowLabel, in_force: float) -> bool:
        """One label of both tiers; True where everything learned before is forgotten.

        Labels count alike: each was drawn with the share that all were drawn with at its time.
        in_force: the threshold that requests are compared with now.
        """
        numbers = (label.gain, label.quality_small, label.quality_large)
        if not all(map(math.isfinite, numbers)):
            return False
        fell = self._learn(label, in_force)
        if fell:
            self._labels.clear()
        self._labels.append((label, in_force))
        self._correct(label)
        return fell

    def _learn(self, label: ShadowLabel, in_force: float) -> bool:
        small = min(1.0, max(0.0, label.quality_small))
        large = min(1.0, max(0.0, label.quality_large))
        below = label.gain <= min(in_force, self._predicted.threshold)
        loss = large - small if below else 0.0
        against = self._against.observe(loss - (1.0 - self._floor) * large)
        fell = self.certified.observe(label)
        if against:
            self.refuted = True
            self._against.reset()
        if fell:
            self._residuals.clear()
            self._against.reset()
            self.refuted = self.refuted or not self.certified.rose
        return fell

    def _correct(self, label: ShadowLabel) -> None:
        if label.predicted_small is None or label.predicted_large is None:
            return
        self._residuals.append(
            (
                label.gain,
                label.quality_small - label.predicted_small,
                label.quality_large - label.predicted_large,
            )
        )
        self._since_corrected += 1
        if self._since_corrected >= CORRECT_SHARE * len(self._residuals):
            self._since_corrected = 0
            self._predicted.correct(self._residuals)
