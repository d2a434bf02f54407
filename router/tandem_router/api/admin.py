"""What operators and the dashboard read and set: state, decisions, set-points.

Reading is open, because nothing here holds a word of anybody's prompt; setting needs the peer
token where one is configured.
"""

from __future__ import annotations

import hmac
from collections import Counter
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query
from pydantic import BaseModel, ConfigDict, Field

from tandem_router.errors import ApiError
from tandem_router.proxy.context import Services
from tandem_router.routing.decision_log import TierTotals


class SetPoints(BaseModel):
    """Levers of the policy; absent ones stay as they are."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    gain_threshold: Annotated[float, Field(ge=-1.0, le=1.0)] | None = None
    lambda_per_usd: Annotated[float, Field(ge=0.0, le=1e12)] | None = None


def routes(services: Services) -> APIRouter:
    router = APIRouter(prefix="/admin")

    @router.get("/decisions")
    async def decisions(
        limit: Annotated[int, Query(ge=1, le=10_000)] = 100,
        after: Annotated[int, Query(ge=0)] = 0,
    ) -> dict[str, Any]:
        """Newest first; `after` is the highest sequence already seen."""
        return {
            "sequence": services.decisions.sequence,
            "decisions": services.decisions.last(limit, after),
        }

    @router.get("/decisions/{request_id}")
    async def decision(request_id: str) -> dict[str, Any]:
        found = services.decisions.find(request_id)
        if found is None:
            raise ApiError(404, f"no decision {request_id[:64]!r} among the last ones")
        return found

    @router.get("/state")
    async def state() -> dict[str, Any]:
        return router_state(services)

    def needs_peer_token(x_tandem_peer_token: Annotated[str | None, Header()] = None) -> None:
        token = services.peer_token
        presented = (x_tandem_peer_token or "").encode()
        if token and not hmac.compare_digest(presented, token.encode()):
            raise ApiError(401, "set-points need x-tandem-peer-token", type="authentication_error")

    @router.put("/set-points", dependencies=[Depends(needs_peer_token)])
    async def set_points(body: SetPoints) -> dict[str, Any]:
        services.steering.move_set_points(**body.model_dump(exclude_none=True))
        return asdict(services.steering.set_points)

    return router


def router_state(services: Services) -> dict[str, Any]:
    """Everything worth showing, as JSON."""
    config = services.config
    now = services.clock()
    workers = [
        {
            "url": worker.url,
            "tier": worker.tier,
            "role": worker.role,
            "usable": worker.usable(now),
            "num_inflight": worker.num_inflight,
            "last_error": worker.last_error,
            "load": asdict(worker.load) if worker.load is not None else None,
        }
        for worker in services.picker.workers
    ]
    totals = services.decisions.totals
    slo = config.slo
    tiers = []
    for tier in config.tiers:
        entry = totals.get(tier.name)
        seen = services.routing.latency[tier.name]
        ttft = seen.last_ttft.report(slo.ttft_percentile, _seconds(slo.ttft_ms), now)
        tpot = seen.last_tpot.report(slo.tpot_percentile, _seconds(slo.tpot_ms), now)
        tiers.append(
            {
                "name": tier.name,
                "served_model": tier.served_model,
                "kind": tier.kind,
                "usd_per_1m_input_tokens": tier.usd_per_1m_input_tokens,
                "usd_per_1m_output_tokens": tier.usd_per_1m_output_tokens,
                "recent_share": services.steering.state.share(tier.name),
                "usable_workers": services.picker.num_usable(tier.name),
                "ttft_s": seen.ttft_s,
                "tpot_s": seen.tpot_s,
                "last_ttft": asdict(ttft),
                "last_tpot": asdict(tpot),
                **asdict(entry or TierTotals()),
            }
        )
    cost = sum(tier["cost_usd"] for tier in tiers)
    return {
        "name": config.name,
        "predictor": services.routing.scorer.name,
        "predictor_artifact": services.routing.scorer.artifact,
        "fallback_tier": config.fallback_tier,
        "dearest_tier": services.prices.dearest,
        "slo": config.slo.model_dump(),
        "set_points": asdict(services.steering.set_points),
        "control": asdict(services.steering.control.state(now)),
        "curve": [asdict(point) for point in services.steering.control.curve.points()],
        "expected_quality_ratio": services.steering.expected_quality_ratio,
        "content_blind_quality_ratio": services.steering.content_blind_quality_ratio,
        "quality_floor": config.objective.quality_floor,
        "num_inflight": services.ledger.num_inflight,
        "cost_usd": cost,
        "cost_all_large_usd": services.decisions.cost_all_large_usd,
        "tiers": tiers,
        "workers": workers,
        "cache": asdict(cache.stats) if (cache := services.reuse.cache) is not None else None,
    }


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000.0


def refresh_gauges(services: Services) -> None:
    """Gauges that are read off the picker when somebody asks for metrics."""
    now = services.clock()
    points = services.steering.set_points
    services.metrics.threshold.set(points.gain_threshold)
    services.metrics.lambda_per_usd.set(points.lambda_per_usd)
    ratio = services.steering.expected_quality_ratio
    if ratio is not None:
        services.metrics.expected_quality_ratio.set(ratio)
    counts = Counter(
        (worker.tier, worker.role, "usable" if worker.usable(now) else "unusable")
        for worker in services.picker.workers
    )
    for labels, child in services.metrics.workers.items():
        child.set(counts.pop(labels, 0))  # type: ignore[arg-type]
    for labels, number in counts.items():
        services.metrics.workers[labels].set(number)
