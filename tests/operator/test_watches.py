"""Copies on a scripted apiserver: what they ask for, and what they hold through every fault."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from kubernetes.aio import client

from tandem_operator.kube.cache import CUSTOM_KINDS, KindCache
from tandem_operator.kube.client import KubeApi
from tandem_operator.reconcile.cluster_api import KIND_INFO

Object = dict[str, Any]
GROUP = "/apis/tandem.dev/v1alpha1"
PLURALS = {KIND_INFO[kind].plural: kind for kind in CUSTOM_KINDS}


def resource(name: str, version: int, **spec: Any) -> Object:
    metadata = {"name": name, "namespace": "default", "uid": f"uid-{name}"}
    return {"metadata": {**metadata, "resourceVersion": str(version)}, "spec": spec}


class Apiserver:
    """Serves the four kinds; a test changes objects with or without telling the watches."""

    def __init__(self) -> None:
        self.version = 1
        self.plurals = set(PLURALS)
        self.objects: dict[str, dict[str, Object]] = {p: {} for p in PLURALS}
        self.requests: list[tuple[str, str]] = []
        self.watched_from: list[str] = []
        self.refuse: list[int] = []
        self._watches: dict[str, list[asyncio.Queue[bytes | None]]] = {p: [] for p in PLURALS}

    def put(self, plural: str, name: str, silent: bool = False, **spec: Any) -> None:
        self.version += 1
        what = "MODIFIED" if name in self.objects[plural] else "ADDED"
        obj = self.objects[plural][name] = resource(name, self.version, **spec)
        if not silent:
            self._tell(plural, {"type": what, "object": obj})

    def drop(self, plural: str, name: str, silent: bool = False) -> None:
        self.version += 1
        obj = self.objects[plural].pop(name)
        obj["metadata"]["resourceVersion"] = str(self.version)
        if not silent:
            self._tell(plural, {"type": "DELETED", "object": obj})

    def expire(self, plural: str) -> None:
        self._tell(plural, {"type": "ERROR", "object": {"kind": "Status", "code": 410}})

    def garble(self, plural: str) -> None:
        for queue in self._watches[plural]:
            queue.put_nowait(b'{"type": "ADDED", "obj\n')

    def cut(self, plural: str) -> None:
        for queue in self._watches[plural]:
            queue.put_nowait(None)

    def _tell(self, plural: str, event: Object) -> None:
        for queue in self._watches[plural]:
            queue.put_nowait(json.dumps(event).encode() + b"\n")

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.requests.append((request.method, request.path))
        plural = request.path.rsplit("/", 1)[-1]
        if plural not in self.plurals:
            return web.json_response({"message": "the resource is not served"}, status=404)
        if "watch" not in request.query:
            if self.refuse:
                return web.json_response({"message": "no"}, status=self.refuse.pop())
            items = list(self.objects[plural].values())
            metadata = {"resourceVersion": str(self.version)}
            return web.json_response({"items": items, "metadata": metadata})
        self.watched_from.append(request.query["resourceVersion"])
        queue: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._watches[plural].append(queue)
        response = web.StreamResponse()
        await response.prepare(request)
        try:
            while (line := await queue.get()) is not None:
                await response.write(line)
        finally:
            self._watches[plural].remove(queue)
        return response

    def is_watched(self) -> bool:
        return all(self._watches.values())


class Watched:
    """Running copies of the custom resources, and the names of what they told, in order."""

    def __init__(self, api: KubeApi, namespace: str | None, relist_s: float) -> None:
        self.told: list[str] = []
        self.copies = {
            kind: KindCache(
                api,
                kind,
                namespace,
                "",
                lambda o: self.told.append(o["metadata"]["name"]),
                relist_s,
                sleep=lambda _: asyncio.sleep(0.01),
            )
            for kind in CUSTOM_KINDS
        }

    def models(self) -> dict[str, Object]:
        return {o["metadata"]["name"]: o["spec"] for o in self.copies["Model"].select(None, {})}

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not condition():  # noqa: ASYNC110, many things may make it true
                await asyncio.sleep(0.01)


@asynccontextmanager
async def watched(
    server: Apiserver, namespace: str | None = None, relist_s: float = 600.0
) -> AsyncIterator[Watched]:
    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", server.answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    api = KubeApi(client.ApiClient(client.Configuration(host=f"http://127.0.0.1:{port}")))
    subject = Watched(api, namespace, relist_s)
    tasks = [asyncio.create_task(own.run()) for own in subject.copies.values()]
    try:
        await subject.until(lambda: all(c.synced.is_set() for c in subject.copies.values()))
        await subject.until(server.is_watched)
        yield subject
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await api.close()
        await runner.cleanup()


async def test_copies_follow_the_custom_resources() -> None:
    server = Apiserver()
    server.put("models", "a", size=1)
    async with watched(server) as subject:
        server.put("models", "b", size=2)
        server.put("models", "a", size=3)
        await subject.until(lambda: subject.models() == {"a": {"size": 3}, "b": {"size": 2}})
        server.drop("models", "b")
        await subject.until(lambda: subject.models() == {"a": {"size": 3}})

    assert sorted(subject.told) == ["a", "a", "b", "b"]


@pytest.mark.parametrize("namespace", [None, "default"])
async def test_watching_needs_no_right_but_list_and_watch(namespace: str | None) -> None:
    """No definitions, namespaces or Events; nothing is ever written."""
    server = Apiserver()
    async with watched(server, namespace) as subject:
        server.put("models", "a", size=1)
        await subject.until(lambda: subject.models() == {"a": {"size": 1}})

    where = f"{GROUP}/namespaces/{namespace}" if namespace else GROUP
    wanted = {f"{where}/{plural}" for plural in PLURALS}
    assert {path for _, path in server.requests} == wanted
    assert {method for method, _ in server.requests} == {"GET"}


async def test_what_was_deleted_while_a_watch_was_down_goes_after_a_410() -> None:
    server = Apiserver()
    server.put("models", "a")
    server.put("models", "b")
    async with watched(server) as subject:
        server.drop("models", "a", silent=True)
        server.drop("models", "b", silent=True)
        server.put("models", "c", silent=True)
        server.expire("models")
        await subject.until(lambda: set(subject.models()) == {"c"})

    assert sorted(subject.told) == ["a", "a", "b", "b", "c"]


async def test_a_cut_watch_goes_on_from_the_last_version() -> None:
    server = Apiserver()
    async with watched(server) as subject:
        server.put("models", "a")
        await subject.until(lambda: set(subject.models()) == {"a"})
        server.cut("models")
        server.put("models", "b", silent=True)  # the fake keeps no history
        await subject.until(lambda: len(server.watched_from) == len(PLURALS) + 1)

    assert server.watched_from[-1] == "2"


async def test_a_refused_list_is_tried_until_it_is_answered() -> None:
    server = Apiserver()
    server.refuse = [500, 429, 403]
    server.put("models", "a")
    async with watched(server) as subject:
        assert set(subject.models()) == {"a"}


async def test_an_event_that_was_lost_is_made_up_for_by_the_next_list() -> None:
    server = Apiserver()
    async with watched(server, relist_s=0.3) as subject:
        server.put("models", "a", silent=True)
        await subject.until(lambda: set(subject.models()) == {"a"})
        server.drop("models", "a", silent=True)
        await subject.until(lambda: subject.models() == {})


async def test_a_broken_stream_is_told_and_taken_up_where_it_was(
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = Apiserver()
    server.put("models", "a")
    with caplog.at_level(logging.WARNING, "tandem.operator"):
        async with watched(server) as subject:
            server.garble("models")
            await subject.until(lambda: len(server.watched_from) > len(PLURALS))
            await subject.until(server.is_watched)
            server.put("models", "b")
            await subject.until(lambda: set(subject.models()) == {"a", "b"})

    assert "Model: watch Model: JSONDecodeError" in caplog.text
    assert server.watched_from[-1] == "2"


async def test_definitions_that_come_later_are_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    class Empty(Apiserver):
        async def answer(self, request: web.Request) -> web.StreamResponse:
            self.plurals = set(PLURALS) if len(self.requests) > 8 else {"models"}
            return await super().answer(request)

    with caplog.at_level(logging.WARNING, "tandem.operator"):
        async with watched(Empty()) as subject:
            assert subject.models() == {}

    assert (
        "Router: GET /apis/tandem.dev/v1alpha1/routers: the resource is not served" in caplog.text
    )
    assert "install the chart" in caplog.text
