"""What one router consists of, in one value that its parts are handed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tandem_router.balancing.endpoint_picker import Picker
from tandem_router.cache.response_cache import Reuse
from tandem_router.config import RouterConfig
from tandem_router.http.client import UpstreamClient
from tandem_router.limits.ledger import Ledger
from tandem_router.limits.prices import Prices
from tandem_router.proxy.provider_keys import ProviderKeys
from tandem_router.proxy.tally import Tally
from tandem_router.quality.answer_judge import AnswerJudge
from tandem_router.quality.labels import Labels
from tandem_router.quality.learner import Learner
from tandem_router.quality.live import LiveQuality
from tandem_router.quality.retraining import Retraining
from tandem_router.routing.arrivals import Arrivals
from tandem_router.routing.decision_log import DecisionLog
from tandem_router.routing.set_points import Steering
from tandem_router.routing.tier_router import Routing
from tandem_router.store.writer import Store
from tandem_router.telemetry.metrics import Metrics
from tandem_router.telemetry.tracing import Tracing


@dataclass(eq=False)
class Services:
    """One set per router."""

    config: RouterConfig
    picker: Picker
    client: UpstreamClient
    prices: Prices
    routing: Routing
    steering: Steering
    ledger: Ledger
    store: Store
    labels: Labels
    learner: Learner
    quality: LiveQuality
    answer_judge: AnswerJudge
    metrics: Metrics
    decisions: DecisionLog
    tally: Tally
    clock: Callable[[], float]
    wall_clock: Callable[[], float]
    peer_tokens: Callable[[], Sequence[bytes]]
    external_keys: ProviderKeys
    workers_changed: asyncio.Event
    reuse: Reuse
    arrivals: Arrivals
    tracing: Tracing | None = None
    retraining: Retraining | None = None

    @property
    def peer_token(self) -> str | None:
        """The token to send to workers now."""
        token = next(iter(self.peer_tokens()), None)
        return token.decode() if token is not None else None
