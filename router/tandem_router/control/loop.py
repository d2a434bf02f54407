"""All controllers of one router behind one object: events in, set-points out.

Who wins when they disagree: the quality floor allows a threshold up to the certified one; a share
target or ceiling raises it where needed; the budget adds a price of money on top, and its empty
bucket has the last word. So money beats share beats quality, as `budget.onExhausted` promises.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from msgspec.structs import replace

from tandem_router.control.certified_floor import QualityFloor
from tandem_router.control.changes import TrafficShift
from tandem_router.control.curve import RoutingCurve
from tandem_router.control.pacing import BudgetPacer
from tandem_router.control.shadow_sampler import ShadowLabel, ShadowPlan, ShadowSampler
from tandem_router.control.share import ShareTracker
from tandem_router.policy import BEYOND_ANY_GAIN, Decision, PolicySetPoints, Reason

# Under a binding budget "everything to the large tier" has to become a finite preference, or the
# price of money would rank requests by cost alone. Half of the quality scale is more than any gain.
_STRONG_PREFERENCE = -0.5

_BY_POLICY = frozenset(
    {Reason.GAIN, Reason.SUFFICIENT, Reason.MAX_SHARE, Reason.BUDGET, Reason.PREFIX}
)


@dataclass(frozen=True, slots=True)
class ControlState:
    """What a dashboard or `GET /admin/policy` shows."""

    gain_threshold: float
    lambda_per_usd: float
    budget_remaining_usd: float | None
    target_usd_per_s: float | None
    certified_threshold: float | None
    num_labels: int
    num_forgotten: int


class OnlineControl:
    """Controllers that are switched on by their argument; without any, set-points stay as given.

    Args:
        base: initial set-points; fields that no controller moves are kept.
        pacer: moves `lambda_per_usd`, `budget_remaining_usd`.
        share: holds the dearest tier at its target share.
        share_ceiling: holds the dearest tier *below* the tracker's target instead.
        floor: certifies how high the threshold may go; replaces `base.gain_threshold`.
        sampler: draws shadow requests.
        shift: makes every controller forget when traffic changes.

    Raises:
        ValueError: the sampler draws some requests more rarely than the floor allows for.
    """

    def __init__(
        self,
        base: PolicySetPoints,
        *,
        pacer: BudgetPacer | None = None,
        share: ShareTracker | None = None,
        share_ceiling: bool = False,
        floor: QualityFloor | None = None,
        sampler: ShadowSampler | None = None,
        shift: TrafficShift | None = None,
    ) -> None:
        if floor and sampler and floor.smallest_probability > sampler.smallest_probability:
            raise ValueError(
                f"smallest_probability={floor.smallest_probability} of the quality floor is above "
                f"the sampler's {sampler.smallest_probability}, and its certificate would not "
                "hold; give it `sampler.smallest_probability`"
            )
        self.base = base
        self.pacer = pacer
        self.share = share
        self.share_ceiling = share_ceiling
        self.floor = floor
        self.sampler = sampler
        self.shift = shift
        self.curve = RoutingCurve()
        self._made: tuple[PolicySetPoints, float, PolicySetPoints] | None = None

    def set_points(self, now: float) -> PolicySetPoints:
        """Set-points for a decision at `now`."""
        base = self.base
        threshold = base.gain_threshold
        if self.floor is not None:
            threshold = self.floor.threshold
        if self.share is not None:
            tracked = self.share.threshold
            threshold = max(threshold, tracked) if self.share_ceiling else tracked
        made = self._made
        if made is not None and made[0] is base and made[1] == threshold and self.pacer is None:
            return made[2]
        asked = threshold
        # A controller says "all" or "none" by infinity, which JSON and gauges cannot show.
        threshold = min(BEYOND_ANY_GAIN, max(-BEYOND_ANY_GAIN, threshold))
        if self.pacer is None:
            points = replace(base, gain_threshold=threshold)
            self._made = (base, asked, points)
            return points
        price = self.pacer.lambda_per_usd
        if price > 0.0:
            threshold = max(threshold, _STRONG_PREFERENCE)
        return replace(
            base,
            gain_threshold=threshold,
            lambda_per_usd=price,
            budget_remaining_usd=self.pacer.remaining_usd(now),
            budget_refill_usd_per_s=self.pacer.bucket.pace_per_s,
            unbilled=self.pacer.unbilled,
        )

    def decided(self, now: float, decision: Decision, prompt_tokens: int) -> None:
        """Tell the controllers of one decision whose money is held."""
        self.curve.observe(decision)
        if self.pacer is not None:
            self.pacer.observe(now, decision)
        if self.share is not None and decision.tier is not None:
            dearest = decision.verdicts[-1].tier
            gain = decision.weighed_gain if decision.reason in _BY_POLICY else None
            self.share.observe(gain, decision.tier == dearest)
        if self.shift is not None and decision.gain is not None:
            length = math.log1p(max(0, prompt_tokens))
            if self.shift.observe(length, decision.gain):
                self.forget()

    def moved(self, before: str, expected_usd: float, decision: Decision) -> None:
        """Tier `before` could not serve a request after all, and `decision` sends it elsewhere.

        It stays one request: its arrival, gain and qualities are not counted again, only its
        tier and its expected cost change.
        """
        if self.pacer is not None:
            self.pacer.move(before, expected_usd, decision)
        dearest = decision.verdicts[-1].tier
        if self.share is not None and (before == dearest) != (decision.tier == dearest):
            self.share.move(decision.tier == dearest)

    def answered(self, tier: str, expected_usd: float, actual_usd: float) -> None:
        """Learn from what an answer really cost; zero for one that never ran."""
        if self.pacer is not None:
            self.pacer.answered(tier, expected_usd, actual_usd)

    def draw_shadow(self, uniform: float, decision: Decision) -> ShadowPlan | None:
        """Whether to answer this request with the other tier too, unseen."""
        if self.sampler is None or decision.reason not in _BY_POLICY or decision.tier is None:
            return None
        cheapest, dearest = decision.verdicts[0].tier, decision.verdicts[-1].tier
        return self.sampler.draw(uniform, decision.tier, cheapest, dearest)

    def shadow_done(self, label: ShadowLabel) -> None:
        """Learn from the label of a shadow answer; its cost is the ledger's to settle."""
        if self.floor is not None and self.floor.observe(label):
            self.forget()

    def forget(self) -> None:
        """After a change point: trust nothing that was learned from other traffic."""
        if self.pacer is not None:
            self.pacer.forget()
        if self.share is not None:
            self.share.forget()
        if self.floor is not None:
            self.floor.forget()

    def state(self, now: float) -> ControlState:
        """A snapshot for people."""
        points = self.set_points(now)
        return ControlState(
            gain_threshold=points.gain_threshold,
            lambda_per_usd=points.lambda_per_usd,
            budget_remaining_usd=points.budget_remaining_usd,
            target_usd_per_s=self.pacer.target_usd_per_s(now) if self.pacer else None,
            certified_threshold=self.floor.threshold if self.floor else None,
            num_labels=self.floor.num_labels if self.floor else 0,
            num_forgotten=(self.floor.num_alarms if self.floor else 0)
            + (self.shift.num_alarms if self.shift else 0),
        )
