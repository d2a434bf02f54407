"""The operator's main loop around its work: what ends it is told, and its port answers anybody."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import pytest

from tandem_operator.kube import operator as kube
from tandem_operator.kube.leader import LeaseTimes


class Api:
    """What the port and the end of the lead need of an apiserver."""

    num_reads = num_writes = 0

    async def settle(self, timeout_s: float) -> bool:
        return True


class Work:
    """An operator that works until it is cancelled, or fails."""

    def __init__(self, error: Exception | None = None) -> None:
        self._error = error

    async def run(self) -> None:
        if self._error is not None:
            raise self._error
        await asyncio.Event().wait()


class Election:
    """Leads at once; `hold` ends as a test says. Writes down when it lets go."""

    def __init__(self, error: Exception | None = None) -> None:
        self._error = error
        self.times = LeaseTimes()
        self.leading = False
        self.released = False

    async def acquire(self) -> None:
        self.leading = True

    async def hold(self) -> None:
        if self._error is not None:
            raise self._error
        await asyncio.Event().wait()

    async def release(self) -> None:
        self.released = True


async def lead(work: Work, election: Election) -> None:
    api: Any = Api()
    await kube._lead(api, kube.Probes(api), work, election)  # type: ignore[arg-type]


async def test_a_defect_in_the_election_is_raised_and_the_lead_given_up() -> None:
    """Else the process would end without a word of why."""
    election = Election(ValueError("a lease that nobody can read"))

    with pytest.raises(ValueError, match="nobody can read"):
        await lead(Work(), election)

    assert election.released


async def test_a_defect_in_the_work_is_raised_and_the_lead_given_up() -> None:
    election = Election()

    with pytest.raises(RuntimeError, match="broken"):
        await lead(Work(RuntimeError("broken")), election)

    assert election.released


@pytest.mark.parametrize(
    "sent", [b"GET " + b"x" * 2**17, b"\r\n\r\n", b"half a request"], ids=["long", "empty", "half"]
)
async def test_a_request_that_cannot_be_read_is_hung_up_on(sent: bytes) -> None:
    unhandled: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, what: unhandled.append(what))
    api: Any = Api()
    server = await kube.Probes(api).serve("127.0.0.1", 0)
    async with server, asyncio.timeout(20.0):
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        writer.write(sent)
        writer.write_eof()
        try:
            assert await reader.read() == b""
        except ConnectionError:
            pass  # hung up on before everything was read
        finally:
            writer.close()
    gc.collect()

    assert unhandled == []
