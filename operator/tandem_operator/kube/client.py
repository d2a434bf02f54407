"""The calls that the operator makes to an apiserver, over kubernetes.aio, on plain objects.

The generated model classes are left out: they drop fields that they do not know and cost more than
the calls themselves.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Mapping
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
from kubernetes.aio import client, config
from kubernetes.aio.client.exceptions import ApiException

from tandem_operator.kube.nested_json import read_json
from tandem_operator.reconcile.cluster_api import FIELD_MANAGER, KIND_INFO, SEED_MANAGER, ApiError
from tandem_operator.resources.base import Object

PAGE = 500
WATCH_S = 300
CALL_TIMEOUT_S = 30.0
METADATA_ONLY = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"
METADATA_LIST = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"


class Gone(Exception):
    """The apiserver no longer knows the version to watch from; list again."""


async def connect(kubeconfig: str | None = None) -> client.ApiClient:
    """A client from the pod's ServiceAccount, or from a kubeconfig outside a cluster.

    Raises ApiError 0 when neither works.
    """
    configuration = client.Configuration()
    # Above the number of reconciles at the same time plus one watch per kind.
    configuration.connection_pool_maxsize = 64
    try:
        if kubeconfig is None and "KUBERNETES_SERVICE_HOST" in os.environ:
            config.load_incluster_config(client_configuration=configuration)
        else:
            await config.load_kube_config(
                config_file=kubeconfig, client_configuration=configuration
            )
    except (config.ConfigException, OSError) as error:
        raise ApiError(0, f"no access to a cluster: {error}; set KUBECONFIG") from error
    # aiohttp would ask the environment and .netrc in a thread, twice per request.
    configuration.client_session_kwargs = {"trust_env": False}
    server = urlsplit(str(configuration.host))
    if configuration.proxy is None and not proxy_bypass(server.hostname or ""):
        configuration.proxy = getproxies().get(server.scheme)
    return client.ApiClient(configuration)


class KubeApi:
    """A ClusterApi over a real apiserver."""

    def __init__(self, api_client: client.ApiClient, user_agent: str = FIELD_MANAGER) -> None:
        self._client = api_client
        self._client.set_default_header("User-Agent", user_agent)
        self._user_agent = user_agent
        self.num_writes = 0
        self.num_reads = 0
        self._writing: set[asyncio.Future[Object]] = set()
        # Asked before each write; with an election only the leader may.
        self.may_write: Callable[[], bool] = lambda: True

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    async def served(self) -> frozenset[str]:
        """Plurals of the custom resources that the apiserver knows."""
        self.num_reads += 1
        try:
            found = await self._call("GET", KIND_INFO["Model"].path)
        except ApiError as error:
            if error.status == 404:
                return frozenset()
            raise
        return frozenset(r["name"] for r in found["resources"] if "/" not in r["name"])

    @property
    def server(self) -> str:
        """URL of the apiserver."""
        return str(self._client.configuration.host)

    def session(self, middleware: aiohttp.ClientMiddlewareType) -> aiohttp.ClientSession:
        """A session of its own for another client, which asks the middleware at each request."""
        configuration = self._client.configuration
        connector = aiohttp.TCPConnector(limit=0, ssl=self._client.rest_client.ssl_context)
        return aiohttp.ClientSession(
            connector=connector,
            proxy=configuration.proxy,
            headers={"User-Agent": self._user_agent},
            middlewares=(middleware,),
        )

    async def authorization(self) -> dict[str, str]:
        """The header that authenticates a request now; a pod's token changes every hour."""
        token = await self._client.configuration.get_api_key_with_prefix(
            "BearerToken", alias="authorization"
        )
        return {"Authorization": token} if token else {}

    async def get(self, kind: str, namespace: str, name: str) -> Object | None:
        """See ClusterApi."""
        self.num_reads += 1
        try:
            return await self._call("GET", path(kind, namespace, name))
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    async def named(self, kind: str, namespace: str, name: str) -> Object | None:
        """See ClusterApi. A list of one, because lists are all that the operator may read."""
        self.num_reads += 1
        query = {"fieldSelector": f"metadata.name={name}"}
        page = await self._call("GET", path(kind, namespace), query)
        for item in page.get("items") or []:
            return {**item, "kind": kind, "apiVersion": KIND_INFO[kind].api_version}
        return None

    async def version(self, kind: str, namespace: str, name: str) -> str | None:
        """See ClusterApi. A list of one, without the content."""
        self.num_reads += 1
        query = {"fieldSelector": f"metadata.name={name}"}
        page = await self._call("GET", path(kind, namespace), query, accept=METADATA_LIST)
        for item in page.get("items") or []:
            return str(item["metadata"]["resourceVersion"])
        return None

    async def secret_labels(self, namespace: str, name: str) -> Mapping[str, str] | None:
        """See ClusterApi."""
        self.num_reads += 1
        try:
            found = await self._call("GET", path("Secret", namespace, name), accept=METADATA_ONLY)
        except ApiError as error:
            if error.status == 404:
                return None
            raise
        labels: Mapping[str, str] = found["metadata"].get("labels") or {}
        return labels

    async def select(
        self, kind: str, namespace: str | None = None, labels: Mapping[str, str] | None = None
    ) -> list[Object]:
        """See ClusterApi."""
        selector = ",".join(f"{k}={v}" for k, v in (labels or {}).items())
        items, _ = await self.list_page(kind, namespace, selector)
        return items

    async def list_page(
        self, kind: str, namespace: str | None, selector: str
    ) -> tuple[list[Object], str]:
        """All objects and the version of the list, page by page."""
        items: list[Object] = []
        query: dict[str, str] = {"limit": str(PAGE)}
        if selector:
            query["labelSelector"] = selector
        while True:
            self.num_reads += 1
            page = await self._call("GET", path(kind, namespace), query)
            info = KIND_INFO[kind]
            for item in page.get("items") or []:
                item["kind"], item["apiVersion"] = kind, info.api_version
                items.append(item)
            more = page["metadata"].get("continue")
            if not more:
                return items, page["metadata"].get("resourceVersion", "")
            query["continue"] = more

    async def watch(
        self, kind: str, namespace: str | None, selector: str, version: str
    ) -> AsyncIterator[tuple[str, Object]]:
        """Changes since a version, until the server ends the stream; bookmarks included.

        Raises Gone when the version is too old and ApiError when the stream breaks.
        """
        query = {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": version,
            "timeoutSeconds": str(WATCH_S),
        }
        if selector:
            query["labelSelector"] = selector
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=WATCH_S + 30)
        response = await self._send("GET", path(kind, namespace), query, None, None, timeout)
        try:
            if response.status == 410:
                raise Gone
            if response.status >= 400:
                raise ApiError(response.status, f"watch {kind}: {response.reason}")
            async for line in _lines(response.content):
                event = read_json(line)
                obj = event["object"]
                if event["type"] == "ERROR":
                    if obj.get("code") == 410:
                        raise Gone
                    raise ApiError(int(obj.get("code") or 0), str(obj.get("message")))
                yield event["type"], obj
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise ApiError(0, f"watch {kind}: {error!r}") from error
        finally:
            response.close()

    async def apply(self, obj: Object) -> Object:
        """See ClusterApi."""
        return await self._apply(obj, "")

    async def apply_status(self, obj: Object) -> Object:
        """See ClusterApi."""
        metadata = obj["metadata"]
        body = {
            "apiVersion": obj.get("apiVersion") or KIND_INFO[obj["kind"]].api_version,
            "kind": obj["kind"],
            "metadata": {"name": metadata["name"], "namespace": metadata["namespace"]},
            "status": obj["status"],
        }
        return await self._apply(body, "/status")

    async def _apply(self, obj: Object, subresource: str) -> Object:
        metadata = obj["metadata"]
        target = path(obj["kind"], metadata["namespace"], metadata["name"]) + subresource
        # A new object is nobody's: one that somebody made meanwhile is not taken over.
        new = not subresource and "uid" not in metadata
        query = {"fieldManager": FIELD_MANAGER, "force": "false" if new else "true"}
        return await self.write("PATCH", target, query, obj, "application/apply-patch+yaml")

    async def create(self, obj: Object) -> Object | None:
        """See ClusterApi."""
        target = path(obj["kind"], obj["metadata"]["namespace"])
        try:
            return await self.write("POST", target, {"fieldManager": SEED_MANAGER}, obj)
        except ApiError as error:
            if error.status == 409:
                return None
            raise

    async def replace(self, obj: Object) -> Object:
        """Write the whole object; ApiError 409 when someone else wrote since it was read."""
        metadata = obj["metadata"]
        target = path(obj["kind"], metadata["namespace"], metadata["name"])
        return await self.write("PUT", target, {}, obj)

    async def patch_spec(self, kind: str, namespace: str, name: str, spec: Object) -> Object:
        """See ClusterApi."""
        return await self.write(
            "PATCH",
            path(kind, namespace, name),
            {"fieldManager": SEED_MANAGER},
            {"spec": spec},
            "application/merge-patch+json",
        )

    async def merge(self, kind: str, namespace: str, name: str, body: Object) -> bool:
        """See ClusterApi."""
        query, target = {"fieldManager": SEED_MANAGER}, path(kind, namespace, name)
        try:
            await self.write("PATCH", target, query, body, "application/merge-patch+json")
        except ApiError as error:
            if error.status != 404:
                raise
            return False
        return True

    async def patch_secret(self, namespace: str, name: str, body: Object) -> None:
        """See ClusterApi."""
        query = {"fieldManager": SEED_MANAGER}
        target = path("Secret", namespace, name)
        await self.write("PATCH", target, query, body, "application/merge-patch+json")

    async def annotate(
        self, kind: str, namespace: str, name: str, annotations: Mapping[str, str]
    ) -> None:
        """See ClusterApi."""
        await self.merge(kind, namespace, name, {"metadata": {"annotations": dict(annotations)}})

    async def delete(self, kind: str, namespace: str, name: str) -> None:
        """See ClusterApi."""
        try:
            await self.write(
                "DELETE", path(kind, namespace, name), {"propagationPolicy": "Background"}, None
            )
        except ApiError as error:
            if error.status != 404:
                raise

    async def write(
        self,
        method: str,
        target: str,
        query: Mapping[str, str],
        body: Object | None,
        content_type: str = "application/json",
    ) -> Object:
        """Any one write, counted, and seen to its end when its caller is cancelled."""
        self.num_writes += 1
        # Who is cancelled here leaves a request that may still take effect: it is seen to its end.
        call = asyncio.ensure_future(self._call(method, target, query, body, content_type))
        self._writing.add(call)
        call.add_done_callback(self._written)
        return await asyncio.shield(call)

    def _written(self, call: asyncio.Future[Object]) -> None:
        self._writing.discard(call)
        if not call.cancelled():
            call.exception()  # its caller has it, or was cancelled and does not want it

    async def settle(self, timeout_s: float) -> bool:
        """Wait until no write is under way; False when one still is after the timeout."""
        if self._writing:
            await asyncio.wait(set(self._writing), timeout=timeout_s)
        return not self._writing

    async def _call(
        self,
        method: str,
        target: str,
        query: Mapping[str, str] | None = None,
        body: Object | None = None,
        content_type: str = "application/json",
        accept: str = "application/json",
    ) -> Object:
        timeout = aiohttp.ClientTimeout(total=CALL_TIMEOUT_S)
        response = await self._send(
            method, target, query or {}, body, content_type, timeout, accept
        )
        try:
            data = await response.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise ApiError(0, f"{method} {target}: {error!r}") from error
        try:
            parsed = read_json(data) if data else {}
        except ValueError as error:
            raise ApiError(response.status, f"{method} {target}: the reply is cut") from error
        if response.status >= 400:
            message = parsed.get("message") if isinstance(parsed, dict) else None
            raise ApiError(response.status, f"{method} {target}: {message or response.reason}")
        found: Object = parsed
        return found

    async def _send(
        self,
        method: str,
        target: str,
        query: Mapping[str, str],
        body: Object | None,
        content_type: str | None,
        timeout: aiohttp.ClientTimeout,
        accept: str = "application/json",
    ) -> aiohttp.ClientResponse:
        headers: dict[str, str] = {"Accept": accept}
        if content_type is not None:
            headers["Content-Type"] = content_type
        try:
            _, url, full, _, _ = await self._client.param_serialize(
                method,
                target,
                query_params=list(query.items()),
                header_params=headers,
                auth_settings=["BearerToken"],
            )
            # As late as can be: between this line and the socket nothing waits, as long as there
            # is a free connection.
            if method != "GET" and not self.may_write():
                raise ApiError(0, f"{method} {target}: not sent, this replica no longer leads")
            answer = await self._client.call_api(
                method, url, header_params=full, body=body, _request_timeout=timeout
            )
        except ApiException as error:
            raise ApiError(int(error.status or 0), f"{method} {target}: {error.reason}") from error
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise ApiError(0, f"{method} {target}: {error!r}") from error
        response: aiohttp.ClientResponse = answer.response
        return response


async def _lines(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """Whole lines of any length: aiohttp's own stop at 128 KiB, an object may have 1.5 MiB."""
    parts: list[bytes] = []
    async for chunk in content.iter_any():
        *whole, rest = chunk.split(b"\n")
        for line in whole:
            yield b"".join([*parts, line])
            parts.clear()
        parts.append(rest)
    if any(parts):
        raise aiohttp.ClientPayloadError("the stream ended within an event")


def path(kind: str, namespace: str | None, name: str | None = None) -> str:
    """The API path of a kind, a namespace's objects of that kind, or one object."""
    info = KIND_INFO[kind]
    parts = [info.path]
    if namespace is not None:
        parts.append(f"namespaces/{namespace}")
    parts.append(info.plural)
    if name is not None:
        parts.append(name)
    return "/".join(parts)
