"""Labels for people and for training: read all that is known, add what somebody knows for certain.

Where prompts are captured they are in what is read here, so both need the peer token.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query
from pydantic import BaseModel, ConfigDict, Field

from tandem_router.errors import ApiError
from tandem_router.proxy.context import Services
from tandem_router.store.records import Label, StoreError

MOST_READ = 10_000
MOST_ADDED = 1_000


class GoldLabel(BaseModel):
    """What is known of the answers to one request."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    request_id: Annotated[str, Field(min_length=1, max_length=64)]
    quality: Annotated[
        dict[str, Annotated[float, Field(ge=0.0, le=1.0)]], Field(min_length=1, max_length=16)
    ]
    # With which the request was picked among those that are judged.
    probability: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0


class GoldLabels(BaseModel):
    """Some of them; `request_id` is that of the answer."""

    model_config = ConfigDict(extra="forbid")

    labels: Annotated[list[GoldLabel], Field(min_length=1, max_length=MOST_ADDED)]


def routes(services: Services, guard: Any) -> APIRouter:
    """guard: refuses whoever has no peer token."""
    router = APIRouter(dependencies=[Depends(guard)])

    @router.get("/labels")
    async def labels(
        since: Annotated[float, Query(ge=0.0)] = 0.0,
        limit: Annotated[int, Query(ge=1, le=MOST_READ)] = 1_000,
    ) -> dict[str, Any]:
        """Oldest first; `next` is the `since` to go on with, absent at the end."""
        try:
            found = await services.store.labels(since, limit)
        except StoreError as error:
            raise _away(error) from error
        page: dict[str, Any] = {"labels": [asdict(label) for label in found]}
        if len(found) == limit and found[-1].at > since:
            page["next"] = found[-1].at
        return page

    @router.post("/labels")
    async def add(body: GoldLabels) -> dict[str, Any]:
        """Gold labels: they correct what judges say (docs/quality.md)."""
        tiers = {tier.name for tier in services.config.tiers}
        for one in body.labels:
            if unknown := sorted(one.quality.keys() - tiers):
                raise ApiError(
                    400,
                    f"request {one.request_id!r}: there is no tier {unknown[0][:60]!r}; tiers: "
                    f"{', '.join(sorted(tiers))}",
                    param="quality",
                )
        unknown_ids = []
        for one in body.labels:
            decision = await _decision(services, one.request_id)
            if decision is None:
                unknown_ids.append(one.request_id)
                continue
            predicted = {name: min(1.0, max(0.0, q)) for name, q in decision["quality"].items()}
            label = Label(
                one.request_id,
                "gold",
                services.wall_clock(),
                decision["tenant"],
                decision["tier"],
                one.probability,
                one.quality,
                gold=True,
                predicted=predicted,
            )
            services.labels.add(label)
        return {"num_taken": len(body.labels) - len(unknown_ids), "unknown": unknown_ids}

    return router


async def _decision(services: Services, request_id: str) -> dict[str, Any] | None:
    found = services.decisions.find(request_id)
    if found is not None or services.store.backend is None:
        return found
    try:
        return await services.store.backend.decision(request_id)
    except StoreError as error:
        raise _away(error) from error


def _away(error: StoreError) -> ApiError:
    return ApiError(
        503,
        f"the store does not answer: {error}",
        type="service_unavailable",
        code="store",
        retry=True,
        retry_after_s=5.0,
    )
