"""Plans a Router: configuration, predictor, Deployment, Service, access to EndpointSlices."""

from __future__ import annotations

import math
from collections.abc import Mapping

from pydantic import ValidationError

from tandem_operator.budget import budget_split
from tandem_operator.plan.model import PEER_DIR, pool_name
from tandem_operator.plan.objects import (
    PEER_SECRET,
    REVISION_LABEL,
    ROUTER_LABEL,
    Object,
    Plan,
    Problem,
    Settings,
    child,
    digest,
    merge_patch,
    owner_labels,
    peer_secret,
    pod_security_context,
    probe,
    relative_path,
    security_context,
)
from tandem_operator.resources import Model, Router, TierSpec
from tandem_operator.resources.base import quantity, seconds
from tandem_router.config import RouterConfig

CONFIG_DIR = "/etc/tandem/config"
ENDPOINTS_DIR = "/etc/tandem/endpoints"
KEYS_DIR = "/etc/tandem/keys"
TENANT_KEY_DIR = "/etc/tandem/tenant-key"
PREDICTOR_DIR = "/var/lib/tandem/predictor"
EMBEDDING_DIR = "/var/lib/tandem/embedding"
TRAINING_DIR = "/var/lib/tandem/training"
SCRATCH_DIR = "/var/cache/tandem"
# Longer than a worker's: what a worker leaves unfinished another one carries on, but a client's
# stream ends with its router. An idle router ends at once.
DRAIN_TIMEOUT_S = 300

# A router's ledger needs a rate above zero; this one pays for no answer.
SMALLEST_USD_PER_HOUR = 1e-6

# Tokens that one worker makes in an hour, to turn a price per hour into one per token where no
# profile was measured: 1,000 tokens/s. Only the ratio between tiers matters for routing.
NOMINAL_TOKENS_PER_HOUR = 3_600_000
NOMINAL_INPUT_DISCOUNT = 0.25


def router_name(name: str) -> str:
    """Name of a Router's Deployment, Service and ServiceAccount."""
    return f"{name}-router"


def endpoints_name(name: str) -> str:
    """Name of the ConfigMap that lists the workers in local mode."""
    return f"{name}-endpoints"


def usd_per_hour(model: Model) -> float | None:
    """Price of one replica of each role for an hour; None when a role has no price."""
    prices = [role.usd_per_hour for role in model.spec.roles().values()]
    if any(p is None for p in prices):
        return None
    return sum(float(p) for p in prices if p is not None)


def _tier(tier: TierSpec, models: Mapping[str, Model]) -> Object:
    share = {} if tier.max_share is None else {"max_share": float(tier.max_share)}
    if tier.external is not None:
        external = tier.external
        entry: Object = {
            "name": tier.name,
            "served_model": external.model,
            "kind": "external",
            "url": external.url,
            "usd_per_1m_input_tokens": float(external.usd_per_1m_input_tokens),
            "usd_per_1m_output_tokens": float(external.usd_per_1m_output_tokens),
            **share,
        }
        if (ref := external.api_key_secret_ref) is not None:
            entry["api_key_file"] = f"{KEYS_DIR}/{tier.name}/{ref.key}"
        return entry
    if tier.model_ref is None:
        raise ValueError(f"tier {tier.name} has neither modelRef nor external")
    model = models[tier.model_ref.name]
    hourly = usd_per_hour(model) or 0.0
    output = hourly / NOMINAL_TOKENS_PER_HOUR * 1e6
    prices = {
        "usd_per_1m_input_tokens": float(
            tier.usd_per_1m_input_tokens or round(output * NOMINAL_INPUT_DISCOUNT, 6)
        ),
        "usd_per_1m_output_tokens": float(tier.usd_per_1m_output_tokens or round(output, 6)),
    }
    return {"name": tier.name, "served_model": model.served_name, "kind": "pool", **prices, **share}


def router_config(router: Router, models: Mapping[str, Model], settings: Settings) -> RouterConfig:
    """The configuration of a Router's pods; models holds every Model that a tier names.

    Raises pydantic.ValidationError when names clash.
    """
    spec = router.spec
    data: Object = {
        "name": router.metadata.name,
        "tiers": [_tier(t, models) for t in spec.tiers],
        "fallback_tier": spec.fallback,
        "predictor": {
            "type": spec.predictor.type,
            "deadline_ms": seconds(spec.predictor.deadline) * 1000,
        },
        "objective": {
            "minimize": spec.objective.minimize,
            "quality_floor": float(spec.objective.quality_floor),
        },
        "slo": _slo(router),
        "budget": {"on_exhausted": spec.budget.on_exhausted},
        "http_port": settings.router_port,
        "failover": {"wake_s": _wake_s(router, models)},
        "drain_timeout_s": DRAIN_TIMEOUT_S,
    }
    if (tokens := budget_split(router, models).tokens_usd_per_hour) is not None:
        # Each router pod keeps a ledger of its own.
        share = tokens / max(1, spec.replicas)
        data["budget"]["usd_per_hour"] = max(SMALLEST_USD_PER_HOUR, round(share, 6))
    if spec.predictor.embedding is not None:
        data["predictor"]["embedding"] = _embedding(spec.predictor.embedding)[1]
    if spec.budget.gpus is not None:
        data["budget"]["gpus"] = spec.budget.gpus
    if spec.cache.enabled:
        data["cache"] = {
            "enabled": True,
            "max_bytes": int(quantity(spec.cache.max_memory)),
            "ttl_s": seconds(spec.cache.ttl),
        }
    if spec.threshold is not None:
        data["threshold"] = float(spec.threshold)
    if spec.tenants:
        data["tenants"] = [_tenant(t.model_dump(exclude_none=True)) for t in spec.tenants]
    services = _services(router, models, settings)
    if settings.endpoints == "endpointslice" and services:
        data["endpoints"] = {
            "type": "endpointslice",
            "namespace": router.metadata.namespace,
            "services": services,
            # Written out, so that a node without mount namespaces can put the real path in.
            "credentials_dir": "/var/run/secrets/kubernetes.io/serviceaccount",
        }
    else:
        data["endpoints"] = {"type": "file"}
    return RouterConfig.model_validate(data)


def _wake_s(router: Router, models: Mapping[str, Model]) -> float:
    """How long a request for a sleeping tier is held: as long as its workers may take to start."""
    used = [models[t.model_ref.name] for t in router.spec.tiers if t.model_ref is not None]
    return max([seconds(m.spec.rollout.startup_timeout) for m in used], default=30.0)


def _tenant(fields: Object) -> Object:
    if "usd_per_hour" in fields:
        fields["usd_per_hour"] = float(fields["usd_per_hour"])
    return fields


def _slo(router: Router) -> Object:
    slo: Object = {}
    if (ttft := router.spec.slo.ttft) is not None:
        slo["ttft_ms"] = seconds(ttft.target) * 1000
        slo["percentile"] = float(ttft.percentile)
    if (tpot := router.spec.slo.tpot) is not None:
        slo["tpot_ms"] = seconds(tpot.target) * 1000
        slo.setdefault("percentile", float(tpot.percentile))
    return slo


def _services(router: Router, models: Mapping[str, Model], settings: Settings) -> list[Object]:
    return [
        {
            "tier": tier.name,
            "role": role,
            "service": pool_name(tier.model_ref.name, role),
            "port": settings.worker_port,
        }
        for tier in router.spec.tiers
        if tier.model_ref is not None
        for role in models[tier.model_ref.name].spec.roles()
    ]


def missing_models(router: Router, models: Mapping[str, Model]) -> list[str]:
    """Names of Models that the tiers want and that do not exist."""
    wanted = [t.model_ref.name for t in router.spec.tiers if t.model_ref is not None]
    return [name for name in dict.fromkeys(wanted) if name not in models]


def cross_problems(
    router: Router, models: Mapping[str, Model], routers: list[Router], policy_found: bool
) -> list[Problem]:
    """What is wrong between this Router and other objects, each with its fix."""
    problems: list[Problem] = []
    spec = router.spec
    if missing := missing_models(router, models):
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
                        "scaling.mode of one of them to External or Fixed",
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
) -> Plan:
    """What should exist for a Router.

    models and routers: those of the same namespace. policy_found: whether the AutoscalingPolicy
    that it names exists there. With a Model missing nothing is planned anew and what runs keeps
    running.
    """
    plan = Plan(problems=cross_problems(router, models, routers, policy_found))
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
        config = router_config(router, models, settings)
    except ValidationError as error:
        text = "; ".join(e["msg"].removeprefix("Value error, ") for e in error.errors())
        plan.problems.append(Problem("Accepted", "InvalidRouter", text))
        return plan
    name = router_name(router.metadata.name)
    text = config.model_dump_json(exclude_unset=True, indent=1) + "\n"
    template = _pod_template(router, "", settings)
    revision = digest([text, template, _training_digest(router, settings)])
    plan.create.append(peer_secret(router.metadata.namespace, peer_token))
    plan.apply.append(
        child(
            router,
            "v1",
            "ConfigMap",
            f"{name}-{revision}",
            {"immutable": True, "data": {"config.json": text}},
            {REVISION_LABEL: revision},
        )
    )
    plan.apply += _access(router, name, settings)
    if settings.endpoints == "file":
        plan.keep.add(("ConfigMap", endpoints_name(router.metadata.name)))
    plan.apply.append(_service(router, name))
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
                    "strategy": {
                        "type": "RollingUpdate",
                        "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0},
                    },
                    "template": _pod_template(router, revision, settings),
                }
            },
            {REVISION_LABEL: revision},
        )
    )
    plan.apply.append(
        child(
            router,
            "policy/v1",
            "PodDisruptionBudget",
            name,
            {
                "spec": {
                    "maxUnavailable": 1,
                    "selector": {"matchLabels": {ROUTER_LABEL: router.metadata.name}},
                }
            },
        )
    )
    return plan


def _training_digest(router: Router, settings: Settings) -> str:
    training = router.spec.predictor.training
    return settings.data_digests.get(training.data, "") if training is not None else ""


def _service(router: Router, name: str) -> Object:
    return child(
        router,
        "v1",
        "Service",
        name,
        {
            "spec": {
                "type": router.spec.service_type,
                "selector": {ROUTER_LABEL: router.metadata.name},
                "ports": [
                    {
                        "name": "http",
                        "port": router.spec.port,
                        "targetPort": "http",
                        "protocol": "TCP",
                    }
                ],
            }
        },
    )


def _access(router: Router, name: str, settings: Settings) -> list[Object]:
    """The ServiceAccount and, where routers watch EndpointSlices, the right to do so."""
    slices = settings.endpoints == "endpointslice"
    account = child(router, "v1", "ServiceAccount", name, {"automountServiceAccountToken": slices})
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
    _predictor(router, image, args, mounts, volumes, init, settings)
    for tier in router.spec.tiers:
        if tier.external is not None and (ref := tier.external.api_key_secret_ref) is not None:
            volume = f"key-{tier.name}"
            mounts.append(
                {"name": volume, "mountPath": f"{KEYS_DIR}/{tier.name}", "readOnly": True}
            )
            volumes.append({"name": volume, "secret": {"secretName": ref.name}})
    if (key := router.spec.key_secret_ref) is not None:
        args += ["--key-secret-file", f"{TENANT_KEY_DIR}/{key.key}"]
        mounts.append({"name": "tenant-key", "mountPath": TENANT_KEY_DIR, "readOnly": True})
        volumes.append({"name": "tenant-key", "secret": {"secretName": key.name}})
    resources: Object = {}
    if router.spec.resources.cpu:
        resources.setdefault("requests", {})["cpu"] = router.spec.resources.cpu
    if router.spec.resources.memory:
        resources.setdefault("requests", {})["memory"] = router.spec.resources.memory
        resources["limits"] = {"memory": router.spec.resources.memory}
    container: Object = {
        "name": "router",
        "image": image,
        "imagePullPolicy": settings.image_pull_policy,
        "args": args,
        "env": [
            {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
            {"name": "POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
            {"name": "TANDEM_REVISION", "value": revision},
        ],
        "ports": [{"name": "http", "containerPort": settings.router_port, "protocol": "TCP"}],
        "resources": resources,
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "startupProbe": probe("/health", "http", 2, 60),
        "readinessProbe": probe("/ready", "http", 2, 2),
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
    }
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
    if router.spec.pod_patch:
        template = merge_patch(template, router.spec.pod_patch)
    return template


def _source(uri: str, name: str) -> tuple[Object, str]:
    """The volume that shows a URI, and the path of the thing inside the volume."""
    scheme, _, rest = uri.partition("://")
    if scheme == "configmap":
        config, _, key = rest.partition("/")
        return {"name": name, "configMap": {"name": config}}, key
    if scheme == "pvc":
        claim, _, sub = rest.partition("/")
        return {"name": name, "persistentVolumeClaim": {"claimName": claim}}, sub
    return {"name": name, "hostPath": {"path": rest}}, ""


def _embedding(uri: str) -> tuple[Object | None, str]:
    """The volume that shows an embedding's directory, if one is needed, and its path in a pod."""
    scheme, _, rest = uri.partition("://")
    if scheme == "image":
        return None, rest
    volume, inside = _source(uri, "embedding")
    return volume, f"{EMBEDDING_DIR}/{inside}".rstrip("/")


def _predictor(
    router: Router,
    image: str,
    args: list[str],
    mounts: list[Object],
    volumes: list[Object],
    init: list[Object],
    settings: Settings,
) -> None:
    """Add the trained predictor, or the step that trains one, to a router pod."""
    predictor = router.spec.predictor
    if predictor.type != "Learned":
        return
    if predictor.embedding is not None:
        volume, _ = _embedding(predictor.embedding)
        if volume is not None:
            volumes.append(volume)
            mounts.append({"name": "embedding", "mountPath": EMBEDDING_DIR, "readOnly": True})
    if predictor.artifact is not None and predictor.artifact.startswith("image://"):
        args += ["--predictor", predictor.artifact.removeprefix("image://")]
        return
    if predictor.artifact is not None:
        volume, inside = _source(predictor.artifact, "predictor")
        volumes.append(volume)
        mounts.append({"name": "predictor", "mountPath": PREDICTOR_DIR, "readOnly": True})
        args += ["--predictor", f"{PREDICTOR_DIR}/{inside}".rstrip("/")]
        return
    if predictor.training is None:
        return
    uri = predictor.training.data
    scheme, _, rest = uri.partition("://")
    data, training_mounts = rest, []
    if scheme != "image":
        if scheme == "file":
            folder, _, inside = rest.rpartition("/")
            volume = {"name": "training", "hostPath": {"path": folder or "/"}}
        else:
            volume, inside = _source(uri, "training")
        volumes.append(volume)
        data = f"{TRAINING_DIR}/{inside}".rstrip("/")
        training_mounts = [{"name": "training", "mountPath": TRAINING_DIR, "readOnly": True}]
    known = settings.data_digests.get(uri)
    store: Object = {"name": "predictor", "emptyDir": {}}
    if settings.predictor_cache and known:
        path = f"{settings.predictor_cache}/{known}"
        store = {"name": "predictor", "hostPath": {"path": path, "type": "DirectoryOrCreate"}}
    volumes.append(store)
    mounts.append({"name": "predictor", "mountPath": PREDICTOR_DIR, "readOnly": True})
    args += ["--predictor", f"{PREDICTOR_DIR}/artifact"]
    init.append(
        {
            "name": "train-predictor",
            "image": image,
            "imagePullPolicy": settings.image_pull_policy,
            "command": ["python", "-m", "tandem_operator.training"],
            "args": [data, PREDICTOR_DIR],
            "env": [{"name": "TMPDIR", "value": SCRATCH_DIR}],
            "terminationMessagePolicy": "FallbackToLogsOnError",
            "securityContext": security_context(),
            "volumeMounts": [
                *training_mounts,
                {"name": "predictor", "mountPath": PREDICTOR_DIR},
                {"name": "scratch", "mountPath": SCRATCH_DIR},
            ],
        }
    )
