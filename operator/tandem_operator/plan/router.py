"""Plans a Router: configuration, predictor, Deployment, Service, access to EndpointSlices."""

from __future__ import annotations

import math
from collections.abc import Mapping

from pydantic import ValidationError

from tandem_operator.plan.entrance import entrances
from tandem_operator.plan.gateway import add_picker, gateway_objects, gateway_problem
from tandem_operator.plan.made_of import MADE_OF_ANNOTATION, made_of
from tandem_operator.plan.measured_prices import TokenPrice
from tandem_operator.plan.network import router_policy
from tandem_operator.plan.objects import (
    CONFIG_DIR,
    PEER_DIR,
    PEER_SECRET,
    REVISION_LABEL,
    ROUTER_LABEL,
    SCRATCH_DIR,
    Plan,
    Problem,
    Settings,
    child,
    digest,
    disruption_budget,
    foreign_labels,
    invalid_setting,
    log_variables,
    owner_labels,
    patched,
    peer_secret,
    pod_security_context,
    probe,
    relative_path,
    requested,
    security_context,
    spread,
)
from tandem_operator.plan.predictor import add_predictor
from tandem_operator.plan.predictor_copy import copied_source, copy_name
from tandem_operator.plan.provider_keys import add_provider_keys
from tandem_operator.plan.router_config import (
    DRAIN_TIMEOUT_S,
    router_config,
    usd_per_hour,
)
from tandem_operator.plan.router_store import add_store, store_claims, strategy
from tandem_operator.plan.training import training_objects
from tandem_operator.resources import Model, Router
from tandem_operator.resources.base import Object
from tandem_router.config.live import live_part, static_part

ENDPOINTS_DIR = "/etc/tandem/endpoints"
TENANT_KEY_DIR = "/etc/tandem/tenant-key"
METRICS_DIR = "/etc/tandem/metrics"


def router_name(name: str) -> str:
    """Name of a Router's Deployment, Service and ServiceAccount."""
    return f"{name}-router"


def endpoints_name(name: str) -> str:
    """Name of the ConfigMap that lists the workers in local mode."""
    return f"{name}-endpoints"


def rates_name(name: str) -> str:
    """Name of the ConfigMap that keeps what the control loop has learnt of the week."""
    return f"{name}-hourly-rates"


def missing_models(router: Router, models: Mapping[str, Model]) -> list[str]:
    """Names of Models that the tiers want and that do not exist, or are wrong."""
    wanted = [t.model_ref.name for t in router.spec.tiers if t.model_ref is not None]
    return [name for name in dict.fromkeys(wanted) if name not in models]


def cross_problems(
    router: Router,
    models: Mapping[str, Model],
    routers: list[Router],
    policy_found: bool,
    policy_error: str,
    model_errors: Mapping[str, str],
) -> list[Problem]:
    """What is wrong between this Router and other objects, each with its fix."""
    problems: list[Problem] = []
    spec = router.spec
    for name, error in model_errors.items():
        text = f"Model {name} is not accepted, and this Router stays as it is meanwhile: {error}"
        problems.append(Problem("ModelsResolved", "ModelInvalid", text))
    if missing := [n for n in missing_models(router, models) if n not in model_errors]:
        names = ", ".join(missing)
        problems.append(
            Problem(
                "ModelsResolved",
                "ModelMissing",
                f"no Model {names} in this namespace; create it or correct modelRef",
            )
        )
    used = [t.model_ref.name for t in spec.tiers if t.model_ref is not None]
    if spec.scaling.mode == "Managed":
        for other in routers:
            if other.metadata.name == router.metadata.name or other.spec.scaling.mode != "Managed":
                continue
            others = {t.model_ref.name for t in other.spec.tiers if t.model_ref is not None}
            if shared := [m for m in used if m in others]:
                problems.append(
                    Problem(
                        "Accepted",
                        "TwoManagers",
                        f"Router {other.metadata.name} also manages Model {shared[0]}; set "
                        "scaling.mode of one of them to External",
                    )
                )
    if spec.scaling.policy_ref is not None and not policy_found:
        problems.append(
            Problem(
                "Accepted",
                "PolicyMissing",
                f"no AutoscalingPolicy {spec.scaling.policy_ref.name} in this namespace, so "
                "built-in values hold; create it or correct scaling.policyRef",
            )
        )
    if policy_error and spec.scaling.policy_ref is not None:
        problems.append(
            Problem(
                "Accepted",
                "PolicyInvalid",
                f"AutoscalingPolicy {spec.scaling.policy_ref.name} is not accepted, so built-in "
                f"values hold: {policy_error}",
            )
        )
    if spec.budget.usd_per_hour is not None:
        for name in used:
            if name in models and usd_per_hour(models[name]) is None:
                problems.append(
                    Problem(
                        "Accepted",
                        "UnpricedRole",
                        f"budget.usdPerHour needs prices; set usdPerHour on every role of Model "
                        f"{name}",
                    )
                )
    return problems


def plan_router(
    router: Router,
    models: Mapping[str, Model],
    routers: list[Router],
    settings: Settings,
    peer_token: str,
    policy_found: bool = True,
    policy_error: str = "",
    measured: Mapping[str, TokenPrice] | None = None,
    training_run: str = "",
    predictor_copy: Object | None = None,
    model_errors: Mapping[str, str] | None = None,
) -> Plan:
    """What should exist for a Router.

    models and routers: those of the same namespace. policy_found: whether the AutoscalingPolicy
    that it names exists there; policy_error: what is wrong with it. measured: prices of
    tokens by tier. training_run: the training of a predictor that its pods ask for.
    predictor_copy: the copy of the ConfigMap that holds its predictor. model_errors: what is wrong
    with Models that are there and not among models. With a Model missing or wrong nothing is
    planned anew and what runs keeps running.
    """
    errors = model_errors or {}
    problems = cross_problems(router, models, routers, policy_found, policy_error, errors)
    plan = Plan(problems=problems)
    if missing_models(router, models):
        return plan
    predictor = router.spec.predictor
    for uri in (
        predictor.artifact or (predictor.training.data if predictor.training else ""),
        predictor.embedding or "",
    ):
        if uri.startswith("file://") and not uri.startswith("file:///"):
            plan.problems.append(Problem("Accepted", "RelativePath", relative_path(uri)))
            return plan
    try:
        config = router_config(router, models, settings, measured)
    except ValidationError as error:
        text = "; ".join(invalid_setting(each) for each in error.errors())
        plan.problems.append(Problem("Accepted", "InvalidRouter", text))
        return plan
    name = router_name(router.metadata.name)
    text = config.model_dump_json(exclude_unset=True, indent=1) + "\n"
    template = _pod_template(router, "", settings)
    # What can change while a router runs makes no new pods: it is pushed to those that run.
    revision = digest([static_part(config), template, _training_digest(router, settings)])
    plan.live, plan.revision = live_part(config), revision
    final = _pod_template(router, revision, settings)
    own = {**owner_labels(router), REVISION_LABEL: revision}
    if taken := foreign_labels(final, own):
        plan.problems.append(Problem("Accepted", "LabelTaken", f"spec.{taken}"))
        return plan
    plan.create.append(peer_secret(router.metadata.namespace, peer_token))
    plan.apply.append(
        child(
            router,
            "v1",
            "ConfigMap",
            f"{name}-{revision}",
            {"data": {"config.json": text}},
            {REVISION_LABEL: revision},
        )
    )
    if predictor_copy is not None:
        plan.apply.append(predictor_copy)
    elif copied_source(router) is not None:
        plan.keep.add(("ConfigMap", copy_name(router.metadata.name)))
    plan.apply += store_claims(router, settings)
    plan.apply += _access(router, name, settings)
    if settings.endpoints == "file":
        plan.keep.add(("ConfigMap", endpoints_name(router.metadata.name)))
    if router.spec.scaling.has_loop:
        plan.keep.add(("ConfigMap", rates_name(router.metadata.name)))
    if settings.network.enabled:
        plan.apply.append(router_policy(router, name, settings))
    plan.apply += entrances(router, name, settings)
    plan.apply += training_objects(router, settings, name, training_run)
    plan.apply += gateway_objects(router, name, settings)
    if (unpointed := gateway_problem(router, settings)) is not None:
        plan.problems.append(unpointed)
    plan.apply.append(
        child(
            router,
            "apps/v1",
            "Deployment",
            name,
            {
                "spec": {
                    "replicas": router.spec.replicas,
                    "revisionHistoryLimit": 2,
                    "selector": {"matchLabels": {ROUTER_LABEL: router.metadata.name}},
                    "strategy": strategy(router, settings),
                    "template": final,
                }
            },
            {REVISION_LABEL: revision},
            {MADE_OF_ANNOTATION: made_of(template)},
        )
    )
    plan.apply.append(disruption_budget(router, name, {ROUTER_LABEL: router.metadata.name}))
    return plan


def _training_digest(router: Router, settings: Settings) -> str:
    training = router.spec.predictor.training
    return settings.data_digests.get(training.data, "") if training is not None else ""


def _access(router: Router, name: str, settings: Settings) -> list[Object]:
    """The ServiceAccount and, where routers watch EndpointSlices, the right to do so."""
    slices = settings.endpoints == "endpointslice"
    body = {"automountServiceAccountToken": slices}
    marks = settings.pods.router_annotations
    account = child(router, "v1", "ServiceAccount", name, body, annotations=marks)
    if not slices:
        return [account]
    group = "rbac.authorization.k8s.io"
    rules = [
        {
            "apiGroups": ["discovery.k8s.io"],
            "resources": ["endpointslices"],
            "verbs": ["get", "list", "watch"],
        }
    ]
    subject = {"kind": "ServiceAccount", "name": name, "namespace": router.metadata.namespace}
    return [
        account,
        child(router, f"{group}/v1", "Role", name, {"rules": rules}),
        child(
            router,
            f"{group}/v1",
            "RoleBinding",
            name,
            {
                "roleRef": {"apiGroup": group, "kind": "Role", "name": name},
                "subjects": [subject],
            },
        ),
    ]


def _pod_template(router: Router, revision: str, settings: Settings) -> Object:
    name = router_name(router.metadata.name)
    image = router.spec.image or settings.router_image
    args = ["--config", f"{CONFIG_DIR}/config.json", "--peer-token-file", f"{PEER_DIR}/token"]
    mounts: list[Object] = [
        {"name": "config", "mountPath": CONFIG_DIR, "readOnly": True},
        {"name": "peer", "mountPath": PEER_DIR, "readOnly": True},
        {"name": "scratch", "mountPath": SCRATCH_DIR},
    ]
    volumes: list[Object] = [
        {"name": "config", "configMap": {"name": f"{name}-{revision}"}},
        {"name": "peer", "secret": {"secretName": PEER_SECRET}},
        {"name": "scratch", "emptyDir": {}},
    ]
    if settings.endpoints == "file":
        args += ["--endpoints", f"{ENDPOINTS_DIR}/endpoints.json"]
        mounts.append({"name": "endpoints", "mountPath": ENDPOINTS_DIR, "readOnly": True})
        source = {"name": endpoints_name(router.metadata.name), "optional": True}
        volumes.append({"name": "endpoints", "configMap": source})
    init: list[Object] = []
    add_predictor(router, image, args, mounts, volumes, init, settings)
    add_provider_keys(router, mounts, volumes)
    if (key := router.spec.key_secret_ref) is not None:
        args += ["--key-secret-file", f"{TENANT_KEY_DIR}/{key.key}"]
        mounts.append({"name": "tenant-key", "mountPath": TENANT_KEY_DIR, "readOnly": True})
        volumes.append({"name": "tenant-key", "secret": {"secretName": key.name}})
    if (metrics := router.spec.metrics_token_secret_ref) is not None:
        args += ["--metrics-token-file", f"{METRICS_DIR}/{metrics.key}"]
        mounts.append({"name": "metrics-token", "mountPath": METRICS_DIR, "readOnly": True})
        volumes.append({"name": "metrics-token", "secret": {"secretName": metrics.name}})
    add_store(router, settings, args, mounts, volumes)
    requests, limits = requested(router.spec.resources)
    resources = {k: v for k, v in (("requests", requests), ("limits", limits)) if v}
    container: Object = {
        "name": "router",
        "image": image,
        "imagePullPolicy": settings.image_pull_policy,
        "args": args,
        "env": [
            {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
            # All of them: in a dual-stack cluster its Service may lead to either family.
            {"name": "POD_IPS", "valueFrom": {"fieldRef": {"fieldPath": "status.podIPs"}}},
            *log_variables(settings),
        ],
        "ports": [{"name": "http", "containerPort": settings.router_port, "protocol": "TCP"}],
        "resources": resources,
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "startupProbe": probe("/health", "http", 2, 60),
        # Not ready is what it says of itself; ten seconds without a word are a busy machine's, and
        # a Service without routers answers nobody.
        "readinessProbe": probe("/ready", "http", 2, 5, timeout_s=5),
        "livenessProbe": probe("/health", "http", 10, 6, timeout_s=5),
        "lifecycle": {"preStop": {"sleep": {"seconds": settings.pre_stop_s}}},
        "securityContext": security_context(),
        "volumeMounts": mounts,
    }
    pod: Object = {
        "serviceAccountName": name,
        "automountServiceAccountToken": settings.endpoints == "endpointslice",
        "securityContext": pod_security_context(),
        "terminationGracePeriodSeconds": math.ceil(DRAIN_TIMEOUT_S + settings.pre_stop_s + 5),
        "containers": [container],
        "volumes": volumes,
        "topologySpreadConstraints": [spread({ROUTER_LABEL: router.metadata.name})],
    }
    add_picker(router, container, args, mounts, volumes, settings)
    if init:
        pod["initContainers"] = init
    template: Object = {
        "metadata": {
            "labels": {
                **owner_labels(router),
                "app.kubernetes.io/name": "tandem-router",
                REVISION_LABEL: revision,
            }
        },
        "spec": pod,
    }
    return patched(template, "router", settings, router.spec.pod_patch)
