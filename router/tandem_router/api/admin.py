"""What operators and the dashboard read and set: state, decisions, spend, settings, keys.

Nothing here holds a word of anybody's prompt. Reading is open until tenants exist
(`api/admin_access`); setting needs the peer token where one is configured.
"""

from __future__ import annotations

import hmac
from collections import Counter
from collections.abc import Awaitable
from dataclasses import asdict, replace
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, Header, Query
from msgspec import to_builtins
from pydantic import BaseModel, ConfigDict, Field

from tandem_router.api import labels as label_api
from tandem_router.api.api_keys import Authenticator
from tandem_router.api.live_settings import LiveSettings
from tandem_router.config.live import live_part
from tandem_router.errors import ApiError, ConfigError
from tandem_router.limits.prices import price_note
from tandem_router.proxy.context import Services
from tandem_router.routing.decision_log import TierTotals
from tandem_router.store.records import Key, StoreError

T = TypeVar("T")


class SetPoints(BaseModel):
    """Levers of the policy; absent ones stay as they are."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    gain_threshold: Annotated[float, Field(ge=-1.0, le=1.0)] | None = None
    lambda_per_usd: Annotated[float, Field(ge=0.0, le=1e12)] | None = None


class Minting(BaseModel):
    """A key to be made."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    tenant: Annotated[str, Field(min_length=1, max_length=253)]
    expires_in_s: Annotated[float, Field(gt=0, le=3.2e9)] | None = None
    max_concurrency: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    requests_per_minute: Annotated[float, Field(gt=0, le=1e9)] | None = None
    tokens_per_minute: Annotated[float, Field(gt=0, le=1e12)] | None = None
    usd_per_hour: Annotated[float, Field(gt=0, le=1e9)] | None = None


class KeyLimits(BaseModel):
    """Other limits of a key; null takes one away, absent ones stay."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    expires_in_s: Annotated[float, Field(gt=0, le=3.2e9)] | None = None
    max_concurrency: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    requests_per_minute: Annotated[float, Field(gt=0, le=1e9)] | None = None
    tokens_per_minute: Annotated[float, Field(gt=0, le=1e12)] | None = None
    usd_per_hour: Annotated[float, Field(gt=0, le=1e9)] | None = None


def routes(services: Services, keys: Authenticator, settings: LiveSettings) -> APIRouter:
    router = APIRouter(prefix="/admin")

    @router.get("/decisions")
    async def decisions(
        limit: Annotated[int, Query(ge=1, le=10_000)] = 100,
        after: Annotated[int, Query(ge=0)] = 0,
        before: Annotated[float | None, Query(gt=0)] = None,
    ) -> dict[str, Any]:
        """Newest first; `after` is the highest sequence already seen.

        `before`, a Unix time, asks the store for older ones, of earlier processes too.
        """
        if before is not None and services.store.backend is not None:
            older = await _asked(services.store.backend.decisions(limit, before))
            return {"sequence": services.decisions.sequence, "decisions": older}
        return {
            "sequence": services.decisions.sequence,
            "decisions": services.decisions.last(limit, after),
        }

    @router.get("/decisions/{request_id}")
    async def decision(request_id: str) -> dict[str, Any]:
        found = services.decisions.find(request_id)
        if found is None and services.store.backend is not None:
            found = await _asked(services.store.backend.decision(request_id[:64]))
        if found is None:
            raise ApiError(404, f"no decision {request_id[:64]!r} among the last ones")
        return found

    @router.get("/state")
    async def state() -> dict[str, Any]:
        return router_state(services, settings)

    @router.get("/spend")
    async def spend(
        since: Annotated[str, Query(pattern=r"^(\d{4}-\d\d-\d\d)?$")] = "",
    ) -> dict[str, Any]:
        """By day (UTC), tenant and tier, from the store; `since` is a day."""
        rows = await _asked(services.store.spend(since))
        return {"durable": services.store.health.durable, "spend": to_builtins(rows)}

    def needs_peer_token(x_tandem_peer_token: Annotated[str | None, Header()] = None) -> None:
        presented = (x_tandem_peer_token or "").encode()
        tokens = services.peer_tokens()
        if tokens and not any(hmac.compare_digest(presented, token) for token in tokens):
            raise ApiError(401, "set-points need x-tandem-peer-token", type="authentication_error")

    @router.put("/set-points", dependencies=[Depends(needs_peer_token)])
    async def set_points(body: SetPoints) -> dict[str, Any]:
        """Those in force from now on; `threshold` says where a floor clips what was asked for."""
        services.steering.move_set_points(body.gain_threshold, body.lambda_per_usd)
        steering = services.steering
        return {**to_builtins(steering.set_points), "threshold": steering.threshold_limit}

    @router.put("/settings", dependencies=[Depends(needs_peer_token)])
    async def put_settings(body: dict[str, Any]) -> dict[str, Any]:
        """Put settings in force: any of those in GET /admin/settings."""
        try:
            changed = settings.apply(body)
        except ConfigError as error:
            raise ApiError(400, str(error), code="settings") from error
        return {"changed": changed, **settings.state()}

    @router.get("/settings", dependencies=[Depends(needs_peer_token)])
    async def get_settings() -> dict[str, Any]:
        return {**live_part(services.config), "state": settings.state()}

    @router.get("/keys", dependencies=[Depends(needs_peer_token)])
    async def list_keys() -> dict[str, Any]:
        return {"keys": [_shown(key) for key in keys.listed()], "store": services.store.state()}

    @router.post("/keys", status_code=201, dependencies=[Depends(needs_peer_token)])
    async def mint(body: Minting) -> dict[str, Any]:
        """A new key of a tenant; its text is in this reply and nowhere else."""
        fields = body.model_dump(exclude={"tenant", "expires_in_s"})
        text, key = keys.mint(body.tenant, expires=_until(services, body.expires_in_s), **fields)
        await _asked(services.store.put_key(key))
        return {"key": text, **_shown(key)}

    @router.patch("/keys/{key_id}", dependencies=[Depends(needs_peer_token)])
    async def limit(key_id: str, body: KeyLimits) -> dict[str, Any]:
        fields = body.model_dump(exclude_unset=True)
        if "expires_in_s" in fields:
            fields["expires"] = _until(services, fields.pop("expires_in_s"))
        key = replace(_known(keys, key_id), **fields)
        await _asked(services.store.put_key(key))
        return _shown(key)

    @router.delete("/keys/{key_id}", dependencies=[Depends(needs_peer_token)])
    async def revoke(key_id: str) -> dict[str, Any]:
        """For good, also where the configuration gives the key."""
        key = _known(keys, key_id)
        if key.revoked is None:
            key = replace(key, revoked=services.wall_clock())
            await _asked(services.store.put_key(key))
        return _shown(key)

    router.include_router(label_api.routes(services, needs_peer_token))
    return router


async def _asked(answer: Awaitable[T]) -> T:
    """What the store says. Raises ApiError (503) while it is away."""
    try:
        return await answer
    except StoreError as error:
        raise ApiError(
            503,
            f"the store does not answer: {error}",
            type="service_unavailable",
            code="store",
            retry=True,
            retry_after_s=5.0,
        ) from error


def _known(keys: Authenticator, key_id: str) -> Key:
    for key in keys.listed():
        if key.id == key_id:
            return key
    raise ApiError(404, f"there is no key {key_id[:64]!r}; GET /admin/keys lists them")


def _until(services: Services, seconds: float | None) -> float | None:
    return None if seconds is None else services.wall_clock() + seconds


def _shown(key: Key) -> dict[str, Any]:
    """Everything but the hash."""
    fields = asdict(key)
    del fields["hash"]
    return fields


def router_state(services: Services, settings: LiveSettings) -> dict[str, Any]:
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
                "token_prices": tier.token_prices,
                "recent_share": services.steering.state.share(tier.name),
                "usable_workers": services.picker.num_usable(tier.name),
                "profile": services.picker.profile(tier.name),
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
        "price_note": price_note(config.tiers),
        "predictor": services.routing.scorer.name,
        "predictor_artifact": services.routing.scorer.artifact,
        "fallback_tier": config.fallback_tier,
        "dearest_tier": services.prices.dearest,
        "slo": config.slo.model_dump(),
        "set_points": to_builtins(services.steering.set_points),
        "threshold": services.steering.threshold_limit,
        "control": asdict(services.steering.control.state(now)),
        "cascade": _cascade(services),
        "retraining": None if services.retraining is None else services.retraining.state(),
        "curve": [asdict(point) for point in services.steering.control.curve.points()],
        "expected_quality_ratio": services.steering.expected_quality_ratio,
        "content_blind_quality_ratio": services.steering.content_blind_quality_ratio,
        "quality_floor": config.objective.quality_floor,
        "quality": services.quality.state(),
        "learning": {
            **services.learner.state([tier.name for tier in config.tiers]),
            "new_tiers": services.steering.new_tiers.state(),
        },
        "routing": config.routing,
        "settings": settings.state(),
        "store": services.store.state(),
        "num_inflight": services.ledger.num_inflight,
        "arrivals": services.arrivals.report(),
        "cost_usd": cost,
        "cost_all_large_usd": services.decisions.cost_all_large_usd,
        "tiers": tiers,
        "workers": workers,
        "cache": asdict(cache.stats) if (cache := services.reuse.cache) is not None else None,
    }


def _cascade(services: Services) -> dict[str, Any] | None:
    report = services.routing.answers.report()
    return None if report is None else {**report, "judge": services.answer_judge.report()}


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
    services.quality.show()
    counts = Counter(
        (worker.tier, worker.role, "usable" if worker.usable(now) else "unusable")
        for worker in services.picker.workers
    )
    for labels, child in services.metrics.workers.items():
        child.set(counts.pop(labels, 0))  # type: ignore[arg-type]
    for labels, number in counts.items():
        services.metrics.workers[labels].set(number)
