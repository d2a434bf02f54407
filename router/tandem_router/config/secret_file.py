"""A secret in a file that changes while we run: its first line is sent, every line is accepted.

Who rotates it first adds the new line, then puts it first, then removes the old one, and waits in
between until every pod has seen the file. So nobody ever sends what another one refuses.
Workers have the same module, because neither package may import the other.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from tandem_router.errors import ConfigError

logger = logging.getLogger(__name__)

LOOK_S = 1.0
MAX_LINES = 4


class SecretFile:
    """Call it for the lines as they are now; the file is looked at once a second.

    Raises ConfigError at the start when it cannot be used; one that is away or empty later leaves
    the lines that were there. least_bytes: of a line. A file that is no text is one line.
    """

    def __init__(
        self,
        path: Path,
        clock: Callable[[], float] = time.monotonic,
        least_bytes: int = 1,
    ) -> None:
        self._path = path
        self._least_bytes = least_bytes
        self._clock = clock
        self._looked = clock()
        self._lines = self._read()

    def __call__(self) -> tuple[bytes, ...]:
        """The lines: the first to send, all to accept."""
        now = self._clock()
        if now - self._looked >= LOOK_S:
            self._looked = now
            try:
                lines = self._read()
            except ConfigError as error:
                logger.warning("%s; what it held stays in force", error)
            else:
                if lines != self._lines:
                    logger.info("%s has changed: %d lines", self._path, len(lines))
                self._lines = lines
        return self._lines

    def _read(self) -> tuple[bytes, ...]:
        try:
            text = self._path.read_bytes()
        except OSError as error:
            raise ConfigError(f"{self._path} cannot be read: {error.strerror}") from error
        rows = text.splitlines() if text.isascii() else [text]
        lines = tuple(line for line in map(bytes.strip, rows) if line)
        if not 1 <= len(lines) <= MAX_LINES:
            raise ConfigError(f"{self._path} must hold 1 to {MAX_LINES} lines, not {len(lines)}")
        if (shortest := min(map(len, lines))) < self._least_bytes:
            raise ConfigError(
                f"{self._path}: a secret has {shortest} bytes; use at least {self._least_bytes}"
            )
        return lines
