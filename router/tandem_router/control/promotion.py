"""When a retrained predictor takes over, and when it is taken back. Pure.

A candidate is scored beside the predictor in use on labels that came after its training, so that
neither has seen them. Per label the difference of their squared errors is one bet (Waudby-Smith and
Ramdas 2024): a capital grows while the candidate predicts better, another while it predicts worse,
and whichever passes 1/risk first decides, at any time. A candidate that is no better after
`most_labels` is rejected: a change needs a reason. After a promotion the old predictor is scored
beside the new one in the same way, and comes back where it proves better, or where a tier's
measured quality falls meanwhile.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["better", "worse", "no better"]
Kind = Literal["trained", "failed", "promoted", "rejected", "rolled back", "kept"]

_MOST_BET = 0.5
STEPS_KEPT = 20


class PairedTest:
    """Whether one predictor's errors are smaller than another's, label by label.

    Args:
        risk: with which either verdict may be wrong, over all times together.
        most_labels: after so many the one that is tested is no better.
        least_labels: before so many there is no verdict.
    """

    def __init__(self, risk: float, most_labels: int, least_labels: int = 30) -> None:
        self._bar = -math.log(risk)
        self._most, self._least = most_labels, least_labels
        self.num_labels = 0
        self.sum = 0.0
        self.sum_squares = 0.0
        self._scale = 0.0
        self._capital = {1: 0.0, -1: 0.0}  # log, of better and of worse

    @property
    def mean(self) -> float:
        """By how much the tested one's squared error is smaller; weighted by the labels."""
        return self.sum / self._scale if self._scale > 0.0 else 0.0

    def observe(self, known: float, tested: float, weight: float = 1.0) -> Verdict | None:
        """Errors of both on one label, 0..1; weight: 0..1, in proportion to one over its chance.

        Numbers that are none count for nothing.
        """
        if not all(map(math.isfinite, (known, tested, weight))):
            return None
        weight = min(1.0, max(0.0, weight))
        better = weight * min(1.0, max(-1.0, known - tested))
        spread = 0.25 + self.sum_squares
        for sign in (1, -1):
            bet = min(_MOST_BET, max(0.0, sign * self.sum / spread))
            self._capital[sign] += math.log1p(bet * sign * better)
        self.num_labels += 1
        self.sum += better
        self.sum_squares += better * better
        self._scale += weight
        if self.num_labels >= self._least:
            if self._capital[1] >= self._bar:
                return "better"
            if self._capital[-1] >= self._bar:
                return "worse"
        return "no better" if self.num_labels >= self._most else None


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that happened to the predictor; version: of whom it is about."""

    at: float  # Unix
    kind: Kind
    version: str
    why: str


class PredictorLife:
    """Training, shadow, promotion and return of one router's predictor.

    Args:
        every_s: least time between two trainings.
        min_labels: new labels that a training needs.
    """

    def __init__(
        self, every_s: float, min_labels: int, risk: float = 0.05, most_labels: int = 1_000
    ) -> None:
        self.every_s, self.min_labels = every_s, min_labels
        self._risk, self._most = risk, most_labels
        self.phase: Literal["idle", "training", "shadowed", "watched"] = "idle"
        self.other: str | None = None  # the candidate, or the predecessor that may come back
        self.test: PairedTest | None = None
        self.steps: deque[Step] = deque(maxlen=STEPS_KEPT)
        self._trained_at: float | None = None

    def due(self, now: float, num_new_labels: int) -> bool:
        """Whether to train now. The first training waits for labels alone."""
        if self.phase in ("training", "shadowed") or num_new_labels < self.min_labels:
            return False
        return self._trained_at is None or now >= self._trained_at + self.every_s

    def began(self, now: float) -> None:
        """Training has begun; a predecessor that was watched is let go."""
        self.phase, self.other, self.test = "training", None, None
        self._trained_at = now

    def failed(self, now: float, why: str) -> None:
        self.phase = "idle"
        self._note(now, "failed", "", why)

    def trained(self, now: float, version: str, num_labels: int) -> None:
        """A candidate is there, and shadowed from now on."""
        self.phase, self.other = "shadowed", version
        self.test = PairedTest(self._risk, self._most)
        self._note(now, "trained", version, f"from {num_labels} labels; now scored beside")

    def observe(
        self, now: float, active: str, in_use: float, other: float, weight: float = 1.0
    ) -> Literal["promote", "reject", "roll back", "keep"] | None:
        """Squared errors of the predictor in use and of the other one on a new label."""
        test, name = self.test, self.other
        if test is None or name is None:
            return None
        verdict = test.observe(in_use, other, weight)
        if verdict is None:
            return None
        said = f"squared error {test.mean:+.4f} smaller over {test.num_labels} labels after it"
        if self.phase == "shadowed" and verdict == "better":
            self.phase, self.other = "watched", active
            self.test = PairedTest(self._risk, self._most)
            self._note(now, "promoted", name, said)
            return "promote"
        if self.phase == "shadowed":
            self._end()
            self._note(now, "rejected", name, f"{verdict} than {active}: {said}")
            return "reject"
        self._end()
        if verdict == "better":
            why = f"{name} predicts better again: {said}"
            self._note(now, "rolled back", active, why)
            return "roll back"
        self._note(now, "kept", active, f"{name} is not better: {said}")
        return "keep"

    def quality_fell(self, now: float, active: str, why: str) -> bool:
        """Measured quality has fallen; True where the predecessor comes back."""
        if self.phase != "watched":
            return False
        self._end()
        self._note(now, "rolled back", active, why)
        return True

    def forget(self) -> None:
        """Somebody mounted another predictor: what was compared concerns it no longer."""
        if self.phase != "training":
            self._end()

    def _end(self) -> None:
        self.phase, self.other, self.test = "idle", None, None

    def _note(self, now: float, kind: Kind, version: str, why: str) -> None:
        self.steps.append(Step(now, kind, version, why))
