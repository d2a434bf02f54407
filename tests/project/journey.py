"""Follows one value through the files that it is handed to, as the code runs.

A station is a file of the package of which a function is called with the value. Whoever reads the
code along the calls has to open a file again each time the value comes to a function in one that
was left; a function is read once, however often a loop calls it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class Journey:
    """The files that a value came to, in order."""

    def __init__(self, package: str, is_it: Callable[[Any], bool]) -> None:
        self._root = str(ROOT / package) + "/"
        self._is_it = is_it
        self.stations: list[str] = []
        # (file, function), each where it was called first.
        self.calls: list[tuple[str, str]] = []
        self._met: set[tuple[str, str]] = set()

    @property
    def returns(self) -> list[str]:
        """The files that it came back to, once for each time."""
        seen: set[str] = set()
        back = []
        for station in self.stations:
            if station in seen:
                back.append(station)
            seen.add(station)
        return back

    @contextmanager
    def followed(self) -> Iterator[Journey]:
        """Follows calls of this thread while the block runs."""
        sys.setprofile(self._called)
        try:
            yield self
        finally:
            sys.setprofile(None)

    def _called(self, frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(self._root):
            return
        # A coroutine that goes on is "called" too, and its variables are no arguments by then.
        if frame.f_lasti > 6 or code.co_name.startswith("<"):
            return
        station = code.co_filename.removeprefix(self._root)
        if (station, code.co_qualname) in self._met:
            return
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        given = frame.f_locals
        if not any(self._is_it(given[name]) for name in names if name in given):
            return
        self._met.add((station, code.co_qualname))
        self.calls.append((station, code.co_qualname))
        if not self.stations or self.stations[-1] != station:
            self.stations.append(station)
