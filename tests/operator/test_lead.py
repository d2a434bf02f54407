"""The operator's main loop around its work: what ends it is told, and its port answers anybody."""

from __future__ import annotations

import asyncio
import gc
import socket
from typing import Any

import httpx
import pytest

from tandem_operator.kube import operator as kube
from tandem_operator.kube.leader import LeaseTimes
from tandem_operator.kube.probes import ProbeServer, probes


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
    await kube.lead(api, kube.Vitals(api), work, election)  # type: ignore[arg-type]


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
    server = ProbeServer(probes(lambda: True, []))
    await server.open("127.0.0.1", 0)
    async with asyncio.timeout(20.0):
        reader, writer = await asyncio.open_connection(*server.address)
        writer.write(sent)
        writer.write_eof()
        try:
            assert (await reader.read())[:12] in (b"", b"HTTP/1.1 400")
        except ConnectionError:
            pass  # hung up on before everything was read
        finally:
            writer.close()
        await server.close()
    gc.collect()

    assert unhandled == []


async def test_the_port_says_whether_everything_was_listed_and_counts() -> None:
    listed = False
    readings = [("tandem_operator_passes", "counter", "Passes.", lambda: 3.0)]
    server = ProbeServer(probes(lambda: listed, readings))
    await server.open("127.0.0.1", 0)
    base = f"http://127.0.0.1:{server.address[1]}"
    async with httpx.AsyncClient(trust_env=False) as client:
        assert (await client.get(f"{base}/ready")).status_code == 503
        listed = True
        assert (await client.get(f"{base}/ready")).status_code == 200
        assert (await client.get(f"{base}/health")).text == "ok\n"
        assert "tandem_operator_passes_total 3.0" in (await client.get(f"{base}/metrics")).text
        assert (await client.get(f"{base}/other")).status_code == 404
    await server.close()


async def test_a_port_that_is_taken_is_an_error_of_the_system() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError):
        await ProbeServer(probes(lambda: True, [])).open(*taken.getsockname())
