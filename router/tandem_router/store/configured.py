"""The store that the configuration asks for, at the place that the command line names."""

from __future__ import annotations

from pathlib import Path

from tandem_router.config.router import StoreConfig
from tandem_router.errors import ConfigError
from tandem_router.store.records import Backend


def configured_backend(config: StoreConfig, file: Path | None, url: str | None) -> Backend | None:
    """None where nothing is to outlive the process. Raises ConfigError where no place is given."""
    if config.type == "sqlite":
        if file is None:
            raise ConfigError("store.type=sqlite needs --store-file FILE")
        from tandem_router.store.sqlite import SqliteStore

        return SqliteStore(file, max_decisions=config.max_decisions)
    if config.type == "postgres":
        if url is None:
            raise ConfigError("store.type=postgres needs --store-url-file FILE")
        from tandem_router.store.postgres import PostgresStore

        return PostgresStore(url, max_decisions=config.max_decisions)
    return None
