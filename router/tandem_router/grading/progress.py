"""What a person sees while a run goes on: a bar with the spend, or a line every tenth."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TextIO

_WIDTH = 30


def dollars(amount: float) -> str:
    """An amount with the digits that matter: $12.34, $0.0123, $0."""
    if amount == 0:
        return "$0"
    if amount < 0:
        return "-" + dollars(-amount)
    return (
        f"${amount:,.2f}"
        if amount >= 1
        else f"${amount:.4g}"
        if amount >= 1e-4
        else f"${amount:.1e}"
    )


class Progress:
    """Draws on `stream`: over itself on a terminal, otherwise a line at each tenth."""

    def __init__(
        self, total: int, spent_usd: Callable[[], float], stream: TextIO | None = None
    ) -> None:
        self._total = total
        self._spent_usd = spent_usd
        self._stream = stream if stream is not None else sys.stderr
        self._live = self._stream.isatty()
        self._tenth = 0

    def __call__(self, done: int) -> None:
        share = done / max(self._total, 1)
        if self._live:
            filled = int(share * _WIDTH)
            bar = "#" * filled + "." * (_WIDTH - filled)
            self._stream.write(f"\r[{bar}] {self._text(done)} ")
            self._stream.flush()
        elif int(10 * share) > self._tenth:
            self._tenth = int(10 * share)
            self.say(self._text(done))

    def _text(self, done: int) -> str:
        return f"{done:,} of {self._total:,} questions, {dollars(self._spent_usd())} spent"

    def say(self, message: str) -> None:
        """A line of its own, whatever the bar shows."""
        self._stream.write(("\r\x1b[K" if self._live else "") + message + "\n")
        self._stream.flush()

    def close(self) -> None:
        if self._live:
            self._stream.write("\n")
            self._stream.flush()
