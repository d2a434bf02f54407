"""The keys of external providers, taken up again when their files change."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from tandem_router.config import RouterConfig
from tandem_router.errors import ConfigError

logger = logging.getLogger("tandem.router")


class ProviderKeys:
    """One key per external tier that has a file. Raises ConfigError where one cannot be read."""

    def __init__(self, config: RouterConfig) -> None:
        self._files = {
            tier.name: Path(tier.api_key_file)
            for tier in config.tiers
            if tier.api_key_file is not None
        }
        self._keys: dict[str, str] = {}
        for tier, path in self._files.items():
            try:
                self._keys[tier] = path.read_text().strip()
            except OSError as error:
                raise ConfigError(
                    f"tier {tier!r}: api_key_file {path} cannot be read: {error.strerror}"
                ) from error

    def get(self, tier: str) -> str | None:
        return self._keys.get(tier)

    def refresh(self) -> None:
        """Read the files again; one that is away or empty for a moment leaves the key it had."""
        for tier, path in self._files.items():
            try:
                key = path.read_text().strip()
            except OSError as error:
                logger.warning("tier %r: its key cannot be read: %s", tier, error.strerror)
                continue
            if key and key != self._keys[tier]:
                self._keys[tier] = key
                logger.info("tier %r: the provider's key was rotated", tier)

    async def watch(self, poll_s: float = 1.0) -> None:
        """Refresh until cancelled; returns where there is nothing to watch."""
        while self._files:
            await asyncio.sleep(poll_s)
            self.refresh()
