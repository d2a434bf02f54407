"""What a plan is made of, and the parts that all planned objects share."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tandem_operator.resources import API_VERSION, Model, Router
from tandem_operator.resources.allow_list import AllowList
from tandem_operator.resources.base import Object as Object
from tandem_operator.resources.entrance import Entrance
from tandem_operator.resources.model import Resources
from tandem_operator.resources.network_rules import NetworkRules
from tandem_operator.resources.pod_defaults import PodDefaults

MODEL_LABEL = "tandem.dev/model"
ROUTER_LABEL = "tandem.dev/router"
ROLE_LABEL = "tandem.dev/role"
REVISION_LABEL = "tandem.dev/revision"
MANAGED = {"app.kubernetes.io/managed-by": "tandem"}
SEEDED_ANNOTATION = "tandem.dev/seeded-replicas"
# On a WorkerPool that the control loop scales: "BEFORE>AFTER reason", said with the count.
SCALED_ANNOTATION = "tandem.dev/scaled"
# On a pod: whoever has least goes first where a pool shrinks.
COST_ANNOTATION = "controller.kubernetes.io/pod-deletion-cost"
PEER_SECRET = "tandem-peer-token"

# Where pods of both kinds find their configuration and token, and may write.
CONFIG_DIR = "/etc/tandem/config"
PEER_DIR = "/etc/tandem/peer"
SCRATCH_DIR = "/var/cache/tandem"


@dataclass(frozen=True)
class Settings:
    """What the operator's surroundings decide, the same for all resources.

    endpoints: how routers find workers: "endpointslice" watches the API; "file" reads a ConfigMap
    that local mode keeps up to date.
    pre_stop_s: pause between a pod leaving its Service and SIGTERM, so that routers have noticed.
    """

    worker_image: str = "tandem/worker:0.1.0"
    router_image: str = "tandem/router:0.1.0"
    image_pull_policy: Literal["IfNotPresent", "Always", "Never"] = "IfNotPresent"
    endpoints: Literal["endpointslice", "file"] = "endpointslice"
    pre_stop_s: int = 5
    router_port: int = 8000
    worker_port: int = 8100
    kv_port: int = 8200
    gateway_port: int = 9002
    network: NetworkRules = field(default_factory=NetworkRules)
    # How often a Router's pods are asked what they measured; each answer may be a status write.
    status_period_s: float = 30.0
    cluster_domain: str = "cluster.local"
    # Local mode: folder on this machine that keeps trained predictors between runs.
    predictor_cache: str = ""
    # Digests of local training data by URI: changed data trains again.
    data_digests: Mapping[str, str] = field(default_factory=dict)
    # What Models and Routers may ask for; None allows everything, on one's own machine.
    allow: AllowList | None = None
    log_format: Literal["text", "json"] = "text"
    # How requests come in from outside.
    entrance: Entrance = field(default_factory=Entrance)
    # What all pods get beside what their resource asks for.
    pods: PodDefaults = field(default_factory=PodDefaults)
    # The namespace that the operator runs in; empty outside a cluster.
    own_namespace: str = ""
    # Where the queries of AutoscalingPolicies are asked; empty: nowhere.
    prometheus_url: str = ""


@dataclass(frozen=True)
class Problem:
    """Why a resource cannot be planned; becomes a False condition."""

    condition: str
    reason: str
    message: str


@dataclass(frozen=True)
class Scale:
    """A WorkerPool whose count is set once, because the Model's own count changed."""

    pool: str
    replicas: int


@dataclass
class Plan:
    """What should exist for one resource.

    create: made when absent and left alone afterwards. apply: made equal to this by server-side
    apply. scale: written through the pool's spec once. keep: names of children of older revisions
    that still serve. notes: what people should know of it although it runs.
    """

    create: list[Object] = field(default_factory=list)
    apply: list[Object] = field(default_factory=list)
    scale: list[Scale] = field(default_factory=list)
    keep: set[tuple[str, str]] = field(default_factory=set)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    # Of a Router: the settings that its pods of this revision take up while they run.
    live: Object | None = None
    revision: str = ""


def digest(value: Any) -> str:
    """Ten hex digits that change when the value does."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def owner_reference(owner: Model | Router) -> Object:
    """A controller reference to the resource."""
    return {
        "apiVersion": API_VERSION,
        "kind": type(owner).__name__,
        "name": owner.metadata.name,
        "uid": owner.metadata.uid,
        "controller": True,
        "blockOwnerDeletion": True,
    }


def owner_labels(owner: Model | Router) -> dict[str, str]:
    """Labels by which the children of a resource are listed."""
    label = MODEL_LABEL if isinstance(owner, Model) else ROUTER_LABEL
    return {**MANAGED, label: owner.metadata.name}


def child(
    owner: Model | Router,
    api_version: str,
    kind: str,
    name: str,
    body: Mapping[str, Any],
    labels: Mapping[str, str] | None = None,
    annotations: Mapping[str, str] | None = None,
) -> Object:
    """A manifest owned by the resource."""
    metadata: Object = {
        "name": name,
        "namespace": owner.metadata.namespace,
        "labels": {**owner_labels(owner), **(labels or {})},
        "ownerReferences": [owner_reference(owner)],
    }
    if annotations:
        metadata["annotations"] = dict(annotations)
    return {"apiVersion": api_version, "kind": kind, "metadata": metadata, **body}


def disruption_budget(
    owner: Model | Router,
    name: str,
    pods: Mapping[str, str],
    labels: Mapping[str, str] | None = None,
) -> Object:
    """One of these pods at a time may be moved away. pods: labels by which they are found."""
    spec = {"maxUnavailable": 1, "selector": {"matchLabels": dict(pods)}}
    return child(owner, "policy/v1", "PodDisruptionBudget", name, {"spec": spec}, labels)


def requested(resources: Resources) -> tuple[dict[str, str], dict[str, str]]:
    """(requests, limits) of a container: CPU is asked for, memory is a limit as well."""
    requests: dict[str, str] = {}
    limits: dict[str, str] = {}
    if resources.cpu:
        requests["cpu"] = resources.cpu
    if resources.memory:
        requests["memory"] = limits["memory"] = resources.memory
    return requests, limits


def peer_secret(namespace: str, token: str) -> Object:
    """The Secret that lets routers and workers of a namespace know each other; made once."""
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": PEER_SECRET, "namespace": namespace, "labels": dict(MANAGED)},
        "type": "Opaque",
        "stringData": {"token": token},
    }


def security_context() -> Object:
    """A container's security context under the restricted pod security standard."""
    return {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
    }


def pod_security_context() -> Object:
    """A pod's security context under the restricted pod security standard."""
    return {
        "runAsNonRoot": True,
        "runAsUser": 10001,
        "runAsGroup": 10001,
        "fsGroup": 10001,
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def spread(labels: Mapping[str, str]) -> Object:
    """Pods with these labels on different nodes where there are several, else on one."""
    return {
        "maxSkew": 1,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "ScheduleAnyway",
        "labelSelector": {"matchLabels": dict(labels)},
        # Those of a rollout's old pods count for nothing.
        "matchLabelKeys": [REVISION_LABEL],
    }


def service_name(name: str) -> str:
    """The name of the Service of a child: older apiservers take none that begins with a digit.

    A rule on metadata.name keeps the prefixed name from being another one's own.
    """
    return f"tandem-{name}" if name[0].isdigit() else name


def foreign_labels(template: Object, wanted: Mapping[str, str]) -> str | None:
    """What to say of a podPatch that took labels by which pods are found; None if it did not."""
    labels = ((template.get("metadata") or {}).get("labels")) or {}
    changed = [key for key, value in wanted.items() if labels.get(key) != value]
    if not changed:
        return None
    return (
        f"podPatch changes the label {', '.join(changed)}, by which pods are found; leave it as it "
        "is and add labels of your own"
    )


def probe(path: str, port: str, period_s: int, failures: int, timeout_s: int = 2) -> Object:
    """An httpGet probe."""
    return {
        "httpGet": {"path": path, "port": port, "scheme": "HTTP"},
        "periodSeconds": period_s,
        "failureThreshold": failures,
        "timeoutSeconds": timeout_s,
        "successThreshold": 1,
    }


def relative_path(uri: str) -> str:
    """What to do about a file:// URI that names no place on a node."""
    return (
        f"{uri} is relative to a YAML file, which only local mode reads; use file:///absolute/path "
        "on the nodes, image:///path in the image or pvc://claim/path"
    )


def merge_patch(target: Any, patch: Any) -> Any:
    """Merge patch into target and return the result.

    Mappings merge, null removes, lists of named items (containers, volumes, env) merge by name,
    other lists are replaced: the useful part of Kubernetes' strategic merge.
    """
    if isinstance(target, dict) and isinstance(patch, Mapping):
        result = dict(target)
        for key, value in patch.items():
            if value is None:
                result.pop(key, None)
            elif key in result:
                result[key] = merge_patch(result[key], value)
            else:
                result[key] = copy.deepcopy(value)
        return result
    if _named(target) and _named(patch):
        result_list = [copy.deepcopy(i) for i in target]
        at = {item["name"]: i for i, item in enumerate(result_list)}
        for item in patch:
            if item["name"] in at:
                result_list[at[item["name"]]] = merge_patch(result_list[at[item["name"]]], item)
            else:
                result_list.append(copy.deepcopy(item))
        return result_list
    return copy.deepcopy(patch)


def log_variables(settings: Settings) -> list[Object]:
    """The variable by which our processes know how to write their log; none for text."""
    json_lines = settings.log_format == "json"
    return [{"name": "TANDEM_LOG_FORMAT", "value": "json"}] if json_lines else []


def patched(
    template: Object, kind: str, settings: Settings, own: Mapping[str, Any] | None
) -> Object:
    """A pod template with the installation's patches of its kind and, last, its resource's own."""
    for default in settings.pods.under(kind):
        template = merge_patch(template, _fitting(default, template))
    return merge_patch(template, own) if own else template


def _fitting(patch: Mapping[str, Any], template: Object) -> Mapping[str, Any]:
    """Without what alters a container that this pod has not: defaults are for pods of all shapes.

    A container with an image is one to be added.
    """
    spec = patch.get("spec")
    if not isinstance(spec, Mapping):
        return patch
    kept = dict(spec)
    for field_name in ("containers", "initContainers"):
        if not _named(spec.get(field_name)):
            continue
        here = {item["name"] for item in template["spec"].get(field_name, ())}
        items = [item for item in spec[field_name] if item["name"] in here or "image" in item]
        if items:
            kept[field_name] = items
        else:
            del kept[field_name]
    return {**patch, "spec": kept}


def _named(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(i, Mapping) and "name" in i for i in value)
    )


def invalid_setting(error: Mapping[str, Any]) -> str:
    """What pydantic finds wrong with the configuration that a resource amounts to."""
    said = str(error["msg"]).removeprefix("Value error, ")
    if not error["loc"]:
        return said
    where = ".".join(str(part) for part in error["loc"])
    said = said.removeprefix("Input ")
    return f"{where} {said}, not {error['input']!r}; correct the field that it is made from"
