"""A request's coroutine runs at once, waits without a task, and becomes one where it needs one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextvars import ContextVar
from typing import Any

import pytest

from tandem_router.http.eager import EagerRun, Landing

NAME: ContextVar[str] = ContextVar("name", default="")


async def begun(work: Coroutine[Any, Any, None]) -> EagerRun:
    """As a server begins it: from a callback of the loop, where no task runs."""
    loop = asyncio.get_running_loop()
    run = EagerRun(work, loop)
    await from_the_loop(run.go_on)
    return run


async def from_the_loop(call: Callable[[], Any]) -> None:
    done = asyncio.get_running_loop().create_future()

    def called() -> None:
        call()
        done.set_result(None)

    asyncio.get_running_loop().call_soon(called)
    await done


async def test_it_goes_as_far_as_it_gets_before_the_call_returns() -> None:
    steps = []
    landing = Landing[int]()

    async def work() -> None:
        steps.append("began")
        steps.append(str(await landing.landed()))

    loop = asyncio.get_running_loop()
    run = EagerRun(work(), loop)
    seen: list[list[str]] = []

    def calls() -> None:
        run.go_on()
        seen.append(steps.copy())
        landing.land(7)
        seen.append(steps.copy())

    await from_the_loop(calls)

    assert seen == [["began"], ["began", "7"]]


async def test_what_lands_within_a_task_is_taken_up_when_that_waits() -> None:
    landing, taken = Landing[int](), []

    async def work() -> None:
        taken.append(await landing.landed())

    await begun(work())
    landing.land(1)
    in_this_task = taken.copy()
    await asyncio.sleep(0)

    assert (in_this_task, taken) == ([], [1])


async def test_whatever_else_it_waits_for_it_waits_for_as_a_task() -> None:
    tasks: list[object] = []
    first = Landing[str]()

    async def work() -> None:
        NAME.set("this one's")
        tasks.append(asyncio.current_task())
        await first.landed()
        await asyncio.sleep(0)
        tasks.append(asyncio.current_task())
        tasks.append(NAME.get())
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.0):
                await asyncio.get_running_loop().create_future()
        tasks.append("timed out")

    run = await begun(work())
    await from_the_loop(lambda: first.land("now"))
    while "timed out" not in tasks:  # noqa: ASYNC110
        await asyncio.sleep(0)

    assert tasks[0] is run
    assert isinstance(tasks[1], asyncio.Task)
    assert tasks[2] == "this one's"
    assert NAME.get() == ""


async def test_a_timeout_entered_before_it_became_a_task_still_ends_it() -> None:
    ended: list[str] = []
    never = asyncio.get_running_loop().create_future()

    async def work() -> None:
        try:
            async with asyncio.timeout(0.001):
                await never
        except TimeoutError:
            ended.append("in time")

    await begun(work())
    while not ended:  # noqa: ASYNC110
        await asyncio.sleep(0)

    assert ended == ["in time"]


async def test_a_timeout_ends_what_waits_without_a_task() -> None:
    ended: list[str] = []
    never = Landing[None]()

    async def work() -> None:
        try:
            async with asyncio.timeout(0.001):
                await never.landed()
        except TimeoutError:
            ended.append("in time")

    await begun(work())
    while not ended:  # noqa: ASYNC110
        await asyncio.sleep(0)

    assert ended == ["in time"]


@pytest.mark.parametrize("waits_as", ["waited", "task"])
async def test_cancelled_it_cleans_up(waits_as: str) -> None:
    ended: list[str] = []
    landing = Landing[None]()

    async def work() -> None:
        try:
            if waits_as == "task":
                await asyncio.sleep(0)
            await landing.landed()
        except asyncio.CancelledError:
            await asyncio.sleep(0)
            ended.append("cleaned up")
            raise

    run = await begun(work())
    await asyncio.sleep(0)
    await from_the_loop(run.cancel)
    landing.land(None)
    while not ended:  # noqa: ASYNC110
        await asyncio.sleep(0)

    assert ended == ["cleaned up"]


async def test_it_may_be_cancelled_by_what_it_calls_itself() -> None:
    ended: list[str] = []
    runs: list[EagerRun] = []

    async def work() -> None:
        runs[0].cancel()
        ended.append("goes on")
        try:
            await Landing[None]().landed()
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    loop = asyncio.get_running_loop()
    runs.append(EagerRun(work(), loop))
    await from_the_loop(runs[0].go_on)
    while len(ended) < 2:  # noqa: ASYNC110
        await asyncio.sleep(0)

    assert ended == ["goes on", "cancelled"]
    assert not runs[0].cancel()


async def test_an_error_lands_where_it_is_awaited() -> None:
    landing, seen = Landing[None](), []

    async def work() -> None:
        try:
            await landing.landed()
        except ValueError as error:
            seen.append(str(error))

    await begun(work())
    await from_the_loop(lambda: landing.fail(ValueError("no")))
    landing.land(None)

    assert seen == ["no"]
