"""Waits for what another task, thread or process makes true: the only polling in tests.

Where the code under test has an event or a clock, a test waits for the one or moves the other; here
is for the rest, which is seen from outside alone. A wait that is in vain fails with a sentence.
"""

from __future__ import annotations

import asyncio
import inspect
import subprocess
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

T = TypeVar("T")


async def eventually(
    check: Callable[[], T | Awaitable[T]], within_s: float = 20.0, every_s: float = 0.005
) -> T:
    """What `check` says as soon as it is true."""
    try:
        async with asyncio.timeout(within_s):
            while True:
                said: Any = check()
                if inspect.isawaitable(said):
                    said = await said
                if said:
                    return said  # type: ignore[no-any-return]
                await asyncio.sleep(every_s)
    except TimeoutError:
        raise AssertionError(f"not in {within_s:g} s: {_named(check)}") from None


def eventually_in_another_process(
    check: Callable[[], T],
    within_s: float = 60.0,
    every_s: float = 0.05,
    told: Callable[[], str] = str,
    process: subprocess.Popen[Any] | None = None,
) -> T:
    """As `eventually`, for tests without an event loop.

    told: what to say of a wait in vain. process: whose end makes it one at once.
    """
    end = time.monotonic() + within_s
    while not (said := check()):
        assert process is None or process.poll() is None, f"ended: {_named(check)}\n{told()}"
        assert time.monotonic() < end, f"not in {within_s:g} s: {_named(check)}\n{told()}"
        time.sleep(every_s)
    return said


def _named(check: Callable[[], object]) -> str:
    try:
        return inspect.getsource(check).strip()
    except (OSError, TypeError):
        return repr(check)
