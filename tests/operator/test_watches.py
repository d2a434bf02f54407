"""Copies on a scripted apiserver, fed by kopf (custom resources) and by label streams (children).

What either asks for, and what its copies hold through every fault.
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from kubernetes.aio import client

from eventually import eventually
from tandem_operator.kube.cache import CUSTOM_KINDS, Copies, KindCache
from tandem_operator.kube.client import KubeApi
from tandem_operator.kube.watches import CustomResourceWatches, ListedCopies
from tandem_operator.reconcile.cluster_api import KIND_INFO
from tandem_operator.resources.base import Object

GROUP = "/apis/tandem.dev/v1alpha1"
CRD_GROUP = "apiextensions.k8s.io"
DISCOVERY = {"/api", "/api/v1", "/apis", f"/apis/{CRD_GROUP}/v1", GROUP}
LABEL = "app.kubernetes.io/managed-by=tandem"
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
        self.selectors: set[str] = set()
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
        if request.path in DISCOVERY:
            return web.json_response(self._discover(request.path))
        plural = request.path.rsplit("/", 1)[-1]
        self.selectors.add(request.query.get("labelSelector", ""))
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

    def _discover(self, path: str) -> Object:
        if path == "/api":
            return {"versions": ["v1"]}
        if path == "/apis":
            return {
                "groups": [
                    {"name": name, "versions": [served], "preferredVersion": served}
                    for name, version in (("tandem.dev", "v1alpha1"), (CRD_GROUP, "v1"))
                    for served in [{"version": version, "groupVersion": f"{name}/{version}"}]
                ]
            }
        kinds = {
            "/api/v1": {"namespaces": "Namespace", "events": "Event"},
            f"/apis/{CRD_GROUP}/v1": {"customresourcedefinitions": "CustomResourceDefinition"},
            GROUP: {p: k for p, k in PLURALS.items() if p in self.plurals},
        }
        return {
            "resources": [
                {
                    "name": plural,
                    "kind": kind,
                    "singularName": kind.lower(),
                    "namespaced": path == GROUP,
                    "verbs": ["get", "list", "watch", "patch"],
                }
                for plural, kind in kinds[path].items()
            ]
        }

    def is_watched(self) -> bool:
        return all(self._watches.values())


class Fed:
    """Copies that a source keeps current, and the names of what they told, in order."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.copies: dict[str, Copies] = {}

    def noticed(self, obj: Object) -> None:
        self.told.append(obj["metadata"]["name"])

    def models(self) -> dict[str, Object]:
        return {o["metadata"]["name"]: o["spec"] for o in self.copies["Model"].select(None, {})}


Run = Callable[[], Coroutine[Any, Any, None]]
Source = Callable[[KubeApi, str | None, float, Fed], list[Run]]


def by_kopf(
    api: KubeApi,
    namespace: str | None,
    relist_s: float,
    fed: Fed,
    restore: Callable[[], None] = lambda: None,
) -> list[Run]:
    """As custom resources are watched."""
    fed.copies = {kind: Copies(kind, fed.noticed, (namespace,)) for kind in CUSTOM_KINDS}
    return [CustomResourceWatches(api, (namespace,), fed.copies, restore, relist_s).run]


def by_label(api: KubeApi, namespace: str | None, relist_s: float, fed: Fed) -> list[Run]:
    """As children are watched."""

    async def soon(_: float) -> None:
        await asyncio.sleep(0)

    caches = {
        kind: KindCache(api, kind, (namespace,), LABEL, fed.noticed, relist_s, sleep=soon)
        for kind in CUSTOM_KINDS
    }
    fed.copies = {**caches}
    return [cache.run for cache in caches.values()]


both = pytest.mark.parametrize("source", [by_kopf, by_label])


@asynccontextmanager
async def running(
    server: Apiserver, source: Source, namespace: str | None = None, relist_s: float = 600.0
) -> AsyncIterator[Fed]:
    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", server.answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    api = KubeApi(client.ApiClient(client.Configuration(host=f"http://127.0.0.1:{port}")))
    subject = Fed()
    tasks = [asyncio.create_task(run()) for run in source(api, namespace, relist_s, subject)]
    try:
        await eventually(lambda: all(c.synced.is_set() for c in subject.copies.values()))
        await eventually(server.is_watched)
        yield subject
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await api.close()
        await runner.cleanup()


@both
async def test_copies_follow_what_changes(source: Source) -> None:
    server = Apiserver()
    server.put("models", "a", size=1)
    async with running(server, source) as subject:
        server.put("models", "b", size=2)
        server.put("models", "a", size=3)
        await eventually(lambda: subject.models() == {"a": {"size": 3}, "b": {"size": 2}})
        server.drop("models", "b")
        await eventually(lambda: subject.models() == {"a": {"size": 3}})

    assert sorted(subject.told) == ["a", "a", "b", "b"]


@both
@pytest.mark.parametrize("namespace", [None, "default"])
async def test_watching_needs_no_right_but_list_and_watch(
    source: Source, namespace: str | None
) -> None:
    """kopf asks what is served, and no more; no definitions, namespaces, peerings or Events."""
    server = Apiserver()
    async with running(server, source, namespace) as subject:
        server.put("models", "a", size=1)
        await eventually(lambda: subject.models() == {"a": {"size": 1}})

    where = f"{GROUP}/namespaces/{namespace}" if namespace else GROUP
    wanted = {f"{where}/{plural}" for plural in PLURALS}
    discovered = DISCOVERY if source is by_kopf else set()
    assert {path for _, path in server.requests} == wanted | discovered
    assert {method for method, _ in server.requests} == {"GET"}
    assert server.selectors == {"" if source is by_kopf else LABEL}


@both
async def test_what_was_deleted_while_a_watch_was_down_goes_after_a_410(source: Source) -> None:
    server = Apiserver()
    server.put("models", "a")
    server.put("models", "b")
    async with running(server, source) as subject:
        server.drop("models", "a", silent=True)
        server.drop("models", "b", silent=True)
        server.put("models", "c", silent=True)
        server.expire("models")
        await eventually(lambda: set(subject.models()) == {"c"})

    assert sorted(subject.told) == ["a", "a", "b", "b", "c"]


@both
async def test_a_cut_watch_goes_on_from_the_last_version(source: Source) -> None:
    server = Apiserver()
    async with running(server, source) as subject:
        server.put("models", "a")
        await eventually(lambda: set(subject.models()) == {"a"})
        server.cut("models")
        server.put("models", "b", silent=True)  # the fake keeps no history
        await eventually(lambda: len(server.watched_from) == len(PLURALS) + 1)

    assert server.watched_from[-1] == "2"


@both
async def test_a_refused_list_is_tried_until_it_is_answered(source: Source) -> None:
    server = Apiserver()
    server.refuse = [500, 429, 403]
    server.put("models", "a")
    async with running(server, source) as subject:
        assert set(subject.models()) == {"a"}


@both
async def test_an_event_that_was_lost_is_made_up_for_by_the_next_list(source: Source) -> None:
    server = Apiserver()
    async with running(server, source, relist_s=0.3) as subject:
        server.put("models", "a", silent=True)
        await eventually(lambda: set(subject.models()) == {"a"})
        server.drop("models", "a", silent=True)
        await eventually(lambda: subject.models() == {})


async def test_a_broken_stream_of_a_kind_is_told_and_taken_up_where_it_was(
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = Apiserver()
    server.put("models", "a")
    with caplog.at_level(logging.WARNING, "tandem.operator"):
        async with running(server, by_label) as subject:
            server.garble("models")
            await eventually(lambda: len(server.watched_from) > len(PLURALS))
            await eventually(server.is_watched)
            server.put("models", "b")
            await eventually(lambda: set(subject.models()) == {"a", "b"})

    assert "Model: watch Model: JSONDecodeError" in caplog.text
    assert server.watched_from[-1] == "2"


async def test_a_broken_stream_of_kopf_is_told_and_everything_is_listed_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = Apiserver()
    server.put("models", "a")
    with caplog.at_level(logging.WARNING, "tandem.operator"):
        async with running(server, by_kopf) as subject:
            server.drop("models", "a", silent=True)
            server.put("models", "b", silent=True)
            server.garble("models")
            await eventually(lambda: set(subject.models()) == {"b"})

    assert "kopf ended: JSONDecodeError" in caplog.text


async def test_tasks_of_others_go_on_when_kopf_ends() -> None:
    """kopf's own way to end cancels every task that is younger than itself."""
    server = Apiserver()
    async with running(server, by_kopf) as subject:
        other = asyncio.create_task(asyncio.Event().wait())
        server.garble("models")
        server.put("models", "b", silent=True)
        await eventually(lambda: set(subject.models()) == {"b"})

        assert not other.done()
        other.cancel()


async def test_definitions_that_come_later_are_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    class Empty(Apiserver):
        async def answer(self, request: web.Request) -> web.StreamResponse:
            asked = self.requests.count(("GET", GROUP))
            self.plurals = set(PLURALS) if asked else {"models"}
            return await super().answer(request)

    with caplog.at_level(logging.WARNING, "tandem.operator"):
        async with running(Empty(), by_kopf) as subject:
            assert subject.models() == {}

    assert "definitions of Router, AutoscalingPolicy, WorkerPool are missing" in caplog.text


async def test_the_signal_handlers_of_the_process_are_put_back() -> None:
    calls: list[str] = []
    source = functools.partial(by_kopf, restore=lambda: calls.append("restored"))
    async with running(Apiserver(), source):
        assert calls == ["restored"]


# The order of lists and events ----------------------------------------------------------------


def page(version: int, *items: Object, more: str = "") -> Object:
    return {"items": list(items), "metadata": {"resourceVersion": str(version), "continue": more}}


def listed() -> tuple[ListedCopies, Copies]:
    copies = Copies("Model", lambda _: None)
    return ListedCopies(copies), copies


def names(copies: Copies) -> list[str]:
    return [o["metadata"]["name"] for o in copies.select(None, {})]


def test_an_event_of_before_the_list_does_not_bring_an_object_back() -> None:
    subject, copies = listed()
    subject.page(page(9, resource("a", 3)), first=True)

    subject.event("MODIFIED", resource("gone", 8))
    subject.event("ADDED", resource("new", 10))

    assert names(copies) == ["a", "new"]


def test_the_late_end_of_an_object_does_not_remove_the_next_one_of_its_name() -> None:
    subject, copies = listed()
    subject.page(page(5, resource("a", 4)), first=True)

    subject.event("ADDED", resource("a", 10))
    subject.event("DELETED", resource("a", 9))
    assert names(copies) == ["a"]
    subject.event("DELETED", resource("a", 11))

    assert names(copies) == []


def test_a_list_counts_once_its_last_page_is_there() -> None:
    subject, copies = listed()
    subject.page(page(5, resource("old", 1)), first=True)

    subject.page(page(9, resource("a", 3), more="x"), first=True)
    assert names(copies) == ["old"]
    subject.page(page(9, resource("b", 4)), first=False)

    assert names(copies) == ["a", "b"]


def test_a_list_that_breaks_off_starts_over() -> None:
    subject, copies = listed()

    subject.page(page(9, resource("a", 3), more="x"), first=True)
    subject.page(page(12, resource("b", 4)), first=True)

    assert names(copies) == ["b"]


def test_a_list_of_one_namespace_says_nothing_of_the_others() -> None:
    def model(namespace: str, version: str) -> Object:
        metadata = {"name": "m", "namespace": namespace, "resourceVersion": version}
        return {"kind": "Model", "metadata": metadata, "spec": {}}

    copies = Copies("Model", lambda _: None, ("a", "b"))
    copies.replace([model("a", "1")], "a")
    assert not copies.synced.is_set()
    copies.replace([model("b", "2")], "b")
    assert copies.synced.is_set()

    copies.replace([], "b")

    assert [o["metadata"]["namespace"] for o in copies.select(None, {})] == ["a"]
