"""`POST /v1/feedback`: a client says whether an answer that it was given was good."""

from __future__ import annotations

import json

from tandem_router.errors import ApiError
from tandem_router.limits.ledger import NOTHING
from tandem_router.openai.json_body import parse_json
from tandem_router.proxy.context import Services
from tandem_router.quality.feedback import Verdicts, parse
from tandem_router.store.records import StoreError

PATH = "/v1/feedback"


class Feedback:
    """Takes verdicts of one router's clients."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._verdicts = Verdicts()

    async def take(self, body: bytes, tenant: str, key: str | None) -> bytes:
        """The reply to one verdict, which counts as a request of its tenant. Raises ApiError."""
        services = self._services
        request_id, score = parse(parse_json(body, services.config.limits.max_json_depth))
        hold = services.ledger.hold(tenant, 0.0, key)
        try:
            decision = services.decisions.find(request_id)
            if decision is None and services.store.backend is not None:
                try:
                    decision = await services.store.backend.decision(request_id)
                except StoreError as error:
                    raise ApiError(
                        503,
                        "the request is not among the last ones, and the store does not answer; "
                        "say it again later",
                        type="service_unavailable",
                        code="store",
                        retry=True,
                        retry_after_s=5.0,
                    ) from error
            now = services.wall_clock()
            label = self._verdicts.label(decision, tenant, request_id, score, now)
            if label is not None:
                services.labels.add(label)
        finally:
            services.ledger.settle(hold, NOTHING)
        assert decision is not None
        return json.dumps(
            {
                "object": "feedback",
                "request_id": request_id,
                "tier": decision["tier"],
                "score": score,
            }
        ).encode()
