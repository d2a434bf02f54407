"""The parts of Kubernetes that plans rely on, small: Deployments, scheduling, worker endpoints."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tandem_operator.local.store import Store
from tandem_operator.node.node import Node
from tandem_operator.plan.objects import (
    COST_ANNOTATION,
    MANAGED,
    MODEL_LABEL,
    REVISION_LABEL,
    ROLE_LABEL,
    ROUTER_LABEL,
    digest,
)
from tandem_operator.plan.pods import is_ready
from tandem_operator.plan.router import endpoints_name
from tandem_operator.plan.scheduling import gpu_resource_of, gpus_of_pod
from tandem_operator.resources.base import Object

HASH_LABEL = "pod-template-hash"


@dataclass(frozen=True)
class RolloutStep:
    """What to do next for a Deployment: pods to create, pods to delete."""

    num_create: int
    delete: list[Object]


def rollout_step(
    replicas: int, max_surge: int, max_unavailable: int, new: list[Object], old: list[Object]
) -> RolloutStep:
    """Decide one step: never above replicas + surge pods, never below replicas - unavailable ready.

    new and old: pods of the wanted and of other templates, without those that are about to go.
    """
    num_create = max(0, min(replicas - len(new), replicas + max_surge - len(new) - len(old)))
    delete = _cheapest(new)[: max(0, len(new) - replicas)]
    # An old pod that serves nobody can go at once.
    idle = [p for p in old if not is_ready(p)]
    delete += idle
    ready = sum(is_ready(p) for p in [*new, *old])
    spare = max(0, ready - max(0, replicas - max_unavailable))
    delete += _cheapest([p for p in old if is_ready(p)])[:spare]
    return RolloutStep(num_create, delete)


def _cheapest(pods: list[Object]) -> list[Object]:
    """Pods in the order in which they should go: unready, lowest deletion cost, youngest."""

    def order(pod: Object) -> tuple[bool, int, int]:
        annotations = pod["metadata"].get("annotations") or {}
        age = int(pod["metadata"].get("resourceVersion", 0))
        return is_ready(pod), int(annotations.get(COST_ANNOTATION, 0)), -age

    return sorted(pods, key=order)


class Deployments:
    """Keeps the pods of all Deployments as they should be."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def sync(self) -> None:
        """One step for every Deployment; called again after every change."""
        for deployment in self._store.find("Deployment"):
            self._sync(deployment)

    def _sync(self, deployment: Object) -> None:
        metadata, spec = deployment["metadata"], deployment["spec"]
        template_hash = digest(spec["template"])
        pods = [
            p
            for p in self._store.find("Pod", metadata["namespace"])
            if any(o["uid"] == metadata["uid"] for o in p["metadata"].get("ownerReferences") or [])
        ]
        ended = [p for p in pods if (p.get("status") or {}).get("phase") in ("Failed", "Succeeded")]
        live = [p for p in pods if not p["metadata"].get("deletionTimestamp") and p not in ended]
        new = [p for p in live if p["metadata"]["labels"].get(HASH_LABEL) == template_hash]
        old = [p for p in live if p not in new]
        rolling = (spec.get("strategy") or {}).get("rollingUpdate") or {}
        replicas = int(spec.get("replicas", 1))
        step = rollout_step(
            replicas,
            int(rolling.get("maxSurge", 1)),
            int(rolling.get("maxUnavailable", 0)),
            new,
            old,
        )
        for pod in [*ended, *step.delete]:
            self._store.remove("Pod", metadata["namespace"], pod["metadata"]["name"])
        for _ in range(step.num_create):
            self._store.add(self._pod(deployment, template_hash))
        status = {
            "observedGeneration": metadata.get("generation", 1),
            "replicas": len(live),
            "updatedReplicas": len(new),
            "readyReplicas": sum(is_ready(p) for p in live),
            "availableReplicas": sum(is_ready(p) for p in live),
        }
        if deployment.get("status") != status:
            self._store.change(
                "Deployment", metadata["namespace"], metadata["name"], {"status": status}
            )

    @staticmethod
    def _pod(deployment: Object, template_hash: str) -> Object:
        metadata, template = deployment["metadata"], deployment["spec"]["template"]
        meta = template.get("metadata") or {}
        return {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": f"{metadata['name']}-{secrets.token_hex(3)}",
                "namespace": metadata["namespace"],
                "labels": {**(meta.get("labels") or {}), HASH_LABEL: template_hash},
                "annotations": dict(meta.get("annotations") or {}),
                "ownerReferences": [
                    {
                        "apiVersion": "apps/v1",
                        "kind": "Deployment",
                        "name": metadata["name"],
                        "uid": metadata["uid"],
                        "controller": True,
                    }
                ],
            },
            "spec": dict(template["spec"]),
        }


class Kubelet:
    """Gives pods to the node, writes back what it reports, ends pods that are deleted."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._stopping: dict[str, asyncio.Task[None]] = {}
        self.node: Node | None = None

    def report(self, pod: Object, status: Object) -> None:
        """Called by the node for each change of a pod."""
        metadata = pod["metadata"]
        current = self._store.read("Pod", metadata["namespace"], metadata["name"])
        if current is not None and current["metadata"]["uid"] == metadata["uid"]:
            self._store.change("Pod", metadata["namespace"], metadata["name"], {"status": status})

    def sync(self) -> None:
        """Start what is new and fits, end what is deleted."""
        node = self.node
        if node is None:
            return
        for pod in self._store.find("Pod"):
            metadata = pod["metadata"]
            if metadata.get("deletionTimestamp"):
                if metadata["uid"] not in self._stopping:
                    self._stopping[metadata["uid"]] = asyncio.create_task(self._end(node, pod))
            elif not pod["spec"].get("nodeName"):
                self._schedule(node, pod)

    def _schedule(self, node: Node, pod: Object) -> None:
        metadata = pod["metadata"]
        wanted, free, name = gpus_of_pod(pod), node.free_gpus, gpu_resource_of(pod)
        if wanted > free:
            message = f"Insufficient {name}: {wanted} wanted, {free} of {node.num_gpus} free"
            status = {
                "phase": "Pending",
                "conditions": [
                    {
                        "type": "PodScheduled",
                        "status": "False",
                        "reason": "Unschedulable",
                        "message": message,
                    }
                ],
            }
            self._store.change("Pod", metadata["namespace"], metadata["name"], {"status": status})
            return
        bound = self._store.change(
            "Pod",
            metadata["namespace"],
            metadata["name"],
            {"spec": {"nodeName": node.settings.name}},
        )
        node.run(bound)

    async def _end(self, node: Node, pod: Object) -> None:
        metadata = pod["metadata"]
        try:
            await node.stop(pod)
        finally:
            self._store.drop("Pod", metadata["namespace"], metadata["name"])
            self._stopping.pop(metadata["uid"], None)

    async def close(self) -> None:
        """Stop waiting for pods that are ending."""
        for task in list(self._stopping.values()):
            task.cancel()
        await asyncio.gather(*self._stopping.values(), return_exceptions=True)


def serving_endpoints(pods: Iterable[Object], port: int) -> dict[str, list[str]]:
    """The base URLs per role of the one revision of a Model that should get requests.

    Prefill and decode workers of different revisions must not meet: their KV blocks differ. So the
    revision with most complete pairs serves, the newer one when equal; while no revision has both
    roles, decode workers serve alone, they can prefill for themselves.
    """
    by_revision: dict[str, dict[str, list[Object]]] = {}
    for pod in pods:
        labels = pod["metadata"]["labels"]
        if is_ready(pod) and ROLE_LABEL in labels:
            roles = by_revision.setdefault(labels.get(REVISION_LABEL, ""), {})
            roles.setdefault(labels[ROLE_LABEL], []).append(pod)

    def rank(roles: Mapping[str, list[Object]]) -> tuple[int, int, str, int]:
        whole = "unified" in roles or ("prefill" in roles and "decode" in roles)
        answering = "unified" in roles or "decode" in roles
        size = min((len(v) for v in roles.values()), default=0)
        newest = max(int(p["metadata"]["resourceVersion"]) for v in roles.values() for p in v)
        created = max(p["metadata"]["creationTimestamp"] for v in roles.values() for p in v)
        return (2 if whole else 1 if answering else 0), size, created, newest

    if not by_revision:
        return {}
    best = max(by_revision.values(), key=rank)
    return {
        role: sorted(f"http://{p['status']['podIP']}:{port}" for p in members)
        for role, members in sorted(best.items())
    }


class Endpoints:
    """Keeps each Router's ConfigMap of workers up to date."""

    def __init__(self, store: Store, worker_port: int) -> None:
        self._store = store
        self._port = worker_port

    def sync(self) -> None:
        """Write the table of every Router; an unchanged one costs no write."""
        models = {
            (model["metadata"]["namespace"], model["metadata"]["name"])
            for model in self._store.find("Model")
        }
        for router in self._store.find("Router"):
            metadata = router["metadata"]
            tiers = {}
            for tier in router["spec"].get("tiers", []):
                ref = tier.get("modelRef")
                # A tier that is named without workers sleeps; one whose Model is gone is not named.
                if ref and (metadata["namespace"], ref["name"]) in models:
                    pods = self._store.find(
                        "Pod", metadata["namespace"], {MODEL_LABEL: ref["name"]}
                    )
                    tiers[tier["name"]] = serving_endpoints(pods, self._port)
            text = json.dumps({"tiers": tiers}, indent=1, sort_keys=True) + "\n"
            self._store.write(
                {
                    "apiVersion": "v1",
                    "kind": "ConfigMap",
                    "metadata": {
                        "name": endpoints_name(metadata["name"]),
                        "namespace": metadata["namespace"],
                        "labels": {**MANAGED, ROUTER_LABEL: metadata["name"]},
                        "ownerReferences": [
                            {
                                "apiVersion": router["apiVersion"],
                                "kind": "Router",
                                "name": metadata["name"],
                                "uid": metadata["uid"],
                                "controller": True,
                            }
                        ],
                    },
                    "data": {"endpoints.json": text},
                },
                manager="endpoints",
            )
