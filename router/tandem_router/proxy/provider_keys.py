"""The keys of external providers, taken up again when their files change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tandem_router.config import RouterConfig
from tandem_router.config.secret_file import SecretFile
from tandem_router.errors import ConfigError


class ProviderKeys:
    """One key per external tier that has a file. Raises ConfigError where one cannot be used."""

    def __init__(self, config: RouterConfig, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._files: dict[str, SecretFile] = {}
        self._by_path: dict[str, SecretFile] = {}
        self.reconfigure(config)

    def reconfigure(self, config: RouterConfig) -> None:
        """Take the keys of other tiers; raises ConfigError, and then nothing has changed."""
        by_path: dict[str, SecretFile] = {}
        files: dict[str, SecretFile] = {}
        for tier in config.tiers:
            if (path := tier.api_key_file) is None:
                continue
            try:
                known = by_path.get(path) or self._by_path.get(path)
                files[tier.name] = by_path[path] = known or SecretFile(Path(path), self._clock)
            except ConfigError as error:
                raise ConfigError(f"tier {tier.name!r}: api_key_file {error}") from error
        self._files, self._by_path = files, by_path

    def get(self, tier: str) -> bytes | None:
        """The key to send now."""
        file = self._files.get(tier)
        return file()[0] if file is not None else None
