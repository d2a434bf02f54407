"""Online controllers: they move the policy's set-points from what really happened.

Each is a small state machine; clocks and random numbers are passed in. The router holds one
`OnlineControl` and uses it like this, per request:

    points = control.set_points(now)
    decision = decide(request, tiers, points, state)
    if not ledger.move(hold, decision.tier, decision.reserve_cost_usd): ...   # decide again
    control.decided(now, decision, request.prompt_tokens)
    place = state.record(decision.tier)
    ...                                                  # another tier has to take it over:
    control.moved(decision.tier, decision.expected_cost_usd, other)
    state.move(place, other.tier)
    shadow = control.draw_shadow(random(), decision)     # fetch shadow.tier in the background
    ...
    control.answered(other.tier, other.expected_cost_usd, cost_usd)
    control.shadow_done(label)
"""

from tandem_router.control.bucket import Bucket, budget_bucket
from tandem_router.control.certified_floor import QualityFloor
from tandem_router.control.changes import ResidualDrift, TrafficShift, ks_statistic
from tandem_router.control.curve import CurvePoint, RoutingCurve
from tandem_router.control.loop import ControlState, OnlineControl
from tandem_router.control.pacing import ArrivalRate, BudgetPacer, price_of_money
from tandem_router.control.shadow_sampler import ShadowLabel, ShadowPlan, ShadowSampler
from tandem_router.control.share import ShareTracker

__all__ = [
    "ArrivalRate",
    "Bucket",
    "BudgetPacer",
    "ControlState",
    "CurvePoint",
    "OnlineControl",
    "QualityFloor",
    "ResidualDrift",
    "RoutingCurve",
    "ShadowLabel",
    "ShadowPlan",
    "ShadowSampler",
    "ShareTracker",
    "TrafficShift",
    "budget_bucket",
    "ks_statistic",
    "price_of_money",
]
