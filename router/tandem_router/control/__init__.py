"""Online controllers: they move the policy's set-points from what really happened.

Each is a small state machine; clocks and random numbers are passed in. The router holds one
`OnlineControl` and uses it like this, per request:

    points = control.set_points(now)
    decision = decide(request, tiers, points, state)
    reservation = control.decided(now, decision, request.prompt_tokens)
    place = state.record(decision.tier, request.prompt_tokens)
    ...                                                  # another tier has to take it over:
    reservation = control.moved(now, decision.tier, other, reservation)
    state.move(place, other.tier)
    shadow = control.draw_shadow(random(), decision)     # fetch shadow.tier in the background
    ...
    control.settle(now, reservation, cost_usd(tier, usage.prompt_tokens, usage.completion_tokens))
    control.shadow_done(now, label, shadow_cost_usd)
"""

from tandem_router.control.bucket import TokenBucket
from tandem_router.control.certified_floor import QualityFloor
from tandem_router.control.changes import ResidualDrift, TrafficShift, ks_statistic
from tandem_router.control.curve import CurvePoint, RoutingCurve
from tandem_router.control.loop import ControlState, OnlineControl
from tandem_router.control.pacing import ArrivalRate, BudgetPacer, Reservation, price_of_money
from tandem_router.control.shadow_sampler import ShadowLabel, ShadowPlan, ShadowSampler
from tandem_router.control.share import ShareTracker

__all__ = [
    "ArrivalRate",
    "BudgetPacer",
    "ControlState",
    "CurvePoint",
    "OnlineControl",
    "QualityFloor",
    "Reservation",
    "ResidualDrift",
    "RoutingCurve",
    "ShadowLabel",
    "ShadowPlan",
    "ShadowSampler",
    "ShareTracker",
    "TokenBucket",
    "TrafficShift",
    "ks_statistic",
    "price_of_money",
]
