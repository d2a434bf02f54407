"""Takes up changed settings without a restart: pushed by the operator, or from the mounted file.

Nothing that was learnt is lost: only what a changed setting means is set anew. Each change is
kept as a sentence, for /admin/state and the operator's events.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tandem_router.api.api_keys import Authenticator
from tandem_router.config import RouterConfig, load_config
from tandem_router.config.live import changes, live_digest, live_part, static_part, with_live
from tandem_router.errors import ConfigError
from tandem_router.proxy.context import Services

logger = logging.getLogger("tandem.router")


class LiveSettings:
    """The settings in force."""

    def __init__(self, services: Services, authenticator: Authenticator) -> None:
        self._services = services
        self._authenticator = authenticator
        # Called with a configuration that is to come in force; may raise ConfigError.
        self.check: list[Callable[[RouterConfig], None]] = []
        # Called with the configuration that is in force from now on.
        self.on_change: list[Callable[[RouterConfig], None]] = []
        self.error: str | None = None
        self.changes: deque[dict[str, Any]] = deque(maxlen=50)

    def state(self) -> dict[str, Any]:
        live = live_part(self._services.config)
        return {
            "generation": self._services.config.generation,
            "digest": live_digest(live),
            "error": self.error,
            "changes": list(self.changes),
        }

    def apply(self, live: Mapping[str, Any]) -> list[str]:
        """Put settings in force; returns what changed, in words. Raises ConfigError."""
        services = self._services
        before = services.config
        after = with_live(before, live)
        if after.generation < before.generation:
            return []  # an older file that arrives late
        changed = changes(live_part(before), live_part(after))
        if not changed:
            services.config = after
            return []
        # First what can refuse.
        for check in self.check:
            check(after)
        services.external_keys.reconfigure(after)
        self._authenticator.reconfigure(after.tenants)
        services.config = after
        services.metrics.show([tier.name for tier in after.tiers])
        services.prices.reconfigure(after)
        services.ledger.reconfigure(after)
        services.routing.reconfigure(after)
        services.steering.reconfigure(after, services.ledger.budget, services.ledger.unbilled)
        services.reuse.reconfigure(after)
        services.picker.reconfigure(after.failover)
        services.learner.reconfigure(after.learning, after.replicas)
        services.answer_judge.reconfigure(after)
        services.quality.reconfigure(after, services.prices.cheapest, services.prices.dearest)
        services.client.connect_timeout_s = after.failover.connect_timeout_s
        services.client.stall_timeout_s = after.failover.stall_timeout_s
        services.client.outward = after.outward.rule
        for tell in self.on_change:
            tell(after)
        for change in changed:
            logger.info("changed: %s", change)
            self.changes.append({"time": services.wall_clock(), "change": change})
        return changed

    def apply_file(self, path: Path) -> None:
        """Put the file's settings in force; what is wrong with it is said in `error`."""
        try:
            config = load_config(path)
            if static_part(config) != static_part(self._services.config):
                self.error = f"{path} changes more than can change while the router runs"
                return
            self.apply(live_part(config))
            self.error = None
        except ConfigError as error:
            logger.error("settings not changed: %s", error)
            self.error = str(error)

    async def watch(self, path: Path, poll_s: float = 0.5) -> None:
        """Apply the file whenever it has changed, until cancelled."""
        known = _stamp(path)
        while True:
            await asyncio.sleep(poll_s)
            found = _stamp(path)
            if found is not None and found != known:
                known = found
                self.apply_file(path)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino
