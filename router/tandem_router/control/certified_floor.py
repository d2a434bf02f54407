"""Hold a quality floor with a stated risk, from shadow labels of known probability.

Claim: with probability at least 1 - risk, at no time does the threshold in force lose more than
(1 - floor) of the large tier's mean quality, as long as traffic stays what it was since the last
change point.

How: thresholds are tried from "everything to the large tier" upwards. For each, the loss of one
labelled request is

    Z = 1[gain <= threshold]*(q_large - q_small) - (1 - floor)*q_large,

whose mean is at most zero iff the floor holds. A betting martingale (Waudby-Smith and Ramdas
2024, section 4) collects evidence against "mean Z > 0" with importance weight 1/pi per label; a
threshold is certified when its capital passes 1/risk, and only after all below it (fixed
sequence, as in Learn then Test, Angelopoulos et al. 2021), so one risk covers them all and every
moment. The losses need not be monotone in the threshold, which plain conformal risk control
asks for and routing breaks: on some prompts the small tier is the better one.

After a change: a second martingale bets that the threshold in force *breaks* the floor, and where
labels carry predictions, CUSUMs watch each tier's residual (all labels speak there, not only
those near the threshold, so it is several times faster). When one wins, all labels are
forgotten, traffic goes to the large tier, and certification starts again.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from tandem_router.control.changes import ResidualDrift
from tandem_router.control.shadow_sampler import ShadowLabel

# How much of the capital one label may cost; below 1 so that capital stays positive.
_MAX_BET = 0.75


class LossDetector:
    """Bets that a threshold loses too much quality (an e-detector, restarted at zero).

    alarm: mean number of labels between false alarms.
    """

    def __init__(self, smallest_probability: float, alarm: float = 5_000.0) -> None:
        self._least_mean = 0.02 * smallest_probability
        self._log_alarm = math.log(alarm)
        self.reset()

    def reset(self) -> None:
        """Start anew, as at another threshold."""
        self.evidence = 0.0  # log capital
        self._sum, self._squares, self._count = 0.0, 0.25, 1.0

    def observe(self, loss: float) -> bool:
        """One label's loss at the threshold, weighted, above -1; True on an alarm."""
        mean = max(self._least_mean, self._sum / self._count)
        bet = min(0.4, mean / (self._squares / self._count))
        self.evidence = max(0.0, self.evidence + math.log1p(bet * loss))
        # Recent losses only: the bet has to follow a change, not the quiet time before it.
        keep = 0.98
        self._sum = keep * self._sum + loss
        self._squares = keep * self._squares + loss * loss
        self._count = keep * self._count + 1.0
        return self.evidence >= self._log_alarm


class QualityFloor:
    """Largest certified gain threshold under a floor, anytime valid.

    Args:
        floor: smallest acceptable share of the large tier's mean quality, 0..1.
        risk: probability with which the claim may fail, e.g. 0.1.
        smallest_probability: lower bound of the labels' sampling probabilities.
        thresholds: candidate gain thresholds, ascending; default 81 values from -0.4 to 0.4,
            denser around zero would change little (the step is 1 point of quality).
        alarm: mean number of labels between false alarms of the loss detector.
        drift: whether to forget after change points; without, the claim covers one regime only.
    """

    def __init__(
        self,
        floor: float,
        risk: float = 0.1,
        *,
        smallest_probability: float = 0.05,
        thresholds: NDArray[np.float64] | None = None,
        alarm: float = 5_000.0,
        drift: bool = True,
    ) -> None:
        if not 0.0 <= floor <= 1.0:
            raise ValueError(f"floor={floor} must be a share between 0 and 1")
        if not 0.0 < risk < 1.0:
            raise ValueError(f"risk={risk} must be a probability strictly between 0 and 1")
        if not 0.0 < smallest_probability <= 1.0:
            raise ValueError(f"smallest_probability={smallest_probability} must be in (0, 1]")
        self.floor = floor
        self.risk = risk
        self.smallest_probability = smallest_probability
        self.thresholds = np.linspace(-0.4, 0.4, 81) if thresholds is None else thresholds
        self.num_labels = 0
        self.num_alarms = 0
        # Of the last alarm: whether the small tier does better against the large one than before.
        self.rose = False
        self._against = LossDetector(smallest_probability, alarm)
        self._drift = (ResidualDrift(), ResidualDrift()) if drift else None
        self.forget()

    @property
    def threshold(self) -> float:
        """Certified gain threshold; -inf (all to the large tier) until there is one."""
        return float(self.thresholds[self._level]) if self._level >= 0 else -math.inf

    def forget(self) -> None:
        """Drop every label and fall back to the large tier, as after a change point."""
        self._level = -1
        size = len(self.thresholds)
        self.log_capital = np.zeros(size)  # of the bet against each threshold
        self._certified = np.zeros(size, dtype=bool)
        self._sum = np.zeros(size)
        self._sum_squares = np.full(size, 0.25)
        self._count = 1.0
        self._against.reset()
        for detector in self._drift or ():
            detector.reset()

    def observe(self, label: ShadowLabel) -> bool:
        """Take one label; True when it raised the change alarm.

        A label with an unusable number is ignored: it can neither certify nor alarm.
        """
        numbers = (label.gain, label.quality_small, label.quality_large, label.probability)
        if not all(map(math.isfinite, numbers)) or not 0.0 < label.probability <= 1.0:
            return False
        self.num_labels += 1
        small = min(1.0, max(0.0, label.quality_small))
        large = min(1.0, max(0.0, label.quality_large))
        # Saving per threshold, in [-1, 2): positive is evidence that the floor holds. Scaled by
        # pi_min/pi it stays above -1, which keeps every bet below one solvent.
        weight = min(1.0, self.smallest_probability / label.probability)
        kept = (1.0 - self.floor) * large
        below = (label.gain <= self.thresholds).astype(np.float64)
        saving: NDArray[np.float64] = weight * (kept - below * (large - small))

        mean = self._sum / self._count
        bet = np.clip(mean / (self._sum_squares / self._count), 0.0, _MAX_BET)
        self.log_capital += np.log1p(bet * saving)
        if self._drift is not None and (self._detect(saving) or self._drifted(label)):
            self.num_alarms += 1
            self.forget()
            return True
        self._sum += saving
        self._sum_squares += saving * saving
        self._count += 1.0

        self._certified |= self.log_capital >= -math.log(self.risk)
        while self._level + 1 < len(self.thresholds) and self._certified[self._level + 1]:
            self._level += 1
            self._against.evidence = 0.0
        return False

    def _drifted(self, label: ShadowLabel) -> bool:
        if self._drift is None or label.predicted_small is None or label.predicted_large is None:
            return False
        small = self._drift[0].observe(label.quality_small, label.predicted_small)
        large = self._drift[1].observe(label.quality_large, label.predicted_large)
        self.rose = (small and self._drift[0].rose) or (large and not self._drift[1].rose)
        return small or large

    def _detect(self, saving: NDArray[np.float64]) -> bool:
        """Whether the threshold in force loses too much."""
        self.rose = False
        return self._level >= 0 and self._against.observe(-float(saving[self._level]))
