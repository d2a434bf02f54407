"""A secret in a file that changes while we run: its first line is sent, every line is accepted.

Who rotates it first adds the new line, then puts it first, then removes the old one, and waits in
between until every pod has seen the file. So nobody ever sends what another one refuses.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from tandem_worker.errors import ConfigError

logger = logging.getLogger(__name__)

LOOK_S = 1.0
MAX_LINES = 4


class SecretFile:
    """Call it for the lines as they are now; the file is looked at once a second.

    Raises ConfigError at the start when it cannot be used; one that is away or empty later leaves
    the lines that were there.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
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
        lines = tuple(line for line in map(bytes.strip, text.splitlines()) if line)
        if not 1 <= len(lines) <= MAX_LINES or not text.isascii():
            raise ConfigError(f"{self._path} must hold 1 to {MAX_LINES} lines of ASCII text")
        return lines
