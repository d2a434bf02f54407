"""The keys of external providers, taken up again when their files change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tandem_router.config import RouterConfig
from tandem_router.errors import ConfigError
from tandem_router.secret_file import SecretFile


class ProviderKeys:
    """One key per external tier that has a file. Raises ConfigError where one cannot be used."""

    def __init__(self, config: RouterConfig, clock: Callable[[], float]) -> None:
        self._files: dict[str, SecretFile] = {}
        for tier in config.tiers:
            if tier.api_key_file is not None:
                try:
                    self._files[tier.name] = SecretFile(Path(tier.api_key_file), clock)
                except ConfigError as error:
                    raise ConfigError(f"tier {tier.name!r}: api_key_file {error}") from error

    def get(self, tier: str) -> bytes | None:
        """The key to send now."""
        file = self._files.get(tier)
        return file()[0] if file is not None else None
