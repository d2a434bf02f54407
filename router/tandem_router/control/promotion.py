"""When a retrained predictor takes over, and when it is taken back. Pure.

A candidate is scored beside the predictor in use on labels that came after its training, so that
neither has seen them. Per label the difference of their squared errors is one bet (Waudby-Smith and
Ramdas 2024): a capital grows while the candidate predicts better, another while it predicts worse,
and whichever passes 1/risk first decides, at any time. What a bet may lose bounds its stake, so the
candidate is tested as one that leaves the predictor in use by no more than it does on nine of ten
of the first labels: two that differ by little everywhere are told apart after a fraction of the
labels. A confidence sequence of the mean, tried too, promoted equals in one case of two where
tiers are right in 95 of 100. A candidate that is no better after `most_labels` is rejected: a
change needs a reason. After a promotion the old predictor is scored beside the new one in the same
way, and comes back where it proves better, or where a tier's measured quality falls meanwhile.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Verdict = Literal["better", "worse", "no better"]
Kind = Literal["trained", "failed", "promoted", "rejected", "rolled back", "kept"]

_MOST_STAKE = 0.75
#: First labels, which say how far the candidate goes and on which nothing is bet.
FIRST_LABELS = 30
_USUAL_SHARE, _LEAST_MOVE = 0.9, 0.01
STEPS_KEPT = 20


@dataclass(frozen=True, slots=True)
class Compared:
    """One tier's measured quality on a label, and what both predictors said of it; 0..1 each."""

    measured: float
    in_use: float
    other: float

    def gain(self, most_move: float = 1.0) -> float:
        """By how much the other's squared error is smaller, were it to move no further."""
        move = min(most_move, max(-most_move, self.other - self.in_use))
        return (self.measured - self.in_use) ** 2 - (self.measured - self.in_use - move) ** 2


class PairedTest:
    """Whether one predictor's errors are smaller than another's, label by label.

    Args:
        risk: with which either verdict may be wrong, over all times together.
        most_labels: after so many the one that is tested is no better.
    """

    def __init__(self, risk: float, most_labels: int) -> None:
        self._bar = -math.log(risk)
        self._most = most_labels
        self.num_labels = 0
        self._gained, self._weight = 0.0, 0.0
        self._moves: list[float] = []
        self._most_move = 1.0
        self._sum, self._squares = 0.0, 0.25
        self._capital = {1: 0.0, -1: 0.0}  # log, of better and of worse

    @property
    def mean(self) -> float:
        """By how much the tested one's squared error is smaller; weighted by the labels."""
        return self._gained / self._weight if self._weight > 0.0 else 0.0

    def observe(self, tiers: Sequence[Compared], weight: float = 1.0) -> Verdict | None:
        """One label; weight: 0..1, in proportion to one over its chance.

        Numbers that are none count for nothing.
        """
        numbers = (weight, *(n for t in tiers for n in (t.measured, t.in_use, t.other)))
        if not tiers or not all(
            math.isfinite(number) and 0.0 <= number <= 1.0 for number in numbers
        ):
            return None
        self.num_labels += 1
        self._weight += weight
        self._gained += weight * _mean([tier.gain() for tier in tiers])
        if self.num_labels <= FIRST_LABELS:
            self._moves += [abs(tier.other - tier.in_use) for tier in tiers]
            if self.num_labels == FIRST_LABELS:
                usual = sorted(self._moves)[int(_USUAL_SHARE * (len(self._moves) - 1))]
                self._most_move = max(_LEAST_MOVE, usual)
            return None
        # No gain is beyond twice the move.
        won = weight * _mean([tier.gain(self._most_move) for tier in tiers]) / self._most_move / 2.0
        for sign in (1, -1):
            stake = min(_MOST_STAKE, max(0.0, sign * self._sum / self._squares))
            self._capital[sign] += math.log1p(stake * sign * won)
        self._sum += won
        self._squares += won * won
        if self._capital[1] >= self._bar:
            return "better"
        if self._capital[-1] >= self._bar:
            return "worse"
        return "no better" if self.num_labels >= self._most else None

    def state(self) -> dict[str, Any]:
        """As JSON, for `restore`."""
        return {
            "num_labels": self.num_labels,
            "gained": self._gained,
            "weight": self._weight,
            "moves": self._moves,
            "most_move": self._most_move,
            "sum": self._sum,
            "squares": self._squares,
            "capital": [self._capital[1], self._capital[-1]],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self.num_labels = int(state["num_labels"])
        self._gained, self._weight = float(state["gained"]), float(state["weight"])
        self._moves, self._most_move = list(state["moves"]), float(state["most_move"])
        self._sum, self._squares = float(state["sum"]), float(state["squares"])
        self._capital = dict(zip((1, -1), map(float, state["capital"]), strict=True))


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)


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
        self._trained_from = 0  # labels, of the candidate

    def due(self, now: float, num_new_labels: int) -> bool:
        """Whether to train now. The first training waits for labels alone.

        A candidate that is not proven once there are twice the labels that it was trained from
        makes room for one that is trained from all of them.
        """
        needed = self.min_labels
        if self.phase == "shadowed":
            needed = max(needed, self._trained_from)
        if self.phase == "training" or num_new_labels < needed:
            return False
        return self._trained_at is None or now >= self._trained_at + self.every_s

    def began(self, now: float) -> None:
        """Training has begun; a predecessor that was watched is let go."""
        if self.phase == "shadowed" and self.other is not None:
            why = "not proven better, and there are twice the labels to train from"
            self._note(now, "rejected", self.other, why)
        self.phase, self.other, self.test = "training", None, None
        self._trained_at = now

    def failed(self, now: float, why: str) -> None:
        self.phase = "idle"
        self._note(now, "failed", "", why)

    def trained(self, now: float, version: str, num_labels: int) -> None:
        """A candidate is there, and shadowed from now on."""
        self.phase, self.other = "shadowed", version
        self._trained_from = num_labels
        self.test = PairedTest(self._risk, self._most)
        self._note(now, "trained", version, f"from {num_labels} labels; now scored beside")

    def observe(
        self, now: float, active: str, tiers: Sequence[Compared], weight: float = 1.0
    ) -> Literal["promote", "reject", "roll back", "keep"] | None:
        """What the predictor in use and the other one said of a new label."""
        test, name = self.test, self.other
        if test is None or name is None:
            return None
        verdict = test.observe(tiers, weight)
        if verdict is None:
            return None
        size = f"{abs(test.mean):.4f} {'larger' if test.mean < 0.0 else 'smaller'}"
        said = f"squared error {size} over {test.num_labels} labels after it"
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

    def outdated(self, now: float, why: str) -> bool:
        """What a candidate was trained from is no longer so; True where there was one."""
        if self.phase != "shadowed" or self.other is None:
            return False
        self._note(now, "rejected", self.other, why)
        self._end()
        return True

    def state(self) -> dict[str, Any]:
        """As JSON, for `restore` in another process."""
        return {
            "phase": self.phase,
            "other": self.other,
            "trained_at": self._trained_at,
            "trained_from": self._trained_from,
            "test": None if self.test is None else self.test.state(),
            "steps": [asdict(step) for step in self.steps],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where another process stopped. Raises KeyError, TypeError or ValueError."""
        steps = [Step(**step) for step in state["steps"]]
        test = None
        if state["test"] is not None:
            test = PairedTest(self._risk, self._most)
            test.restore(state["test"])
        self.phase, self.other, self.test = state["phase"], state["other"], test
        self._trained_at, self._trained_from = state["trained_at"], int(state["trained_from"])
        self.steps.clear()
        self.steps.extend(steps)

    def _end(self) -> None:
        self.phase, self.other, self.test = "idle", None, None

    def _note(self, now: float, kind: Kind, version: str, why: str) -> None:
        self.steps.append(Step(now, kind, version, why))
