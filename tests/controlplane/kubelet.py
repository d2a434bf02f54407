"""A node whose containers are processes: plays kubelet for the real control plane.

It registers a Node, renews its Lease, watches the pods bound to it, runs them with the process
handling that `tandem up` uses (`tandem_operator.node`), reports their status, and deletes a pod
once its processes have ended; `kubelet_server.py` answers `kubectl logs`, `exec` and
`port-forward`. Pods get addresses 10.77.N.x or fd77::N:x (`network.py`), which are reachable inside
the cluster's network namespace.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import ssl
import sys
import time
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

import kubelet_server
import network
from kubelet_server import KubeletServer
from tandem_operator.node.images import ImageTable, local_commands
from tandem_operator.node.node import Node, NodeSettings
from tandem_operator.resources.base import GPU_RESOURCE, Object

ROOT = Path(__file__).resolve().parents[2]
# In namespaces of this prefix workers and routers are stand-ins, which start in a blink.
STAND_IN = "stand-in"
STUB = (sys.executable, "-S", str(ROOT / "tests" / "operator" / "stub_server.py"))
FAKE_VLLM = (sys.executable, "-m", "tandem_router.testing.fake_vllm")
LEASE_PERIOD_S = 2.0
STATUS_PERIOD_S = 5.0
TOKEN_LIFETIME_S = 3600
REFRESH_PERIOD_S = 60.0


def now(micro: bool = False) -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S" + (".%fZ" if micro else "Z"))


def as_it_runs(pod: Object) -> Object:
    """A pod with the images that this node runs for it."""
    if not pod["metadata"]["namespace"].startswith(f"{STAND_IN}-"):
        return pod
    spec = dict(pod["spec"])
    for kind in ("initContainers", "containers"):
        spec[kind] = [
            {**c, "image": STAND_IN} if "tandem/" in c["image"] else c for c in spec.get(kind, [])
        ]
    return {**pod, "spec": spec}


class Images(ImageTable):
    """What images hold here; a step that prepares something for a stand-in has nothing to do."""

    def command(self, image: str, command: Sequence[str], args: Sequence[str]) -> list[str]:
        if command and image == STAND_IN:
            return ["true"]
        return super().command(image, command, args)


class Api:
    """The few requests that a node makes, over httpx with the node's client certificate."""

    def __init__(self, server: str, ca: Path, certificate: Path, key: Path) -> None:
        context = ssl.create_default_context(cafile=str(ca))
        context.load_cert_chain(certificate, key)
        self.client = httpx.AsyncClient(
            base_url=server, verify=context, timeout=httpx.Timeout(10.0), trust_env=False
        )

    async def get(self, path: str) -> Object | None:
        response = await self.client.get(path)
        if response.status_code == 404:
            return None
        response.raise_for_status()
        found: Object = response.json()
        return found

    async def send(
        self, method: str, path: str, body: Object, kind: str = "json"
    ) -> httpx.Response:
        content_type = {
            "json": "application/json",
            "merge": "application/merge-patch+json",
            "strategic": "application/strategic-merge-patch+json",
        }[kind]
        return await self.client.request(
            method, path, content=json.dumps(body), headers={"content-type": content_type}
        )

    async def watch(self, path: str, parameters: dict[str, str]) -> AsyncIterator[Object]:
        timeout = httpx.Timeout(10.0, read=330.0)
        query = {**parameters, "watch": "true", "timeoutSeconds": "300"}
        async with self.client.stream("GET", path, params=query, timeout=timeout) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                yield json.loads(line)


class Kubelet:
    """Keeps the pods bound to one node running as processes."""

    def __init__(
        self,
        api: Api,
        name: str,
        folder: Path,
        *,
        address: str,
        family: str,
        subnet: int,
        gpus: int,
        cpus: str,
    ) -> None:
        self.api = api
        self.name = name
        self.address = address
        self.cpus = cpus
        self.gpus = gpus
        self.node = Node(
            folder,
            addresses=network.FAMILIES[family].pods(subnet),
            lookup=self.lookup,
            report=self._report,
            # What docker/ copies into the images.
            # vLLM's images hold a fake one here.
            images=Images(
                entrypoints={**ImageTable().entrypoints, STAND_IN: STUB},
                commands=local_commands() | {"vllm": FAKE_VLLM},
                folders={"/opt/tandem/examples": str(ROOT / "examples")},
            ),
            settings=NodeSettings(name=name, max_grace_s=60.0, mount_namespaces=True),
            num_gpus=gpus,
            # One for all nodes, as a network file system would be.
            claims=folder.parent / "claims",
        )
        self._known: dict[str, Object] = {}
        self._stopping: dict[str, asyncio.Task[None]] = {}
        self._statuses: dict[str, tuple[Object, Object]] = {}
        self._wake = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def lookup(self, kind: str, namespace: str, name: str) -> Object | None:
        """ConfigMaps and Secrets by name; ServiceAccountToken mints a token as kubelet does."""
        if kind == "ServiceAccountToken":
            account, _, pod = name.partition("/")
            bound = {"kind": "Pod", "apiVersion": "v1", "name": pod}
            bound["uid"] = next(
                p["metadata"]["uid"]
                for p in self._known.values()
                if p["metadata"]["name"] == pod and p["metadata"]["namespace"] == namespace
            )
            path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token"
            spec = {"expirationSeconds": TOKEN_LIFETIME_S, "boundObjectRef": bound}
            response = await self.api.send("POST", path, {"spec": spec})
            response.raise_for_status()
            return {"data": {"token": response.json()["status"]["token"]}}
        plural = {"ConfigMap": "configmaps", "Secret": "secrets"}[kind]
        path = f"/api/v1/namespaces/{namespace}/{plural}/{name}"
        for attempt in range(50):
            try:
                found = await self.api.get(path)
            except httpx.HTTPStatusError as error:
                # The authorizer lets a node read only what its pods name, and hears of a pod
                # a moment after the node does.
                if error.response.status_code != 403 or attempt == 49:
                    raise
                await asyncio.sleep(0.1)
            else:
                return None if found is None else {**found, "kind": kind}
        return None

    async def run(self) -> None:
        """Serve until cancelled."""
        await self._register()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._forever(self._renew_lease, LEASE_PERIOD_S))
            group.create_task(self._forever(self._report_node, STATUS_PERIOD_S))
            group.create_task(self._forever(self._follow_pods, 0.2))
            group.create_task(self._forever(self._push_statuses, 0.0))
            group.create_task(self._forever(self._refresh_volumes, REFRESH_PERIOD_S))

    async def close(self) -> None:
        for task in self._stopping.values():
            task.cancel()
        await self.node.close(grace_s=2.0)
        await self.api.client.aclose()

    async def _forever(self, step: Any, pause_s: float) -> None:
        while True:
            try:
                await step()
            except (httpx.HTTPError, OSError) as error:
                print(f"{self.name}: {step.__name__}: {error!r}; trying again", file=sys.stderr)
                await asyncio.sleep(0.3)
            await asyncio.sleep(pause_s)

    async def _register(self) -> None:
        body = {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {
                "name": self.name,
                "labels": {"kubernetes.io/hostname": self.name, "kubernetes.io/os": "linux"},
            },
        }
        while True:
            try:
                response = await self.api.send("POST", "/api/v1/nodes", body)
                if response.status_code in (201, 409):
                    break
            except httpx.HTTPError as error:
                print(f"{self.name}: registering: {error!r}; trying again", file=sys.stderr)
            await asyncio.sleep(0.3)
        await self._report_node()

    async def _report_node(self) -> None:
        resources = {"cpu": self.cpus, "memory": "64Gi", "pods": "250", "ephemeral-storage": "64Gi"}
        if self.gpus:
            resources[GPU_RESOURCE] = str(self.gpus)
        condition = {
            "type": "Ready",
            "status": "True",
            "reason": "KubeletReady",
            "message": "processes can start",
            "lastHeartbeatTime": now(),
        }
        status = {
            "capacity": resources,
            "allocatable": resources,
            "conditions": [condition],
            "addresses": [
                {"type": "InternalIP", "address": self.address},
                {"type": "Hostname", "address": self.name},
            ],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": kubelet_server.PORT}},
            "declaredFeatures": kubelet_server.DECLARED_FEATURES,
            "nodeInfo": {
                "kubeletVersion": "v1.36.4",
                "operatingSystem": "linux",
                "architecture": "amd64",
                "containerRuntimeVersion": "process://1",
                "kernelVersion": "",
                "osImage": "",
                "machineID": "",
                "systemUUID": "",
                "bootID": "",
                "kubeProxyVersion": "",
            },
        }
        path = f"/api/v1/nodes/{self.name}/status"
        response = await self.api.send("PATCH", path, {"status": status}, "strategic")
        response.raise_for_status()

    async def _renew_lease(self) -> None:
        base = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases"
        spec = {
            "holderIdentity": self.name,
            "leaseDurationSeconds": 10,
            "renewTime": now(micro=True),
        }
        response = await self.api.send("PATCH", f"{base}/{self.name}", {"spec": spec}, "merge")
        if response.status_code == 404:
            body = {
                "apiVersion": "coordination.k8s.io/v1",
                "kind": "Lease",
                "metadata": {"name": self.name},
                "spec": spec,
            }
            response = await self.api.send("POST", base, body)
        response.raise_for_status()

    async def _follow_pods(self) -> None:
        selector = {"fieldSelector": f"spec.nodeName={self.name}"}
        response = await self.api.client.get("/api/v1/pods", params=selector)
        response.raise_for_status()
        listed = response.json()
        present = {p["metadata"]["uid"] for p in listed["items"]}
        for pod in listed["items"]:
            self._seen(pod)
        for uid in set(self._known) - present:
            self._gone(uid)
        parameters = {**selector, "resourceVersion": listed["metadata"]["resourceVersion"]}
        async for event in self.api.watch("/api/v1/pods", parameters):
            if event["type"] == "ERROR":
                return
            if event["type"] in ("ADDED", "MODIFIED"):
                self._seen(event["object"])
            elif event["type"] == "DELETED":
                self._gone(event["object"]["metadata"]["uid"])

    async def _refresh_volumes(self) -> None:
        """Tokens run out, ConfigMaps change."""
        await self.node.refresh()

    def _seen(self, pod: Object) -> None:
        metadata = pod["metadata"]
        uid = metadata["uid"]
        old = self._known.get(uid, pod)
        self._known[uid] = pod
        if old["metadata"].get("annotations") != metadata.get("annotations"):
            # As with a kubelet: touching a pod shows it what has changed at once.
            task = asyncio.create_task(self.node.refresh(uid))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        if metadata.get("deletionTimestamp"):
            if uid not in self._stopping:
                grace = float(metadata.get("deletionGracePeriodSeconds") or 0)
                self._stopping[uid] = asyncio.create_task(self._end(pod, grace))
        elif pod.get("status", {}).get("phase") in ("Succeeded", "Failed"):
            return
        else:
            self.node.run(as_it_runs(pod))

    def _gone(self, uid: str) -> None:
        """Deleted behind our back (force, or the node's own eviction): end the processes now."""
        pod = self._known.pop(uid, None)
        if pod is not None and uid not in self._stopping:
            self._stopping[uid] = asyncio.create_task(self.node.stop(pod, 0.0))
        task = self._stopping.get(uid)
        if task is not None:
            task.add_done_callback(lambda _: self._stopping.pop(uid, None))

    async def _end(self, pod: Object, grace: float) -> None:
        await self.node.stop(pod, grace)
        metadata = pod["metadata"]
        path = f"/api/v1/namespaces/{metadata['namespace']}/pods/{metadata['name']}"
        body = {
            "kind": "DeleteOptions",
            "apiVersion": "v1",
            "gracePeriodSeconds": 0,
            "preconditions": {"uid": metadata["uid"]},
        }
        while True:
            with contextlib.suppress(httpx.HTTPError):
                response = await self.api.send("DELETE", path, body)
                if response.status_code in (200, 404, 409):
                    return
            await asyncio.sleep(0.3)

    def _report(self, pod: Object, status: Object) -> None:
        self._statuses[pod["metadata"]["uid"]] = (pod, status)
        self._wake.set()

    async def _push_statuses(self) -> None:
        await self._wake.wait()
        self._wake.clear()
        while self._statuses:
            uid, (pod, status) = next(iter(self._statuses.items()))
            metadata = pod["metadata"]
            path = f"/api/v1/namespaces/{metadata['namespace']}/pods/{metadata['name']}/status"
            body = {"metadata": {"uid": uid}, "status": {**status, "hostIP": self.address}}
            response = await self.api.send("PATCH", path, body, "strategic")
            if response.status_code >= 500:
                response.raise_for_status()
            if self._statuses.get(uid, (None, None))[1] is status:
                del self._statuses[uid]

    def find(self, namespace: str, name: str) -> Object | None:
        for pod in self._known.values():
            metadata = pod["metadata"]
            if (metadata["namespace"], metadata["name"]) == (namespace, name):
                return pod
        return None


async def serve(arguments: argparse.Namespace) -> None:
    pki = Path(arguments.pki)
    name = arguments.name
    api = Api(arguments.server, pki / "ca.crt", pki / f"{name}.crt", pki / f"{name}.key")
    kubelet = Kubelet(
        api,
        name,
        Path(arguments.folder),
        address=arguments.address,
        family=arguments.family,
        subnet=arguments.subnet,
        gpus=arguments.gpus,
        cpus=arguments.cpus,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pki / f"{name}-serving.crt", pki / f"{name}-serving.key")
    context.load_verify_locations(pki / "ca.crt")
    context.verify_mode = ssl.CERT_REQUIRED
    # What client-go puts into every pod, so that in-cluster clients find the apiserver.
    server = urlsplit(arguments.server)
    os.environ.update(
        KUBERNETES_SERVICE_HOST=str(server.hostname), KUBERNETES_SERVICE_PORT=str(server.port)
    )
    listener = await KubeletServer(kubelet.node, kubelet.find).start(arguments.address, context)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    task = asyncio.create_task(kubelet.run())
    stopped = asyncio.create_task(stop.wait())
    print(f"{name}: serving since {time.strftime('%X')}", flush=True)
    try:
        await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            await task
    finally:
        task.cancel()
        stopped.cancel()
        listener.close()
        await kubelet.close()


def main() -> int:
    parser = argparse.ArgumentParser(prog="kubelet", description=__doc__.splitlines()[0])
    parser.add_argument("--server", required=True, help="https://ADDRESS:PORT of the apiserver")
    parser.add_argument("--pki", required=True, help="folder with ca.crt and NAME.crt, NAME.key")
    parser.add_argument("--folder", required=True, help="where pods keep their files and logs")
    parser.add_argument("--name", default="node-0")
    parser.add_argument("--address", required=True, help="the node's own address")
    parser.add_argument("--family", choices=network.FAMILIES, default="ipv4")
    parser.add_argument("--subnet", type=int, default=16, help="third byte of the pods' addresses")
    parser.add_argument("--gpus", type=int, default=8, help="nvidia.com/gpu to offer")
    parser.add_argument("--cpus", default="16")
    asyncio.run(serve(parser.parse_args()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
