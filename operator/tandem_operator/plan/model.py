"""Plans a Model: per role a WorkerPool, Deployment, Service, ConfigMap and disruption budget."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from tandem_operator.plan.engines import EnginePod, engine_of
from tandem_operator.plan.engines.protocol import SERVED_ANNOTATION, pod_labels
from tandem_operator.plan.network import worker_policy
from tandem_operator.plan.objects import (
    CONFIG_DIR,
    MODEL_LABEL,
    PEER_DIR,
    PEER_SECRET,
    REVISION_LABEL,
    ROLE_LABEL,
    SCRATCH_DIR,
    SEEDED_ANNOTATION,
    Plan,
    Problem,
    Scale,
    Settings,
    child,
    digest,
    disruption_budget,
    foreign_labels,
    invalid_setting,
    owner_labels,
    patched,
    peer_secret,
    pod_security_context,
    probe,
    relative_path,
    requested,
    security_context,
    service_name,
)
from tandem_operator.plan.rollout import max_unavailable
from tandem_operator.plan.scheduling import GPU_ANNOTATION
from tandem_operator.plan.weight_volumes import WEIGHTS_DIR, claims, pins, weights_of
from tandem_operator.resources import API_VERSION, Model, RoleSpec
from tandem_operator.resources.base import GPU_RESOURCE, Object, seconds


def pool_name(model: str, role: str) -> str:
    """Name of the objects of one role: WorkerPool, Deployment and Service."""
    return f"{model}-{role}"


def revision_of(model: Model, settings: Settings) -> str:
    """The hash that pairs the pods of all roles: it changes when any of them has to restart."""
    parts: list[Any] = []
    for role, spec in model.spec.roles().items():
        parts.append(engine_of(model).config(model, role, settings, ""))
        parts.append(_pod_template(model, role, spec, "", settings))
    return digest(parts)


def plan_model(
    model: Model,
    children: Iterable[Object],
    pods: Sequence[Object],
    settings: Settings,
    peer_token: str,
    weights: Mapping[str, Any] | None = None,
) -> Plan:
    """What should exist for a Model.

    children: its observed objects; WorkerPools among them say how many workers are wanted.
    pods: its observed pods; configuration of revisions that still run is kept.
    peer_token: used when the namespace's Secret does not exist yet.
    weights: status.weights, as last written.
    """
    plan = Plan()
    source = model.spec.weights.source
    if source.startswith("file://") and not source.startswith("file:///"):
        plan.problems.append(Problem("Accepted", "RelativePath", relative_path(source)))
        return plan
    try:
        revision = revision_of(model, settings)
    except ValidationError as error:
        message = "; ".join(invalid_setting(each) for each in error.errors())
        plan.problems.append(Problem("Accepted", "InvalidEngine", f"spec.engine: {message}"))
        return plan
    for role, spec in model.spec.roles().items():
        template = _pod_template(model, role, spec, revision, settings)
        if taken := foreign_labels(template, _pod_labels(model, role, revision)):
            plan.problems.append(Problem("Accepted", "LabelTaken", f"spec.{role}.{taken}"))
            return plan
    observed = {(o["kind"], o["metadata"]["name"]): o for o in children}
    plan.create.append(peer_secret(model.metadata.namespace, peer_token))
    plan.apply.append(_service_account(model, settings))
    plan.apply += claims(model) + pins(model, weights or {})
    for role, spec in model.spec.roles().items():
        name = pool_name(model.metadata.name, role)
        labels = {ROLE_LABEL: role}
        pool = observed.get(("WorkerPool", name))
        replicas = _plan_pool(plan, model, role, spec, pool)
        config = engine_of(model).config(model, role, settings, revision)
        if config is not None:
            text = json.dumps(config, indent=1) + "\n"
            body: Object = {"immutable": True, "data": {"config.json": text}}
            marked = {**labels, REVISION_LABEL: revision}
            plan.apply.append(child(model, "v1", "ConfigMap", f"{name}-{revision}", body, marked))
        plan.apply.append(_service(model, role, name, settings))
        missing = max_unavailable(
            model, role, replicas, revision, pods, observed.get(("Deployment", name))
        )
        plan.apply.append(
            _deployment(model, role, spec, name, revision, replicas, missing, settings)
        )
        pods_of_role = {MODEL_LABEL: model.metadata.name, ROLE_LABEL: role}
        plan.apply.append(disruption_budget(model, name, pods_of_role, labels))
    if settings.network.enabled:
        plan.apply.append(worker_policy(model, settings))
    for pod in pods:
        old = pod["metadata"].get("labels", {})
        if (role := old.get(ROLE_LABEL)) and (rev := old.get(REVISION_LABEL)):
            plan.keep.add(("ConfigMap", f"{pool_name(model.metadata.name, role)}-{rev}"))
    return plan


def bounded(spec: Mapping[str, Any]) -> int:
    """The workers that a WorkerPool gets: what it asks for within its bounds; 0 stops it always."""
    asked = int(spec.get("replicas", 1))
    if asked == 0:
        return 0
    return min(max(asked, int(spec.get("minReplicas", 0))), int(spec.get("maxReplicas", 1000)))


def _plan_pool(plan: Plan, model: Model, role: str, spec: RoleSpec, pool: Object | None) -> int:
    """Plan one WorkerPool; the number of workers wanted.

    replicas stays out of the applied body, whoever owns /scale keeps it. The Model's own count is
    written once at the start and again only when the Model changes it.
    """
    name = pool_name(model.metadata.name, role)
    body: Object = {
        "modelRef": {"name": model.metadata.name},
        "role": role,
        "minReplicas": spec.min_replicas or 0,
        "maxReplicas": spec.max_replicas or 1000,
    }
    annotations = {SEEDED_ANNOTATION: str(spec.replicas)}
    applied = child(
        model, API_VERSION, "WorkerPool", name, {"spec": body}, {ROLE_LABEL: role}, annotations
    )
    if pool is None:
        seeded = child(
            model,
            API_VERSION,
            "WorkerPool",
            name,
            {"spec": {**body, "replicas": spec.replicas}},
            {ROLE_LABEL: role},
            annotations,
        )
        plan.create.append(seeded)
        plan.apply.append(applied)
        return spec.replicas
    plan.apply.append(applied)
    seeded_count = pool["metadata"].get("annotations", {}).get(SEEDED_ANNOTATION)
    if seeded_count is not None and seeded_count != str(spec.replicas):
        plan.scale.append(Scale(name, spec.replicas))
        return spec.replicas
    return bounded({**pool["spec"], **body})


def _service_account(model: Model, settings: Settings) -> Object:
    return child(
        model,
        "v1",
        "ServiceAccount",
        f"{model.metadata.name}-worker",
        {"automountServiceAccountToken": False},
        annotations=settings.pods.worker_annotations,
    )


def _service(model: Model, role: str, name: str, settings: Settings) -> Object:
    ports = [
        {"name": "http", "port": settings.worker_port, "targetPort": "http", "protocol": "TCP"}
    ]
    if role != "unified":
        ports.append(
            {"name": "kv", "port": settings.kv_port, "targetPort": "kv", "protocol": "TCP"}
        )
    return child(
        model,
        "v1",
        "Service",
        service_name(name),
        {
            "spec": {
                "clusterIP": "None",
                "selector": {MODEL_LABEL: model.metadata.name, ROLE_LABEL: role},
                "ports": ports,
            }
        },
        {ROLE_LABEL: role},
    )


def _deployment(
    model: Model,
    role: str,
    spec: RoleSpec,
    name: str,
    revision: str,
    replicas: int,
    missing: int,
    settings: Settings,
) -> Object:
    rollout = model.spec.rollout
    return child(
        model,
        "apps/v1",
        "Deployment",
        name,
        {
            "spec": {
                "replicas": replicas,
                "revisionHistoryLimit": 2,
                "progressDeadlineSeconds": math.ceil(seconds(rollout.startup_timeout)) + 60,
                "selector": {"matchLabels": {MODEL_LABEL: model.metadata.name, ROLE_LABEL: role}},
                "strategy": {
                    "type": "RollingUpdate",
                    "rollingUpdate": {
                        "maxSurge": rollout.max_surge,
                        "maxUnavailable": missing,
                    },
                },
                "template": _pod_template(model, role, spec, revision, settings),
            }
        },
        {ROLE_LABEL: role, REVISION_LABEL: revision},
    )


def _pod_labels(model: Model, role: str, revision: str) -> dict[str, str]:
    """By what pods are found: Services, the Deployment, disruption budgets, status."""
    own = {ROLE_LABEL: role, REVISION_LABEL: revision}
    return {**owner_labels(model), **own, **pod_labels(model)}


def _pod_template(
    model: Model, role: str, spec: RoleSpec, revision: str, settings: Settings
) -> Object:
    source, volumes, init = weights_of(model, settings)
    grace = seconds(model.spec.drain.timeout)
    ports = [{"name": "http", "containerPort": settings.worker_port, "protocol": "TCP"}]
    if role != "unified":
        ports.append({"name": "kv", "containerPort": settings.kv_port, "protocol": "TCP"})
    engine = engine_of(model)
    runs = engine.container(model, role, spec, source, revision, settings)
    startup_s = seconds(model.spec.rollout.startup_timeout)
    container: Object = {
        "name": "worker",
        "image": model.spec.image or settings.worker_image,
        "imagePullPolicy": settings.image_pull_policy,
        **({"command": runs["command"]} if "command" in runs else {}),
        "args": runs["args"],
        "env": [
            {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
            {"name": "POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
            *runs["env"],
        ],
        "ports": ports,
        "resources": _resources(spec),
        # A container that fails says why in its last lines, which the status then shows.
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "startupProbe": probe(engine.health_path, "http", 2, max(1, math.ceil(startup_s / 2))),
        "readinessProbe": probe(engine.ready_path, "http", 2, 2),
        # Generous: a saturated worker answers late, and a restart would only add load.
        "livenessProbe": probe(engine.health_path, "http", 10, 6, timeout_s=5),
        "lifecycle": {"preStop": {"sleep": {"seconds": settings.pre_stop_s}}},
        "securityContext": security_context(),
        "volumeMounts": [
            *({"name": n, "mountPath": path, "readOnly": True} for n, path in _mounts(engine)),
            {"name": "scratch", "mountPath": SCRATCH_DIR},
        ],
    }
    config_name = f"{pool_name(model.metadata.name, role)}-{revision}"
    given: list[Object] = [
        {"name": "config", "configMap": {"name": config_name}},
        {"name": "peer", "secret": {"secretName": PEER_SECRET}},
    ]
    pod: Object = {
        "serviceAccountName": f"{model.metadata.name}-worker",
        "automountServiceAccountToken": False,
        "securityContext": pod_security_context(),
        "terminationGracePeriodSeconds": math.ceil(grace) + settings.pre_stop_s + 5,
        "containers": [container],
        "volumes": [
            *(given if engine.reads_config else []),
            {"name": "scratch", "emptyDir": {}},
        ],
    }
    if volumes:
        pod["volumes"] += volumes
        mount = {"name": "weights", "mountPath": WEIGHTS_DIR, "readOnly": True}
        container["volumeMounts"].append(mount)
    if init:
        pod["initContainers"] = init
    if spec.node_selector:
        pod["nodeSelector"] = dict(spec.node_selector)
    if spec.tolerations:
        pod["tolerations"] = [t.to_wire() for t in spec.tolerations]
    if spec.priority_class_name:
        pod["priorityClassName"] = spec.priority_class_name
    template: Object = {
        "metadata": {
            "labels": {
                "app.kubernetes.io/name": "tandem-worker",
                **_pod_labels(model, role, revision),
            }
        },
        "spec": pod,
    }
    annotations: dict[str, str] = {}
    if not engine.reads_config:
        # By what those who ask the pod know how, and for which model.
        annotations[SERVED_ANNOTATION] = model.served_name
    if spec.gpus and spec.gpu_resource != GPU_RESOURCE:
        annotations[GPU_ANNOTATION] = spec.gpu_resource
    if annotations:
        template["metadata"]["annotations"] = annotations
    return patched(template, "worker", settings, spec.pod_patch)


def _mounts(engine: EnginePod) -> tuple[tuple[str, str], ...]:
    return (("config", CONFIG_DIR), ("peer", PEER_DIR)) if engine.reads_config else ()


def _resources(spec: RoleSpec) -> Object:
    requests, limits = requested(spec.resources)
    if spec.gpus:
        requests[spec.gpu_resource] = limits[spec.gpu_resource] = str(spec.gpus)
    return {k: v for k, v in (("requests", requests), ("limits", limits)) if v}
