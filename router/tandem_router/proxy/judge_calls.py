"""How an external judge is asked: its key, read anew as its file changes, and one POST."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tandem_router.config import JudgeConfig, RouterConfig
from tandem_router.config.secret_file import SecretFile
from tandem_router.errors import ConfigError, UpstreamError
from tandem_router.http.client import UpstreamClient

MAX_VERDICT_BYTES = 4 * 2**20


class JudgeKeys:
    """The keys of judges by file. Raises ConfigError where that of the first cannot be used."""

    def __init__(self, config: RouterConfig, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._files: dict[str, SecretFile] = {}
        judge = config.learning.judge
        if judge is not None and judge.api_key_file is not None:
            try:
                self._file(judge.api_key_file)
            except ConfigError as error:
                raise ConfigError(f"learning.judge: api_key_file {error}") from error

    def _file(self, path: str) -> SecretFile:
        if path not in self._files:
            self._files[path] = SecretFile(Path(path), self._clock)
        return self._files[path]

    async def post(
        self, client: UpstreamClient, judge: JudgeConfig, body: bytes
    ) -> tuple[int, bytes]:
        """(status, body) of one question. Raises UpstreamError."""
        headers = [(b"content-type", b"application/json")]
        if judge.api_key_file is not None:
            try:
                headers.append((b"authorization", b"Bearer " + self._file(judge.api_key_file)()[0]))
            except ConfigError as error:
                raise UpstreamError(f"its key: {error}") from error
        response = await client.request(
            "POST",
            (judge.url or "").rstrip("/") + "/chat/completions",
            headers=headers,
            body=body,
            stall_timeout_s=judge.timeout_s,
            outward=True,
        )
        try:
            return response.status, await response.read_all(MAX_VERDICT_BYTES)
        finally:
            response.close()
