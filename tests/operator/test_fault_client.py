"""The client on bad days: cancelled callers, lost leads, events of any size, streams that break."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from kubernetes.aio import client

from tandem_operator.kube import watches
from tandem_operator.kube.cache import Copies
from tandem_operator.kube.client import Gone, KubeApi
from tandem_operator.reconcile.cluster_api import ApiError
from tandem_operator.resources.base import Object

Answer = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]
CONFIG_MAP: Object = {
    "apiVersion": "v1",
    "kind": "ConfigMap",
    "metadata": {"name": "c", "namespace": "n"},
}


@asynccontextmanager
async def served(answer: Answer) -> AsyncIterator[KubeApi]:
    """A KubeApi whose apiserver is a function."""
    runner = web.ServerRunner(web.Server(answer))
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    configuration = client.Configuration()
    configuration.host = f"http://127.0.0.1:{runner.addresses[0][1]}"
    api = KubeApi(client.ApiClient(configuration))
    try:
        yield api
    finally:
        await api.close()
        await runner.cleanup()


async def events(api: KubeApi) -> list[tuple[str, Object]]:
    return [found async for found in api.watch("ConfigMap", None, "", "1")]


async def test_a_write_whose_caller_is_cancelled_is_seen_to_its_end() -> None:
    """Cancelled in the middle it may still take effect, so handing over has to wait for it."""
    arrived, go_on, done = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        await request.read()
        arrived.set()
        await go_on.wait()
        done.set()
        return web.json_response({})

    async with served(answer) as api:
        caller = asyncio.create_task(api.apply(CONFIG_MAP))
        await arrived.wait()
        caller.cancel()
        await asyncio.gather(caller, return_exceptions=True)

        assert not await api.settle(0.01)
        go_on.set()
        assert await api.settle(5.0)
        assert done.is_set()


async def test_who_does_not_lead_sends_no_write_and_may_still_read() -> None:
    methods: list[str] = []

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        methods.append(request.method)
        return web.json_response({"metadata": {}, "items": []})

    async with served(answer) as api:
        api.may_write = lambda: False
        for write in (
            api.apply(CONFIG_MAP),
            api.create(CONFIG_MAP),
            api.delete("ConfigMap", "n", "c"),
            api.patch_spec("ConfigMap", "n", "c", {}),
            api.apply_status({**CONFIG_MAP, "status": {}}),
        ):
            with pytest.raises(ApiError, match="no longer leads"):
                await write
        await api.select("ConfigMap", "n")

    assert methods == ["GET"]


async def test_an_event_may_be_as_large_as_an_object_can_be() -> None:
    """aiohttp reads lines of at most 128 KiB; an object may have 1.5 MiB."""
    large = {**CONFIG_MAP, "data": {"a": "x" * 1_500_000}}

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        lines = [json.dumps({"type": what, "object": large}) for what in ("ADDED", "MODIFIED")]
        return web.Response(body="\n".join([*lines, ""]).encode())

    async with served(answer) as api:
        found = await events(api)

    assert [what for what, _ in found] == ["ADDED", "MODIFIED"]
    assert found[0][1] == large


@pytest.mark.parametrize(
    ("body", "error", "text"),
    [
        (b'{"type": "ERROR", "object": {"code": 410}}\n', Gone, "^$"),
        (b'{"type": "ERROR", "object": {"code": 500, "message": "no"}}\n', ApiError, "no"),
        (b'{"type": "ADDED", "object": {}}\n{"type": "MODI', ApiError, "within an event"),
        (b"<html>\n", ApiError, "watch ConfigMap"),
    ],
)
async def test_a_broken_stream_says_how_it_broke(
    body: bytes, error: type[Exception], text: str
) -> None:
    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(body=body)

    async with served(answer) as api:
        with pytest.raises(error, match=text):
            await events(api)


async def test_a_watch_that_never_ends_does_not_keep_the_others_from_listing_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """kopf's tasks are waited for, but not for ever: custom resources would go unseen."""
    spawned: list[asyncio.Task[None]] = []
    third = asyncio.Event()

    async def stubborn() -> None:
        while True:
            with contextlib.suppress(asyncio.CancelledError):
                await third.wait()
                return

    async def spawn_tasks(**_: Any) -> list[asyncio.Task[None]]:
        spawned.append(asyncio.create_task(stubborn()))
        if len(spawned) == 3:
            third.set()
        return spawned[-1:]

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        return web.json_response({"resources": [{"name": "models"}]})

    monkeypatch.setattr(watches.kopf, "spawn_tasks", spawn_tasks)
    monkeypatch.setattr(watches, "STOP_S", 0.01)
    async with served(answer) as api:
        copies = {"Model": Copies("Model", lambda _: None)}
        subject = watches.CustomResourceWatches(api, (None,), copies, relist_s=0.01)
        running = asyncio.create_task(subject.run())
        async with asyncio.timeout(10.0):
            await third.wait()
        running.cancel()
        await asyncio.gather(running, *spawned, return_exceptions=True)

    assert len(spawned) >= 3
