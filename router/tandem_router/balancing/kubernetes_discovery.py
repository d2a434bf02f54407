"""Workers from Kubernetes: watch the EndpointSlices of one Service per tier and role.

List once, then watch from that resource version; a 410 or any break lists again. The table is
rebuilt from the slices at hand after every event, so a missed event costs one re-list, never a
wrong table. Unready and terminating addresses are left out.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import ssl
from collections.abc import Awaitable, Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tandem_router.balancing.file_discovery import EndpointTable
from tandem_router.config import EndpointSliceEndpoints, ServiceRef
from tandem_router.errors import ConfigError, UpstreamError
from tandem_router.http.client import UpstreamClient
from tandem_router.http.response import Response

logger = logging.getLogger("tandem.router")

SERVICE_LABEL = "kubernetes.io/service-name"
# The API server ends a watch after a while; asking for less than our own stall limit keeps a
# silent connection from looking dead.
WATCH_TIMEOUT_S = 240
FIRST_RETRY_S = 0.5
MAX_RETRY_S = 15.0
# A watch that ends before this and told nothing would otherwise be asked for without a pause.
SHORT_WATCH_S = 1.0


def table_of(slices: Iterable[Mapping[str, Any]], services: Iterable[ServiceRef]) -> EndpointTable:
    """The endpoint table that these EndpointSlice objects mean. Pure."""
    wanted = {ref.service: ref for ref in services}
    table: dict[str, dict[Any, list[str]]] = {}
    for item in slices:
        labels = item.get("metadata", {}).get("labels") or {}
        ref = wanted.get(labels.get(SERVICE_LABEL, ""))
        if ref is None:
            continue
        port = next(
            (
                entry["port"]
                for entry in item.get("ports") or []
                if entry.get("port") and entry.get("name") in ("http", "", None)
            ),
            ref.port,
        )
        urls = table.setdefault(ref.tier, {}).setdefault(ref.role, [])
        for endpoint in item.get("endpoints") or []:
            conditions = endpoint.get("conditions") or {}
            # Absent means ready by the API's definition.
            if conditions.get("ready") is False or conditions.get("terminating"):
                continue
            for address in endpoint.get("addresses") or []:
                host = f"[{address}]" if ":" in address else address
                urls.append(f"http://{host}:{port}")
    return {
        tier: {role: tuple(sorted(set(urls))) for role, urls in roles.items()}
        for tier, roles in table.items()
    }


class _Api:
    """Where the API server is and how to speak to it."""

    def __init__(self, config: EndpointSliceEndpoints) -> None:
        folder = Path(config.credentials_dir)
        self._token_file = folder / "token"
        base = config.api_url
        if base is None:
            host = os.environ.get("KUBERNETES_SERVICE_HOST")
            port = os.environ.get("KUBERNETES_SERVICE_PORT", "443")
            if not host:
                raise ConfigError(
                    "endpoints.type=endpointslice needs KUBERNETES_SERVICE_HOST (it is set in "
                    "every pod) or endpoints.api_url"
                )
            base = f"https://{f'[{host}]' if ':' in host else host}:{port}"
        self.base = base.rstrip("/")
        authority = folder / "ca.crt"
        tls = None
        if self.base.startswith("https://"):
            tls = ssl.create_default_context(cafile=str(authority) if authority.exists() else None)
        self.client = UpstreamClient(
            connect_timeout_s=5.0, stall_timeout_s=WATCH_TIMEOUT_S + 30.0, tls=tls
        )

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Read each time: projected tokens rotate."""
        headers = [(b"accept", b"application/json"), (b"user-agent", b"tandem-router")]
        try:
            token = self._token_file.read_text().strip()
        except OSError:
            return headers
        return [*headers, (b"authorization", b"Bearer " + token.encode())]

    async def get(self, path: str) -> Response:
        response = await self.client.request("GET", self.base + path, headers=self.headers())
        if response.status != 200:
            body = await response.read_all(1 << 20)
            raise UpstreamError(
                f"GET {path} answered {response.status}: {body[:300].decode(errors='replace')}"
            )
        return response


class _Expired(Exception):
    """The resource version is too old (410): list again."""


async def watch_slices(
    config: EndpointSliceEndpoints,
    on_table: Callable[[EndpointTable], None],
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> None:
    """Hand over the table after every change; runs until cancelled."""
    if not config.services:
        on_table({})
        return
    api = _Api(config)
    names = ",".join(sorted({ref.service for ref in config.services}))
    selector = quote(f"{SERVICE_LABEL} in ({names})", safe="")
    path = (
        f"/apis/discovery.k8s.io/v1/namespaces/{config.namespace}/endpointslices"
        f"?labelSelector={selector}"
    )
    retry_s = FIRST_RETRY_S
    slices: dict[str, Any] = {}
    version = ""
    clock = asyncio.get_running_loop().time
    try:
        while True:
            began, news, failed = clock(), False, False
            try:
                if not version:
                    listed = json.loads(await (await api.get(path + "&limit=0")).read_all())
                    slices = {item["metadata"]["name"]: item for item in listed.get("items") or []}
                    on_table(table_of(slices.values(), config.services))
                    version = listed["metadata"]["resourceVersion"]
                newest = await _watch(api, path, version, slices, config, on_table)
                news, version = newest != version, newest
                problem = "the watch ended at once; again"
            except _Expired:
                version, problem = "", "the listed version is gone at once; listing again"
            except (UpstreamError, ValueError, KeyError) as error:
                failed, version, problem = True, "", f"{error}; listing again"
            useful = news or clock() - began >= SHORT_WATCH_S
            if useful:
                retry_s = FIRST_RETRY_S
            if failed or not useful:
                logger.warning("EndpointSlices: %s in %.1f s", problem, retry_s)
                await sleep(retry_s)
                retry_s = min(MAX_RETRY_S, retry_s * 2.0)
    finally:
        api.client.close()


async def _watch(
    api: _Api,
    path: str,
    version: str,
    slices: dict[str, Any],
    config: EndpointSliceEndpoints,
    on_table: Callable[[EndpointTable], None],
) -> str:
    """One watch until the server ends it; the newest resource version seen."""
    response = await api.get(
        f"{path}&watch=1&allowWatchBookmarks=true&timeoutSeconds={WATCH_TIMEOUT_S}"
        f"&resourceVersion={quote(version, safe='')}"
    )
    tail = b""
    try:
        while data := await response.read_some():
            *lines, tail = (tail + data).split(b"\n")
            changed = False
            for line in lines:
                if not line.strip():
                    continue
                event = json.loads(line)
                item = event["object"]
                if event["type"] == "ERROR":
                    if item.get("code") == 410:
                        raise _Expired
                    raise UpstreamError(f"watch: {item.get('message', 'error')}")
                version = item["metadata"]["resourceVersion"]
                if event["type"] == "DELETED":
                    slices.pop(item["metadata"]["name"], None)
                    changed = True
                elif event["type"] != "BOOKMARK":
                    slices[item["metadata"]["name"]] = item
                    changed = True
            if changed:
                on_table(table_of(slices.values(), config.services))
    finally:
        response.close()
    return version
