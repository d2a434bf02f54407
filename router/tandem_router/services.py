"""What one router consists of, in one value that its parts are handed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tandem_router.admission import Admission
from tandem_router.config import RouterConfig
from tandem_router.decisions import DecisionLog
from tandem_router.metrics import Metrics
from tandem_router.picking import Picker
from tandem_router.prices import Prices
from tandem_router.reuse import Reuse
from tandem_router.routing import Routing
from tandem_router.steering import Steering
from tandem_router.upstream import UpstreamClient


@dataclass(eq=False)
class Services:
    """One set per router."""

    config: RouterConfig
    picker: Picker
    client: UpstreamClient
    prices: Prices
    routing: Routing
    steering: Steering
    admission: Admission
    metrics: Metrics
    decisions: DecisionLog
    clock: Callable[[], float]
    wall_clock: Callable[[], float]
    peer_token: str | None
    external_keys: Mapping[str, str]
    workers_changed: asyncio.Event
    reuse: Reuse
