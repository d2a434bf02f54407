"""How a request's coroutine runs: at once as far as it gets, and on when what it awaits is here.

A task begins one turn of the event loop after it was made, and goes on one turn after what it waits
for. Most requests wait once, for their worker's reply, so that both turns, the task and a future
cost more than they are worth. Here a coroutine is driven by the bytes that come: what it waits for
is something `Waited`, which calls it. Where it awaits anything else it becomes a task after all.

Python 3.12's eager tasks begin so, too; they go on like any other.
"""

from __future__ import annotations

import asyncio
import threading
import types
from asyncio import current_task
from asyncio.tasks import _enter_task, _leave_task
from collections.abc import Callable, Coroutine, Generator
from contextvars import copy_context
from functools import partial
from typing import Any, Generic, TypeVar, cast

Value = TypeVar("Value")
# What asyncio offers to those who run tasks of their own.
_enter: Callable[[asyncio.AbstractEventLoop, Any], None] = _enter_task
_leave: Callable[[asyncio.AbstractEventLoop, Any], None] = _leave_task


class _Running(threading.local):
    """Whether an `EagerRun` goes on now, in this thread: asking asyncio is a call of the system."""

    step = False


_running = _Running()


class Waited:
    """What one coroutine at a time waits for; `awake` lets it go on, if one does."""

    _resume: Callable[[], None] | None = None

    def awake(self) -> None:
        resume = self._resume
        if resume is not None:
            self._resume = None
            resume()

    @types.coroutine
    def until_awake(self) -> Generator[Any, None, None]:
        try:
            if _running.step:
                yield self  # its `EagerRun` sets `_resume`
            else:
                future = asyncio.get_running_loop().create_future()
                self._resume = lambda: None if future.done() else future.set_result(None)
                yield from future
        finally:
            self._resume = None


class Landing(Waited, Generic[Value]):
    """A value, or an error, that will be there once."""

    done = False
    _error: Exception | None = None
    _value: Value

    def land(self, value: Value) -> None:
        if not self.done:
            self.done, self._value = True, value
            self.awake()

    def fail(self, error: Exception) -> None:
        if not self.done:
            self.done, self._error = True, error
            self.awake()

    async def landed(self) -> Value:
        if not self.done:
            await self.until_awake()
        if self._error is not None:
            raise self._error
        return self._value


class EagerRun:
    """One coroutine and how far it is; for `asyncio.timeout` and others the task that runs it."""

    # What most runs leave as it is, so that making one costs little.
    _task: asyncio.Task[None] | None = None
    _waits: Waited | None = None
    _handle: asyncio.Handle | None = None  # of the loop, which goes on with it soon
    _is_ended = _must_cancel = False
    _num_cancels = 0

    def __init__(
        self, coroutine: Coroutine[Any, Any, None], loop: asyncio.AbstractEventLoop
    ) -> None:
        self._coroutine = coroutine
        self._loop = loop
        self._run = run = copy_context().run
        self._send = partial(run, coroutine.send, None)

    def go_on(self) -> None:
        """Run until it waits or ends; from within a task, soon."""
        if current_task(self._loop) is None:
            self._step(self._send)
        else:
            self._soon(self._send)

    def _soon(self, step: Callable[[], Any]) -> None:
        self._handle = self._loop.call_soon(self._step, step)

    def _step(self, step: Callable[[], Any]) -> None:
        loop = self._loop
        _enter(loop, self)
        _running.step = True
        try:
            waits = step()
        except StopIteration:
            self._is_ended = True
            return
        except asyncio.CancelledError:
            self._is_ended = True
            return
        except BaseException:
            self._is_ended = True
            raise
        finally:
            _running.step = False
            _leave(loop, self)
        if isinstance(waits, Waited):
            self._waits = waits
            waits._resume = self.go_on
        else:
            self._waits = None
            self._task = self._run(loop.create_task, _rest(self._coroutine, waits))
        if self._must_cancel:
            self._must_cancel = False
            self.cancel()

    def cancel(self, msg: object = None) -> bool:
        """As of a task."""
        if self._task is not None:
            return self._task.cancel(msg)
        if self._is_ended:
            return False
        if current_task(self._loop) is cast("object", self):
            self._must_cancel = True
            return True
        self._num_cancels += 1
        if self._waits is not None:
            self._waits._resume = None
        if self._handle is not None:
            self._handle.cancel()
        # Soon, as tasks do: `asyncio.timeout` notes only afterwards that it is the one.
        self._soon(partial(self._run, self._coroutine.throw, asyncio.CancelledError()))
        return True

    def cancelling(self) -> int:
        return self._num_cancels if self._task is None else self._task.cancelling()

    def uncancel(self) -> int:
        if self._task is not None:
            return self._task.uncancel()
        self._num_cancels = max(0, self._num_cancels - 1)
        return self._num_cancels


async def _rest(coroutine: Coroutine[Any, Any, None], waits: Any) -> None:
    """What is left of a coroutine that waits for `waits`."""
    await _driven(coroutine, waits)


@types.coroutine
def _driven(coroutine: Coroutine[Any, Any, None], waits: Any) -> Generator[Any, Any, None]:
    try:
        while True:
            try:
                sent = yield waits
            except BaseException as error:
                waits = coroutine.throw(error)
            else:
                waits = coroutine.send(sent)
    except StopIteration:
        return
