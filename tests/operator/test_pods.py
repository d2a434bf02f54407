"""Asking pods: a reply is read whole, within bounds, or refused in words."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from tandem_operator.local.store import Store
from tandem_operator.plan import Settings
from tandem_operator.plan.router_facts import TierFacts
from tandem_operator.reconcile import pod_client as pods
from tandem_operator.reconcile.cluster_api import ApiError
from tandem_operator.reconcile.pod_client import WorkerPods, ask_json, router_traffic
from tandem_operator.reconcile.pod_http import MAX_REPLY_BYTES
from tandem_operator.resources.base import Object


@asynccontextmanager
async def answering(*parts: bytes, endless: bool = False) -> AsyncIterator[int]:
    """A server that sends these bytes to whoever asks, the last ones for ever if so wanted."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            for part in parts:
                writer.write(part)
                await writer.drain()
            while endless:
                writer.write(parts[-1])
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


async def test_a_reply_may_come_in_pieces_and_in_chunks() -> None:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    async with answering(head, b'4\r\n{"a"\r\n', b"4;x=y\r\n: 1}\r\n", b"0\r\n\r\n") as port:
        assert await ask_json("127.0.0.1", port, "/x") == (200, {"a": 1})


async def test_a_reply_without_end_is_refused() -> None:
    head = b"HTTP/1.1 200 OK\r\n\r\n"
    async with answering(head, b"x" * 65536, endless=True) as port:
        with pytest.raises(ValueError, match=f"more than {MAX_REPLY_BYTES} bytes"):
            await ask_json("127.0.0.1", port, "/x")


@pytest.mark.parametrize("reply", [b"", b"\r\n\r\n", b"SSH-2.0-x", b"HTTP/1.1 oops {}\r\n\r\n{}"])
async def test_what_is_not_http_is_no_answer(reply: bytes) -> None:
    async with answering(reply) as port:
        with pytest.raises(ValueError, match="is no HTTP"):
            await ask_json("127.0.0.1", port, "/x")


async def test_what_the_pods_of_a_router_measured_is_averaged() -> None:
    """One that does not answer, or was never asked for anything, changes nothing."""

    def state(ratio: float | None, share: float) -> bytes:
        body = {
            "predictor": "v3",
            "set_points": {"gain_threshold": 0.2},
            "expected_quality_ratio": ratio,
            "content_blind_quality_ratio": ratio and ratio - 0.1,
            "tiers": [{"name": "small", "recent_share": share, "ttft_s": None}],
        }
        return b"HTTP/1.1 200 OK\r\n\r\n" + json.dumps(body).encode()

    replies = [state(0.9, 0.5), state(1.0, 0.7), state(None, 0.6), b"nonsense"]
    async with serving(replies) as (hosts, port):
        facts = await router_traffic([ready_pod(host) for host in hosts], port)

    assert facts is not None
    assert (facts.predictor, facts.threshold) == ("v3", 0.2)
    assert facts.quality_ratio == pytest.approx(0.95)
    assert facts.content_blind_quality_ratio == pytest.approx(0.85)
    assert facts.tiers["small"] == TierFacts(share=pytest.approx(0.6))


async def test_the_trouble_that_any_pod_has_with_the_cascades_judge_is_told() -> None:
    def state(problem: str) -> bytes:
        judge = {"problem": problem, "outcomes": {"bad": 3}}
        cascade = {"zones": {}, "outcomes": {"verified": 2}, "problem": "", "judge": judge}
        return b"HTTP/1.1 200 OK\r\n\r\n" + json.dumps({"cascade": cascade}).encode()

    async with serving([state(""), state("it answered with status 500")]) as (hosts, port):
        facts = await router_traffic([ready_pod(host) for host in hosts], port)

    assert facts is not None
    assert facts.cascade is not None
    assert facts.cascade.judge_problem == "it answered with status 500"
    assert facts.cascade.outcomes == {"verified": 4}


def ready_pod(ip: str) -> Object:
    status = {"podIP": ip, "conditions": [{"type": "Ready", "status": "True"}]}
    return {"metadata": {"name": ip}, "status": status}


@asynccontextmanager
async def serving(replies: list[bytes]) -> AsyncIterator[tuple[list[str], int]]:
    """A server on one port, at an address for each reply."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        host = writer.get_extra_info("sockname")[0]
        writer.write(replies[hosts.index(host)])
        writer.close()

    hosts = [f"127.0.0.{i + 1}" for i in range(len(replies))]
    server = await asyncio.start_server(answer, "0.0.0.0", 0)
    async with server:
        yield hosts, server.sockets[0].getsockname()[1]


class Link:
    """Stands for the prefill worker that a link test asks; answers when a test says so."""

    def __init__(self) -> None:
        self.num_asked = 0
        self.answers = asyncio.Event()
        self.ok = True

    async def ask(self, host: str, port: int, path: str, *_: Any) -> tuple[int, Any]:
        self.num_asked += 1
        await self.answers.wait()
        return 200, {"ok": self.ok, "num_bytes": 64, "error": "checksums differ"}


def worker_pod(role: str) -> Object:
    pod = ready_pod("127.0.0.1")
    labels = {"tandem.dev/role": role}
    return {**pod, "metadata": {"name": role, "uid": role, "namespace": "n", "labels": labels}}


BOTH_ROLES = [worker_pod("prefill"), worker_pod("decode")]


@pytest.fixture
def link(monkeypatch: pytest.MonkeyPatch) -> Link:
    link = Link()
    monkeypatch.setattr(pods, "ask_json", link.ask)
    monkeypatch.setattr(pods, "PATIENCE_S", 0.01)
    return link


async def test_workers_that_do_not_answer_keep_no_pass_waiting(link: Link) -> None:
    workers = WorkerPods(Store(), Settings(), lambda: 0.0)

    first = await workers.test_link(BOTH_ROLES)
    second = await workers.test_link(BOTH_ROLES)
    link.answers.set()
    third = await workers.test_link(BOTH_ROLES)
    fourth = await workers.test_link(BOTH_ROLES)

    assert (first.ok, second.ok, third.ok, fourth.ok) == (None, None, True, True)
    assert link.num_asked == 1


async def test_a_link_is_tested_again_and_its_last_result_holds_meanwhile(link: Link) -> None:
    now = 0.0
    workers = WorkerPods(Store(), Settings(), lambda: now)
    link.answers.set()
    link.ok = False
    assert (await workers.test_link(BOTH_ROLES)).ok is False

    link.answers.clear()
    now += pods.RETRY_AFTER_S
    meanwhile = await workers.test_link(BOTH_ROLES)
    link.ok = True
    link.answers.set()
    mended = await workers.test_link(BOTH_ROLES)

    assert (meanwhile.ok, mended.ok) == (False, True)


async def test_a_cluster_that_fails_the_test_is_told_and_the_next_pass_tests_again(
    link: Link,
) -> None:
    store = Store()
    get = store.get

    async def refuse(*_: str) -> None:
        raise ApiError(503, "not now")

    store.get = refuse  # type: ignore[method-assign, assignment]
    workers = WorkerPods(store, Settings(), lambda: 0.0)
    link.answers.set()

    with pytest.raises(ApiError, match="not now"):
        await workers.test_link(BOTH_ROLES)
    store.get = get  # type: ignore[method-assign]

    assert (await workers.test_link(BOTH_ROLES)).ok is True
