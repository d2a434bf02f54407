"""kopf watches the custom resources: its events feed the copies that reconciles read.

kopf runs inside the operator's event loop, with a registry and settings of its own. It lists and
watches the four kinds and does nothing else: no peering, no finalizers, no annotations, no Events,
no scan for new definitions or namespaces, so that it needs no right but list and watch.

Its handlers say what changed, and never that an object went while a watch was down: after a 410
kopf lists again and calls handlers for what it finds. So each list is read on its way to kopf and
replaces all copies of its kind.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import kopf

from tandem_operator.kube.cache import RELIST_S, RETRY_FIRST_S, RETRY_MAX_S, Copies, Namespaces
from tandem_operator.kube.client import PAGE, WATCH_S, KubeApi, path
from tandem_operator.kube.nested_json import ReadableLines, readable
from tandem_operator.reconcile.cluster_api import KIND_INFO
from tandem_operator.resources.base import Object

logger = logging.getLogger("tandem.operator")

# kopf itself takes two seconds to let go of streams that are not read to their end.
STOP_S = 5.0
_KOPF = Path(kopf.__file__).parent


class Backoffs:
    """Seconds between two tries of a request, without an end: kopf gives up after the last one."""

    def __iter__(self) -> Iterator[float]:
        delay = RETRY_FIRST_S
        while True:
            yield delay
            delay = min(2 * delay, RETRY_MAX_S)


class NoDiffs(kopf.DiffBaseStorage):  # type: ignore[misc]  # kopf has no types here
    """kopf compares each object with its last state; nobody asks here, and it costs two copies."""

    def build(self, **_: Any) -> kopf.BodyEssence:
        """What is compared: nothing."""
        return kopf.BodyEssence({})

    def fetch(self, **_: Any) -> kopf.BodyEssence | None:
        """What was stored: nothing."""
        return None

    def store(self, **_: Any) -> None:
        """Stores nothing."""


class ListedCopies:
    """Puts lists and events of one kind, of a namespace or all, into its copies, by version."""

    def __init__(self, copies: Copies, namespace: str | None = None) -> None:
        self._copies = copies
        self._namespace = namespace
        self._pages: list[Object] = []
        self._version = 0

    def page(self, page: Object, first: bool) -> None:
        """Take one page of a list; with the last one the list replaces the copies."""
        if first:
            self._pages = []
        self._pages += page.get("items") or []
        metadata = page["metadata"]
        if not metadata.get("continue"):
            items, self._pages = self._pages, []
            self._version = int(metadata["resourceVersion"])
            self._copies.replace(items, self._namespace)

    def event(self, what: str | None, obj: Object) -> None:
        """Take one event; those of before the list, and kopf's own for its items, say no news.

        kopf handles objects side by side, by uid: the end of one may come after the beginning of
        the next of its name.
        """
        metadata = obj["metadata"]
        version = int(metadata["resourceVersion"])
        if what is None or version <= self._version:
            return
        known = self._copies.get(metadata["namespace"], metadata["name"])
        if known is None or int(known["metadata"]["resourceVersion"]) <= version:
            self._copies.take(what, obj)


def kopf_settings() -> kopf.OperatorSettings:
    """kopf as a watcher and no more."""
    settings = kopf.OperatorSettings()
    settings.peering.standalone = True
    settings.posting.enabled = False
    settings.scanning.disabled = True
    settings.process.ultimate_exiting_timeout = None
    settings.networking.error_backoffs = Backoffs()
    settings.networking.connect_timeout = 10.0
    settings.networking.request_timeout = 30.0
    settings.watching.server_timeout = WATCH_S
    settings.watching.chunk_size = PAGE
    settings.queueing.idle_timeout = 1.0
    settings.persistence.diffbase_storage = NoDiffs()
    return settings


class CustomResourceWatches:
    """Runs kopf on the kinds of `copies`, in some namespaces or in all.

    restore_signals: called once kopf has put its own handlers in place of the process'.
    relist_s: kopf starts again after this time, because it lists only when it starts or is told
    to, and an event that never came leaves no trace in a watch.
    """

    def __init__(
        self,
        api: KubeApi,
        namespaces: Namespaces,
        copies: Mapping[str, Copies],
        restore_signals: Callable[[], None] = lambda: None,
        relist_s: float = RELIST_S,
    ) -> None:
        self._api = api
        self._relist_s = relist_s
        self._namespaces = namespaces
        self._restore_signals = restore_signals
        self._listed = {
            kind: {namespace: ListedCopies(own, namespace) for namespace in namespaces}
            for kind, own in copies.items()
        }
        self._paths = {
            path(kind, namespace): listed
            for kind, by_namespace in self._listed.items()
            for namespace, listed in by_namespace.items()
        }

    async def run(self) -> None:
        """Keep the copies current until cancelled; what ends kopf is logged and it starts again."""
        delay = RETRY_FIRST_S
        while True:
            began = time.monotonic()
            try:
                missing = await self._missing()
                if not missing:
                    await self._host()
                    continue
                problem = f"definitions of {', '.join(missing)} are missing; install the chart"
            except Exception as error:
                # kopf gives up on a watch for many reasons; the next list puts everything right.
                problem = f"kopf ended: {error!r}"
            if time.monotonic() - began > RETRY_MAX_S:
                delay = RETRY_FIRST_S
            logger.warning("custom resources: %s; again in %.1f s", problem, delay)
            await asyncio.sleep(delay)
            delay = min(2 * delay, RETRY_MAX_S)

    async def _missing(self) -> list[str]:
        """kopf looks once which kinds there are, so that all have to be there before."""
        served = await self._api.served()
        return [k for k in self._listed if KIND_INFO[k].plural not in served]

    async def _host(self) -> None:
        """Run kopf until it is time to list again. Raises what one of its tasks raised."""
        chosen = [namespace for namespace in self._namespaces if namespace is not None]
        # Not kopf.operator(): at its end it cancels every task of the loop younger than itself.
        tasks = await kopf.spawn_tasks(
            registry=self._registry(),
            settings=kopf_settings(),
            clusterwide=not chosen,
            namespaces=chosen,
        )
        self._restore_signals()
        try:
            done, _ = await asyncio.wait(
                tasks, timeout=self._relist_s, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            # A watch that fails leaves those of the other kinds behind.
            left = {*tasks, *filter(_is_kopfs, asyncio.all_tasks())}
            for task in left:
                task.cancel()
            # A cancelled watch of kopf may wait for ever for a scheduler that has ended already.
            # It reads no more, so it is left behind rather than waited for.
            _, stuck = await asyncio.wait(left, timeout=STOP_S)
            if stuck:
                names = ", ".join(sorted(t.get_name() for t in stuck))
                logger.warning("kopf: left behind after %.0f s: %s", STOP_S, names)
        for task in done:
            task.result()
        if done:
            names = ", ".join(sorted(t.get_name() for t in done))
            raise RuntimeError(f"its tasks ended by themselves: {names}")

    def _registry(self) -> kopf.OperatorRegistry:
        registry = kopf.OperatorRegistry()
        kopf.on.login(registry=registry)(self._login)
        for kind, listed in self._listed.items():
            info = KIND_INFO[kind]
            group, version = info.api_version.split("/")
            handler = _handler(listed)
            kopf.on.event(group, version, info.plural, id=kind, registry=registry)(handler)
        return registry

    async def _login(self, **_: Any) -> kopf.AiohttpSession:
        return kopf.AiohttpSession(
            server=self._api.server, aiohttp_session=self._api.session(self._request)
        )

    async def _request(
        self, request: aiohttp.ClientRequest, send: aiohttp.ClientHandlerType
    ) -> aiohttp.ClientResponse:
        request.headers.update(await self._api.authorization())
        response = await send(request)
        listed = self._paths.get(request.url.path)
        if listed is None or response.status != 200:
            return response
        if "watch" in request.url.query:
            response.content = ReadableLines(response.content)  # type: ignore[assignment]
            return response
        self._api.num_reads += 1
        data = response._body = readable(await response.read())  # which kopf reads after us
        listed.page(json.loads(data), first="continue" not in request.url.query)
        return response


def _is_kopfs(task: asyncio.Task[Any]) -> bool:
    code = getattr(task.get_coro(), "cr_code", None)
    return code is not None and Path(code.co_filename).is_relative_to(_KOPF)


def _handler(listed: Mapping[str | None, ListedCopies]) -> Callable[..., Any]:
    async def changed(event: Mapping[str, Any], **_: Any) -> None:
        obj = event["object"]
        own = listed.get(None) or listed[obj["metadata"]["namespace"]]
        own.event(event["type"], obj)

    return changed
