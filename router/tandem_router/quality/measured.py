"""What the labels of one router say: quality ratios with intervals, by tier and by tenant.

Requests and labels come in, estimates go out; the mathematics is `control/quality_ratio.py`.
Feedback has no known probability: it moves the ratio, and no tenant's moves it by more than that
tenant's share of the traffic, or 5 %. When a tier's quality drifts away from its prediction, what
was learned before is forgotten. Pure: times are those of the labels.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from tandem_router.control import ResidualDrift
from tandem_router.control.quality_ratio import Estimate, Sample, estimate
from tandem_router.quality.labelled import Labelled
from tandem_router.store.records import Label

MOST_ROWS = 10_000
MOST_TENANT_WEIGHT = 0.05
#: Verdicts of a tenant's users at which their mean counts half.
HALF_BELIEVED = 20.0
#: Labels of which the older half says what a tier's quality was, and the last few what it is.
RECENT, LAST = 400, 20
#: The history has a point at least so many seconds apart, fewer the longer it is.
HISTORY_S, HISTORY_SHARE = 60.0, 1 / 200
MOST_HISTORY = 600
#: Gold labels before which the judge is taken at its word, and losses that it is believed for.
LEAST_GOLD, BELIEVED_LOSSES = 20, 3.0
MOST_LEAN = 4.0
#: Tenants, those with most requests, of which `state` tells the ratio.
MOST_TENANTS = 20


@dataclass(slots=True)
class _Traffic:
    """Sums of predictions over answered requests."""

    num: int = 0
    served: float = 0.0
    by_tier: dict[str, float] = field(default_factory=dict)

    def add(self, other: _Traffic) -> None:
        self.num += other.num
        self.served += other.served
        for tier, quality in other.by_tier.items():
            self.by_tier[tier] = self.by_tier.get(tier, 0.0) + quality


@dataclass(slots=True)
class _Said:
    """What a tenant's users said, against what was predicted of the same answers."""

    num: int = 0
    surprise: float = 0.0


@dataclass(frozen=True, slots=True)
class Change:
    """A tier whose quality left its prediction. statistic: log of the capital won, of 7 needed."""

    at: float
    tier: str
    rose: bool
    statistic: float
    num_labels: int
    before: float
    after: float


class Measured:
    """dearest: the tier that all is compared with. On a change, `on_change` is called.

    predicts: whether predictions are qualities; ranks help the estimate, and are not shown.
    """

    def __init__(self, tiers: tuple[str, ...], dearest: str, predicts: bool = True) -> None:
        self._predicts = predicts
        self._tiers = tiers
        self.dearest = dearest
        self.since: float | None = None
        self._restarted = False
        self.changes: deque[Change] = deque(maxlen=20)
        self.history: deque[dict[str, float | None]] = deque(maxlen=MOST_HISTORY)
        self.on_change: Callable[[Change], None] = lambda change: None
        self.num_by_source: dict[str, int] = {}
        self._drift = {tier: ResidualDrift() for tier in tiers}
        self._recent: dict[str, deque[float]] = {tier: deque(maxlen=RECENT) for tier in tiers}
        self._feedback: OrderedDict[str, Label] = OrderedDict()
        self._said: dict[str, _Said] = {}
        self._forget()

    def set_tiers(self, tiers: tuple[str, ...], dearest: str) -> None:
        """Compare these tiers, with this one; labels of those that stay are kept."""
        self._tiers = tiers
        self._labelled.add_tiers(tiers)
        self._drift = {tier: self._drift.get(tier) or ResidualDrift() for tier in tiers}
        self._recent = {tier: self._recent.get(tier) or deque(maxlen=RECENT) for tier in tiers}
        if dearest != self.dearest:
            # What was predicted of past traffic was added up for another dearest tier.
            self.dearest = dearest
            self._traffic.clear()
        self._version += 1
        self._cache.clear()

    def states(self, qualities: bool) -> None:
        """Whether what is predicted from now on are qualities, or ranks only."""
        self._predicts = qualities

    def _forget(self) -> None:
        self._labelled = Labelled(self._tiers, MOST_ROWS)
        self._traffic: dict[str, _Traffic] = {}  # by tenant
        self._delivered_since = -math.inf
        self._cache: dict[tuple[str | None, str | None], tuple[int, Estimate]] = {}
        self._version = 0

    # -- what comes in ----------------------------------------------------------------------

    def served(self, tenant: str, tier: str, predicted: Mapping[str, float]) -> None:
        """One answered request that may be learned from."""
        traffic = self._traffic.get(tenant)
        if traffic is None:
            traffic = self._traffic[tenant] = _Traffic()
        traffic.num += 1
        if predicted:
            traffic.served += predicted.get(tier, 0.0)
            sums = traffic.by_tier
            for name, quality in predicted.items():
                sums[name] = sums.get(name, 0.0) + quality

    def _traffic_of(self, tenant: str | None) -> _Traffic:
        """None: of all tenants."""
        if tenant is not None:
            return self._traffic.get(tenant) or _Traffic()
        total = _Traffic()
        for traffic in self._traffic.values():
            total.add(traffic)
        return total

    def learn(self, label: Label) -> None:
        """One label; what is known already changes nothing but the last word of a source."""
        self.num_by_source[label.source] = self.num_by_source.get(label.source, 0) + 1
        self._version += 1
        if label.source == "feedback":
            self._hear(label)
            return
        known = label.request_id in self._labelled
        if label.source == "gold":
            if not known:
                self._labelled.add(label)
            self._labelled.check(label, label.probability if known else 1.0)
        elif not known:
            self._labelled.add(label)
            change = self._drifted(label)
            if change is not None:
                self.changes.append(change)
                self._forget()
                self.since = label.at
                self._restarted = True
                self.on_change(change)
        if self.since is None or (label.at < self.since and not self._restarted):
            self.since = label.at  # a store tells of earlier ones after the first new ones
        self._note_history(label.at)

    def restart(self, at: float) -> None:
        """Labels of before `at` are another judge's: nothing is known, and `since` begins anew."""
        self._forget()
        self.since = at
        self._restarted = True
        self.rebase()

    def delivers_otherwise(self, at: float) -> None:
        """From now on other tiers answer: what was delivered before tells nothing of it.

        What is known of each tier stays.
        """
        self._traffic.clear()
        self._delivered_since = self.since = at
        self._restarted = True
        self._version += 1
        self._cache.clear()

    def estimate_anew(self) -> None:
        """What was estimated with fewer requests than are known now is not told again."""
        self._cache.clear()

    def rebase(self, labels: Iterable[Label] = ()) -> None:
        """Another predictor: what it is off by is no change of quality.

        labels: those that it was not trained from, with what it says of them.
        """
        for detector in self._drift.values():
            detector.reset()
        for label in labels:
            for tier, quality in label.quality.items():
                if tier in self._drift and tier in label.predicted:
                    self._drift[tier].observe(quality, label.predicted[tier])

    def judge_lean(self, cheapest: str, dearest: str) -> float:
        """How many times as large losses are, by gold labels, as the judge says; 1 until known.

        A judge that errs in favour of neither answer makes losses smaller; one that makes them
        larger is left alone.
        """
        checked = self._labelled.checked(cheapest, dearest)
        if len(checked.weight) < LEAST_GOLD:
            return 1.0
        believed = BELIEVED_LOSSES * checked.weight.mean()
        judged, gold = checked.weight @ checked.judged, checked.weight @ checked.gold
        if not (judged[1] > 0.0 and gold[1] > 0.0):
            return 1.0
        by_judge = (judged[1] - judged[0] + believed) / judged[1]
        by_gold = (gold[1] - gold[0] + believed) / gold[1]
        if not by_judge > 0.0:
            return MOST_LEAN if by_gold > 0.0 else 1.0
        return float(min(MOST_LEAN, max(1.0, by_gold / by_judge)))

    def _hear(self, label: Label) -> None:
        before = self._feedback.pop(label.request_id, None)
        self._feedback[label.request_id] = label
        for each, sign in ((before, -1), (label, 1)):
            if each is not None:
                said = self._said.setdefault(each.tenant, _Said())
                said.num += sign
                said.surprise += sign * _surprise(each)
        if len(self._feedback) > MOST_ROWS:
            _, oldest = self._feedback.popitem(last=False)
            said = self._said[oldest.tenant]
            said.num -= 1
            said.surprise -= _surprise(oldest)

    def _drifted(self, label: Label) -> Change | None:
        found = None
        for tier, quality in label.quality.items():
            detector, recent = self._drift.get(tier), self._recent.get(tier)
            if detector is None or recent is None:
                continue
            num = detector.count
            recent.append(quality)
            if detector.observe(quality, label.predicted.get(tier, 0.0)):
                seen = list(recent)
                half = max(1, len(seen) // 2)
                found = Change(
                    label.at,
                    tier,
                    detector.rose,
                    detector.log_odds,
                    num + 1,
                    float(np.mean(seen[:half])),
                    float(np.mean(seen[-LAST:])),
                )
        if found is not None:
            for detector in self._drift.values():
                detector.reset()
        return found

    def _note_history(self, at: float) -> None:
        if self.history:
            first, last = self.history[0]["at"] or 0.0, self.history[-1]["at"] or 0.0
            if at < last + max(HISTORY_S, HISTORY_SHARE * (at - first)):
                return
        now = self.ratio()
        self.history.append(
            {
                "at": at,
                "measured": now.ratio,
                "low": now.low,
                "high": now.high,
                "predicted": self.predicted_ratio(),
            }
        )

    # -- what is known ----------------------------------------------------------------------

    @property
    def num_labels(self) -> int:
        """Requests of which both answers were judged, since the last change."""
        return len(self._labelled)

    @property
    def num_checked(self) -> int:
        """Of these, with a gold label."""
        return self._labelled.num_checked

    def predicted_ratio(self, tenant: str | None = None) -> float | None:
        """What the predictor expected of the same traffic."""
        traffic = self._traffic_of(tenant)
        dearest = traffic.by_tier.get(self.dearest, 0.0)
        return traffic.served / dearest if self._predicts and dearest > 0.0 else None

    def ratio(self, tenant: str | None = None) -> Estimate:
        """Delivered quality over all-dearest, of one tenant's requests or of all, with feedback."""
        found = self._estimate(tenant, None)
        if tenant is not None or found.ratio is None:
            return found
        moved = self.feedback()
        ratio = max(0.0, found.ratio + moved)
        low, high = found.low or 0.0, found.high or 0.0
        return replace(found, ratio=ratio, low=min(low, ratio), high=max(high, ratio))

    def tier(self, tier: str) -> Estimate:
        """The quality that a tier would have, were it to answer everything, over the dearest's."""
        return self._estimate(None, tier)

    def feedback(self) -> float:
        """By how much users' verdicts move the ratio."""
        total = sum(traffic.num for traffic in self._traffic.values())
        moved = 0.0
        for tenant, said in self._said.items():
            if said.num <= 0:
                continue
            traffic = self._traffic.get(tenant)
            share = traffic.num / total if traffic is not None and total else 0.0
            mean = said.surprise / (said.num + HALF_BELIEVED)
            moved += min(share, MOST_TENANT_WEIGHT) * max(-1.0, min(1.0, mean))
        return moved

    def _estimate(self, tenant: str | None, tier: str | None) -> Estimate:
        known = self._cache.get((tenant, tier))
        # Computed anew for every half percent of labels.
        if known is None or self._version - known[0] > len(self._labelled) // 200:
            known = self._cache[tenant, tier] = (self._version, self._compute(tenant, tier))
        return known[1]

    def _compute(self, tenant: str | None, tier: str | None) -> Estimate:
        since = self._delivered_since if tier is None else -math.inf
        rows = self._labelled.rows(tenant, tier, self.dearest, since)
        traffic = self._traffic_of(tenant)
        first = traffic.served if tier is None else traffic.by_tier.get(tier, 0.0)
        num = max(1, traffic.num)
        if not len(rows.weight):
            return Estimate(None, None, None, 0, 0)
        return estimate(
            Sample(
                rows.weight,
                rows.judged,
                rows.predicted,
                rows.gold,
                rows.gold_weight,
                np.array([first, traffic.by_tier.get(self.dearest, 0.0)]) / num,
                traffic.num,
            )
        )

    def _largest_tenants(self) -> list[str]:
        return sorted(self._traffic, key=lambda name: -self._traffic[name].num)[:MOST_TENANTS]

    def state(self) -> dict[str, Any]:
        """As JSON, for status, page and metrics."""
        return {
            **_told(self.ratio()),
            "predicted": self.predicted_ratio(),
            "feedback": self.feedback(),
            "since": self.since,
            "labels_by_source": dict(self.num_by_source),
            "tiers": {name: _told(self.tier(name)) for name in self._tiers},
            "tenants": {name: _told(self.ratio(name)) for name in self._largest_tenants()},
            "drift": {
                name: {"statistic": detector.statistic, "alarm_at": detector.log_odds}
                for name, detector in self._drift.items()
            },
            "changes": [
                {name: getattr(change, name) for name in Change.__slots__}
                for change in self.changes
            ],
            "history": list(self.history),
        }


def _surprise(label: Label) -> float:
    return label.quality[label.tier] - label.predicted.get(label.tier, 0.5)


def _told(found: Estimate) -> dict[str, Any]:
    return {
        "measured": found.ratio,
        "low": found.low,
        "high": found.high,
        "num_labels": found.num_labels,
        "num_gold": found.num_gold,
    }
