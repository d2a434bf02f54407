"""What a judge's word on one answer is worth beside the verifier's verdict, by what came of others.

Pure. Of answers whose quality was found out later, it is counted how often the judge took right
and wrong ones for good; Bayes' rule then moves the verdict by those likelihoods. A judge that is
no better than chance, or lies, moves nothing. While few are known its praise counts for nothing
and its blame as that of one that is right in 7 of 10: what nobody has checked may cost money, not
quality.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field

from tandem_router.predictor.cascade.verifier import Verdict

#: So many right and so many wrong answers, by effective number, before its word counts as measured.
MIN_EACH = 10.0
UNCHECKED_BLAME = math.log(0.3 / 0.7)
MOST_KEPT = 50_000


@dataclass(slots=True)
class _Answers:
    """Answers of one kind, right or wrong, weighted by one over the probability of their label."""

    weight: float = 0.0
    squares: float = 0.0
    good: float = 0.0  # weight of those that the judge took for good

    def add(self, part: float, weight: float, good: bool) -> None:
        """part: of one answer; negative takes it out again."""
        self.weight += part * weight
        self.squares += part * weight * weight
        self.good += part * weight * good

    @property
    def effective(self) -> float:
        return self.weight * self.weight / self.squares if self.squares > 1e-12 else 0.0

    def share(self, good: bool) -> float:
        """Of them that were taken for good, or for bad; with one of each more than were seen."""
        unit = self.weight / self.effective
        taken = self.good if good else self.weight - self.good
        return (taken + unit) / (self.weight + 2.0 * unit)


@dataclass(slots=True)
class _Said:
    """A judge's word on one request's first answer; what came of it is (quality, weight)."""

    tier: str
    good: bool
    found: tuple[float, float] | None = None
    is_gold: bool = False


@dataclass(slots=True)
class Opinions:
    """What one judge said, and what was found out of it."""

    right: _Answers = field(default_factory=_Answers)
    wrong: _Answers = field(default_factory=_Answers)
    num_known: int = 0
    _said: OrderedDict[str, _Said] = field(default_factory=OrderedDict)

    def said(self, request_id: str, tier: str, good: bool) -> None:
        """The judge's word on the answer that `tier` gave first."""
        self._said[request_id] = _Said(tier, good)
        if len(self._said) > MOST_KEPT:
            self._said.popitem(last=False)

    def forget(self) -> None:
        """Another judge, another scale."""
        self.right, self.wrong, self.num_known = _Answers(), _Answers(), 0
        self._said.clear()

    def found(
        self, request_id: str, quality: Mapping[str, float], probability: float, is_gold: bool
    ) -> None:
        """The quality of that request's answers; what people know takes the place of the rest."""
        said = self._said.get(request_id)
        if said is None or said.tier not in quality or not 0.0 < probability <= 1.0:
            return
        if said.found is not None:
            if said.is_gold or not is_gold:
                return
            self._count(said.good, *said.found, -1.0)
        said.found, said.is_gold = (quality[said.tier], 1.0 / probability), is_gold
        self._count(said.good, *said.found, 1.0)

    def _count(self, good: bool, quality: float, weight: float, sign: float) -> None:
        self.num_known += int(sign)
        for kind, part in ((self.right, quality), (self.wrong, 1.0 - quality)):
            if part > 0.0:
                kind.add(sign * part, weight, good)

    @property
    def checked(self) -> bool:
        return min(self.right.effective, self.wrong.effective) >= MIN_EACH

    def log_ratio(self, good: bool) -> float:
        """By how much the judge's word moves the log odds that the answer is right."""
        if not self.checked:
            return 0.0 if good else UNCHECKED_BLAME
        found = math.log(self.right.share(good) / self.wrong.share(good))
        return max(0.0, found) if good else min(0.0, found)

    def weigh(self, verdict: Verdict, good: bool) -> Verdict:
        """The verdict together with the judge's word; what it says of the dearer tier stays."""
        p, ratio = verdict.quality_small, math.exp(self.log_ratio(good))
        if ratio == 1.0:
            return verdict
        return Verdict(p * ratio / (p * ratio + 1.0 - p), verdict.quality_large)
