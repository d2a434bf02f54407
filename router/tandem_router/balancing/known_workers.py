"""Which workers the router knows: told by a file or by Kubernetes, followed while it runs.

External tiers are in the configuration; they are part of the picker's table from the first.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tandem_router.balancing.endpoint_picker import Picker
from tandem_router.balancing.file_discovery import EndpointTable, watch_file
from tandem_router.config import FileEndpoints, RouterConfig
from tandem_router.errors import ConfigError
from tandem_router.telemetry.logged_task import begin

logger = logging.getLogger("tandem.router")


class KnownWorkers:
    """Keeps a picker's table.

    Args:
        config: Its tiers, and who tells of workers.
        picker: Chooses among them.
        file: The static file of endpoints, where the configuration says so.
        on_change: Called after each new table.

    Raises:
        ConfigError: Nothing would tell of a pool's workers.
    """

    def __init__(
        self,
        config: RouterConfig,
        picker: Picker,
        file: Path | None,
        on_change: Callable[[], None],
    ) -> None:
        self._file = file
        self.check(config)
        self._config = config
        self._picker = picker
        self._on_change = on_change
        self._discovery: asyncio.Task[None] | None = None
        # As the discovery told it last.
        self._told: EndpointTable = {}
        # Until the endpoints are known every tier may be there.
        self.take({tier.name: {} for tier in config.tiers if tier.kind == "pool"})
        self.are_told = False
        """Whether somebody has told of workers; before, a tier without one is not asleep."""

    def check(self, config: RouterConfig) -> None:
        """Raises ConfigError where nothing would tell of a pool's workers."""
        pools = [tier.name for tier in config.tiers if tier.kind == "pool"]
        if pools and isinstance(config.endpoints, FileEndpoints) and self._file is None:
            raise ConfigError(
                f"tiers {', '.join(pools)} are pools, so --endpoints FILE is needed "
                "(or `endpoints: {type: endpointslice}` in the configuration)"
            )

    def take(self, table: EndpointTable) -> None:
        """Take what was told of all workers."""
        self._told = table
        merged: dict[str, Any] = {}
        for tier in self._config.tiers:
            if tier.kind == "external":
                merged[tier.name] = {"unified": ((tier.url or "").rstrip("/"),)}
            elif tier.name in table:
                merged[tier.name] = table[tier.name]
        unknown = table.keys() - {tier.name for tier in self._config.tiers}
        if unknown:
            logger.warning("endpoints of unknown tiers ignored: %s", ", ".join(sorted(unknown)))
        self._picker.set_table(merged)
        self.are_told = True
        self._on_change()

    def reconfigure(self, after: RouterConfig) -> None:
        """Take other tiers, and follow who tells of them now."""
        before, self._config = self._config, after
        known = {tier.name for tier in before.tiers}
        new = [tier.name for tier in after.tiers if tier.kind == "pool" and tier.name not in known]
        were_told = self.are_told
        # Until something is told of a new tier's workers it may be there.
        self.take({**{name: {} for name in new}, **self._told})
        self.are_told = were_told
        if self._discovery is not None and before.endpoints != after.endpoints:
            self._discovery.cancel()
            self.follow()

    def follow(self) -> None:
        """Begin to follow the workers, as the configuration says."""
        endpoints = self._config.endpoints
        if not isinstance(endpoints, FileEndpoints):
            from tandem_router.balancing.kubernetes_discovery import watch_slices

            watching = watch_slices(endpoints, self.take)
        elif self._file is not None:
            watching = watch_file(self._file, endpoints.poll_s, self.take)
        else:
            self._discovery = None
            return
        self._discovery = begin(watching, "workers that come and go are no longer noticed")

    async def close(self) -> None:
        """Follow them no longer."""
        if self._discovery is not None:
            self._discovery.cancel()
            await asyncio.gather(self._discovery, return_exceptions=True)
