"""Routing policy: which tier serves a request, as a pure function of plain values.

    option = TierOption("large", usd_per_1m_input_tokens=5, usd_per_1m_output_tokens=15,
                        queue_wait_s=0.1, ttft_s=0.2, tpot_s=0.03)
    request = RouteRequest(prompt_tokens=812, score=score, max_tokens=256,
                           overrides=Overrides(quality=0.98))
    decision = decide(request, [small, option], set_points, state)
    if decision.tier is None:      # refuse: 429 with decision.message, or hold if decision.queue
        ...
    state.record(decision.tier)

`set_points` come from `tandem_router.control`, which moves them from realised spend, shares and
shadow labels. A predictor that is late or broken is told by `score=None` and `score_status`.
"""

from tandem_router.policy.cost import cost_usd, slo_miss_probability
from tandem_router.policy.decide import decide
from tandem_router.policy.held_prefix import in_proportion
from tandem_router.policy.terms import (
    BEYOND_ANY_GAIN,
    NO_OVERRIDES,
    Capabilities,
    Decision,
    LatencySlo,
    Needs,
    Overrides,
    PlainScore,
    PolicySetPoints,
    PolicyState,
    Reason,
    RouteRequest,
    Score,
    ScoreStatus,
    TenantCeilings,
    TierOption,
    TierVerdict,
    weighed,
)

__all__ = [
    "BEYOND_ANY_GAIN",
    "NO_OVERRIDES",
    "Capabilities",
    "Decision",
    "LatencySlo",
    "Needs",
    "Overrides",
    "PlainScore",
    "PolicySetPoints",
    "PolicyState",
    "Reason",
    "RouteRequest",
    "Score",
    "ScoreStatus",
    "TenantCeilings",
    "TierOption",
    "TierVerdict",
    "cost_usd",
    "decide",
    "in_proportion",
    "slo_miss_probability",
    "weighed",
]
