"""Which predictor scores prompts now: as the configuration says, and as it changes while we run.

Another kind of predictor is used at once, another artifact as soon as it has been read, off the
event loop; until then, and where it cannot be read, the one before goes on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from tandem_router.config import RouterConfig
from tandem_router.limits.prices import list_price
from tandem_router.routing.predictor_source import (
    ARTIFACT_POLL_S,
    ArtifactPredictor,
    Predictor,
    UnlearnedPredictor,
    configured_predictor,
)
from tandem_router.telemetry.logged_task import begin


class PredictorInUse:
    """One router's. given: overrides the configured one. artifact_path: goes before the
    configuration's.

    on_kind: told of another predictor; on_artifact: that the artifact in use was read anew.
    """

    def __init__(
        self, config: RouterConfig, given: Predictor | None, artifact_path: Path | None
    ) -> None:
        self._config = config
        self._given = given
        self._path = artifact_path
        self.artifact: ArtifactPredictor | None = None
        self.on_kind: Callable[[Predictor | None], None] = lambda _: None
        self.on_artifact: Callable[[Predictor], None] = lambda _: None
        self._reading: asyncio.Task[None] | None = None
        self.current = self._of(config)

    def _artifact_path(self, config: RouterConfig) -> Path | None:
        named = config.predictor.artifact
        path = self._path or (Path(named) if named is not None else None)
        return path if config.predictor.type == "Learned" else None

    def _of(self, config: RouterConfig) -> Predictor | None:
        self.artifact = None
        if self._given is not None:
            return self._given
        if (path := self._artifact_path(config)) is not None:
            self.artifact = ArtifactPredictor(path, _names(config), config.predictor.embedding)
            return self.artifact
        if config.predictor.type == "Learned":
            return UnlearnedPredictor(config.tiers, config.predictor)
        return configured_predictor(config)

    def reconfigure(self, config: RouterConfig) -> None:
        """Take other settings; a predictor that is made from the same stays itself."""
        before, self._config = self._config, config
        if self._given is not None or _made_from(before) == _made_from(config):
            return
        path, settings = self._artifact_path(config), config.predictor
        if path is None:
            self._use(self._of(config))
        elif self.artifact is None:
            self._read(self._begin(config))
        elif self.artifact.reconfigure(path, _names(config), settings.embedding):
            self._read(self._reload(self.artifact))

    def _use(self, predictor: Predictor | None) -> None:
        self.current = predictor
        self.on_kind(predictor)

    def _read(self, reading: Coroutine[Any, Any, None]) -> None:
        self._reading = begin(reading, "the predictor was not read")

    async def _begin(self, config: RouterConfig) -> None:
        predictor = await asyncio.to_thread(self._of, config)
        if config is self._config or _made_from(config) == _made_from(self._config):
            self._use(predictor)

    async def _reload(self, artifact: ArtifactPredictor) -> None:
        if await asyncio.to_thread(artifact.reload):
            self.on_artifact(artifact)

    async def watch(self) -> None:
        """Look for a new artifact until cancelled."""
        while True:
            await asyncio.sleep(ARTIFACT_POLL_S)
            if self.artifact is not None:
                await self._reload(self.artifact)

    def close(self) -> None:
        """What is being read is not waited for."""
        if self._reading is not None:
            self._reading.cancel()


def _names(config: RouterConfig) -> tuple[str, ...]:
    return tuple(tier.name for tier in config.tiers)


def _made_from(config: RouterConfig) -> object:
    """Where it differs, another predictor is needed."""
    settings = config.predictor
    by_price = [tier.name for tier in sorted(config.tiers, key=list_price)]
    what = (settings.type, settings.artifact, settings.embedding, settings.length_midpoint_chars)
    return what, by_price
