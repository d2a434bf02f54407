"""A node that runs nothing: its pods are ready as soon as they are there, and answer the operator.

Either the real controllers make the pods and the real scheduler binds them, or both are stopped and
each Deployment gets its pods here: three writes for what takes a cluster about twenty.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from typing import Any

from tandem_operator.kube.client import Gone, KubeApi, path
from tandem_operator.reconcile.cluster_api import ApiError

Object = dict[str, Any]
NODE = "simulated"
ADDRESS = "10.77.0.1"
WORKER_PORT, ROUTER_PORT = 8100, 8000
NUM_WRITERS = 16
HEARTBEAT_S = 4.0


def _stamp() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


class SimulatedNode:
    """One node with room for every pod; all pods share its address.

    makes_pods: in place of the controllers.
    """

    def __init__(self, api: KubeApi, makes_pods: bool) -> None:
        self._api = api
        self._makes_pods = makes_pods
        self._due: asyncio.Queue[Object] = asyncio.Queue()
        self._begun: set[str] = set()

    async def run(self) -> None:
        """Keep the node and its pods ready until cancelled."""
        await self._register()
        servers = [
            await asyncio.start_server(_answer, ADDRESS, port)
            for port in (WORKER_PORT, ROUTER_PORT)
        ]
        async with asyncio.TaskGroup() as group:
            for server in servers:
                group.create_task(server.serve_forever())
            group.create_task(self._beat())
            group.create_task(self._watch("Deployment" if self._makes_pods else "Pod"))
            for _ in range(NUM_WRITERS):
                group.create_task(self._write())

    async def _register(self) -> None:
        room = {"cpu": "100000", "memory": "100Ti", "pods": "10000", "nvidia.com/gpu": "10000"}
        await self._call("POST", "/api/v1/nodes", {"metadata": {"name": NODE}})
        ready = {"type": "Ready", "status": "True", "reason": "Simulated"}
        ready |= {"lastHeartbeatTime": _stamp(), "lastTransitionTime": _stamp()}
        status = {"capacity": room, "allocatable": room, "conditions": [ready]}
        await self._call("PATCH", f"/api/v1/nodes/{NODE}/status", {"status": status})
        await self._call("PATCH", f"/api/v1/nodes/{NODE}", {"spec": {"taints": None}})

    async def _beat(self) -> None:
        leases = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases"
        lease = {"metadata": {"name": NODE}, "spec": {"leaseDurationSeconds": 40}}
        await self._call("POST", leases, lease)
        while True:
            now = time.strftime("%Y-%m-%dT%H:%M:%S.000000Z", time.gmtime())
            body = {"spec": {"holderIdentity": NODE, "renewTime": now}}
            await self._call("PATCH", f"{leases}/{NODE}", body)
            await asyncio.sleep(HEARTBEAT_S)

    async def _watch(self, kind: str) -> None:
        while True:
            found, version = await self._api.list_page(kind, None, "")
            for obj in found:
                self._take(obj)
            try:
                while True:
                    async for what, obj in self._api.watch(kind, None, "", version):
                        version = obj["metadata"]["resourceVersion"]
                        if what in ("ADDED", "MODIFIED"):
                            self._take(obj)
            except (Gone, ApiError) as error:
                print(f"simulated node: list again after {error!r}", flush=True)
                await asyncio.sleep(0.5)

    def _take(self, obj: Object) -> None:
        metadata = obj["metadata"]
        if not self._makes_pods and obj["spec"].get("nodeName") != NODE:
            return
        key = metadata["uid"] + ("-" if metadata.get("deletionTimestamp") else "+")
        if key not in self._begun:
            self._begun.add(key)
            self._due.put_nowait(obj)

    async def _write(self) -> None:
        while True:
            obj = await self._due.get()
            if self._makes_pods:
                await self._make_pods(obj)
                continue
            metadata = obj["metadata"]
            target = path("Pod", metadata["namespace"], metadata["name"])
            if metadata.get("deletionTimestamp"):
                await self._call("DELETE", target, {"gracePeriodSeconds": 0})
            else:
                await self._call("PATCH", f"{target}/status", {"status": _status(obj["spec"])})

    async def _make_pods(self, deployment: Object) -> None:
        metadata, spec = deployment["metadata"], deployment["spec"]
        namespace, count = metadata["namespace"], spec["replicas"]
        for index in range(count):
            name = f"{metadata['name']}-{index}"
            pod = {
                "metadata": {"name": name, "labels": spec["template"]["metadata"]["labels"]},
                "spec": {**spec["template"]["spec"], "nodeName": NODE},
            }
            await self._call("POST", path("Pod", namespace), pod)
            target = path("Pod", namespace, name)
            await self._call("PATCH", f"{target}/status", {"status": _status(pod["spec"])})
        names = ("replicas", "updatedReplicas", "readyReplicas", "availableReplicas")
        status = {"observedGeneration": metadata["generation"], **dict.fromkeys(names, count)}
        target = path("Deployment", namespace, metadata["name"])
        await self._call("PATCH", f"{target}/status", {"status": status})

    async def _call(self, method: str, target: str, body: Object) -> None:
        kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
        while True:
            try:
                await self._api._write(method, target, {}, body, kind)
                return
            except ApiError as error:
                if error.status in (404, 409):
                    return
                print(f"simulated node: {error}", flush=True)
                await asyncio.sleep(0.5)


def _status(spec: Object) -> Object:
    now = _stamp()
    kinds = ("PodScheduled", "Initialized", "ContainersReady", "Ready")
    return {
        "phase": "Running",
        "podIP": ADDRESS,
        "podIPs": [{"ip": ADDRESS}],
        "hostIP": ADDRESS,
        "startTime": now,
        "conditions": [{"type": k, "status": "True", "lastTransitionTime": now} for k in kinds],
        "containerStatuses": [
            {
                "name": c["name"],
                "image": c["image"],
                "imageID": "simulated",
                "ready": True,
                "started": True,
                "restartCount": 0,
                "state": {"running": {"startedAt": now}},
            }
            for c in spec["containers"]
        ],
    }


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """What a worker says of a KV link and of its load, and a router of its traffic."""
    head = await reader.readuntil(b"\r\n\r\n")
    target = head.split(b" ", 2)[1].decode()
    replies: dict[str, Object] = {
        "/internal/kv-link": {"ok": True, "num_bytes": 65536},
        "/v1/load": {"num_running": 0, "num_waiting": 0},
        # No two looks at a router in use show the same.
        "/admin/state": {
            "predictor": "v1",
            "set_points": {"gain_threshold": random.random()},
            "tiers": [
                {"name": name, "recent_share": random.random(), "ttft_s": random.random()}
                for name in ("small", "large")
            ],
        },
    }
    body = json.dumps(replies.get(target, {})).encode()
    top = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    writer.write(top.encode() + body)
    await writer.drain()
    writer.close()
