"""Where retrained predictors are kept, and which of several routers decides about them.

In a folder, for the one router of a SQLite file or of no store; in a PostgreSQL store, for all that
share it: one holds the claim and decides, the others follow what it wrote.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

from tandem_router.predictor import Predictor, load
from tandem_router.store.records import Backend, StoreError

STATE = "retraining/state"
ARTIFACT = "retraining/artifact/"
RESULT = "retraining/result/"
CLAIM = "retraining"
#: A router that decides is followed by another one after so long without a word.
CLAIM_S, RENEW_S = 30.0, 8.0


class Archive(Protocol):
    """What a router keeps of its retrained predictors. All raise OSError, StoreError or ValueError.

    workspace: a folder for files of this process.
    """

    workspace: Path

    async def leads(self) -> bool:
        """Whether this router decides."""
        ...

    async def state(self) -> dict[str, Any] | None: ...

    async def save(self, state: Mapping[str, Any], versions: Collection[str]) -> None:
        """Keep what is known; artifacts of other versions go."""
        ...

    async def keep(self, artifact: Path, version: str) -> None:
        """Keep an artifact, a file of the workspace, under its version."""
        ...

    async def load(self, version: str) -> Predictor:
        """Raises PredictorError too."""
        ...

    async def result(self, run: str) -> dict[str, Any] | None:
        """What a training elsewhere left; None while there is nothing."""
        ...


class FolderArchive:
    """Files of one router, which always decides."""

    def __init__(self, folder: Path) -> None:
        self.workspace = folder

    async def leads(self) -> bool:
        return True

    async def state(self) -> dict[str, Any] | None:
        return await asyncio.to_thread(self._state)

    def _state(self) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = json.loads((self.workspace / "state.json").read_text())
        except FileNotFoundError:
            return None
        return found

    async def save(self, state: Mapping[str, Any], versions: Collection[str]) -> None:
        await asyncio.to_thread(self._save, state, versions)

    def _save(self, state: Mapping[str, Any], versions: Collection[str]) -> None:
        self.workspace.mkdir(parents=True, exist_ok=True)
        new = self.workspace / "state.json.new"
        new.write_text(json.dumps(state))
        new.replace(self.workspace / "state.json")
        wanted = {self._file(version) for version in versions}
        for path in self.workspace.glob("trained-*"):
            if path not in wanted:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    async def keep(self, artifact: Path, version: str) -> None:
        await asyncio.to_thread(artifact.replace, self._file(version))

    async def load(self, version: str) -> Predictor:
        return await asyncio.to_thread(load, self._file(version))

    async def result(self, run: str) -> dict[str, Any] | None:
        return None

    def _file(self, version: str) -> Path:
        return self.workspace / f"trained-{Path(version).name}"


class StoreArchive:
    """What the routers of one store share."""

    def __init__(self, backend: Backend, folder: Path, clock: Callable[[], float]) -> None:
        self.workspace = folder
        self._backend = backend
        self._clock = clock
        self.holder = secrets.token_hex(8)
        self._leads, self._asked_at = False, float("-inf")

    async def leads(self) -> bool:
        if self._clock() - self._asked_at >= RENEW_S:
            self._leads = False  # where the store does not answer, nobody here decides
            self._leads = await self._backend.claim(CLAIM, self.holder, CLAIM_S)
            self._asked_at = self._clock()
        return self._leads

    async def state(self) -> dict[str, Any] | None:
        return await read_json(self._backend, STATE)

    async def save(self, state: Mapping[str, Any], versions: Collection[str]) -> None:
        await self._backend.keep(STATE, json.dumps(state).encode())
        wanted = {ARTIFACT + version for version in versions}
        for name in await self._backend.kept_names(ARTIFACT):
            if name not in wanted:
                await self._backend.keep(name, None)
        for name in await self._backend.kept_names(RESULT):
            if name != f"{RESULT}{state.get('run')}":
                await self._backend.keep(name, None)

    async def keep(self, artifact: Path, version: str) -> None:
        await keep_artifact(self._backend, artifact, version)
        await asyncio.to_thread(artifact.unlink)

    async def load(self, version: str) -> Predictor:
        body = await self._backend.kept(ARTIFACT + version)
        if body is None:
            raise StoreError(f"the store has no predictor {version}")
        return await asyncio.to_thread(self._load, body, version)

    def _load(self, body: bytes, version: str) -> Predictor:
        self.workspace.mkdir(parents=True, exist_ok=True)
        path = self.workspace / f"from-store-{Path(version).name}"
        path.write_bytes(body)
        try:
            return load(path)
        finally:
            path.unlink()

    async def result(self, run: str) -> dict[str, Any] | None:
        return await read_json(self._backend, RESULT + run)


async def read_json(backend: Backend, name: str) -> dict[str, Any] | None:
    body = await backend.kept(name)
    if body is None:
        return None
    found: dict[str, Any] = json.loads(body)
    return found


async def keep_artifact(backend: Backend, artifact: Path, version: str) -> None:
    await backend.keep(ARTIFACT + version, await asyncio.to_thread(artifact.read_bytes))


async def keep_result(backend: Backend, run: str, result: Mapping[str, Any]) -> None:
    await backend.keep(RESULT + run, json.dumps(result).encode())
