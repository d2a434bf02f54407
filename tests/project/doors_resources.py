"""For every field of the custom resources two values, and all that can be seen of the difference.

A row is a path as it stands in YAML and two values; fields with few values (true or false, one of a
list) need no row, all of them are tried. `given` sets other fields in both objects first, where the
field is about them. ABSENT leaves the field out.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from doors_kit import Door
from stored_cluster import NOW
from tandem_operator.autoscale.router_loops import ManagedScaling
from tandem_operator.manifests import ManifestError, load_text
from tandem_operator.plan import Settings, plan_model, plan_router, revision_of
from tandem_operator.plan.decode import parse
from tandem_operator.plan.model_status import LinkTest, model_status, pool_status
from tandem_operator.plan.router_facts import LatencyFacts, PredictorFacts, TierFacts, TrafficFacts
from tandem_operator.plan.router_status import router_status, service_endpoint
from tandem_operator.resources import AutoscalingPolicy, Model, Router
from tandem_operator.resources.base import Object
from tandem_operator.resources.rules import violations

ABSENT = object()


@dataclass(frozen=True)
class Row:
    """Two values of a field."""

    a: Any
    b: Any
    given: Mapping[str, Any] = field(default_factory=dict)


ROLE: Object = {
    "replicas": 2,
    "minReplicas": 1,
    "maxReplicas": 4,
    "usdPerHour": "1",
    "resources": {"cpu": "4", "memory": "16Gi"},
    "nodeSelector": {"gpu": "h100"},
    "tolerations": [{"key": "gpu", "operator": "Equal", "value": "yes", "effect": "NoSchedule"}],
    "priorityClassName": "high",
}
WEIGHTS: Object = {
    "source": "hf://org/name@v1",
    "secretRef": {"name": "hub"},
    "cache": {"size": "80Gi", "storageClassName": "shared"},
}
BASE: dict[str, Object] = {
    "Model": {"weights": WEIGHTS, "unified": ROLE},
    "Model split": {"weights": WEIGHTS, "prefill": ROLE, "decode": ROLE},
    "Router": {
        "tiers": [
            {"name": "small", "modelRef": {"name": "s"}},
            {
                "name": "large",
                "external": {
                    "url": "https://a.test/v1",
                    "model": "big",
                    "apiKeySecretRef": {"name": "k"},
                },
            },
        ],
        "slo": {"ttft": {"target": "500ms"}, "tpot": {"target": "50ms"}},
        "budget": {"usdPerHour": "9"},
        "keySecretRef": {"name": "tenants"},
        "tenants": [{"name": "a", "keyHashes": ["hmac-sha256:" + 64 * "0"]}],
    },
    "AutoscalingPolicy": {
        "schedules": [
            {"name": "day", "cron": "0 8 * * *", "duration": "1h", "minReplicas": 9},
        ],
    },
    "WorkerPool": {"modelRef": {"name": "m"}, "role": "decode", "replicas": 2},
}
LIST_AT = {"tiers.external": "tiers[1].external", "tiers.modelRef": "tiers[0].modelRef"}
CACHED = {"cache.enabled": True}
LEARNED = {"predictor.artifact": "pvc://claim/p"}
CAPTURED = {"predictor.training.data": "pvc://claim/a", "learning.capture": "Prompts"}
RETRAINED = {**CAPTURED, "predictor.training.fromLabels": True}
BOTH_MODELS = {
    "tiers": [
        {"name": "small", "modelRef": {"name": "s"}},
        {"name": "large", "modelRef": {"name": "l"}},
    ]
}
MANAGED = {**BOTH_MODELS, "scaling.mode": "Managed", "budget": {}}

JUDGED = {
    "learning.shadowShare": "0.1",
    "learning.judge.url": "https://judge.test/v1",
    "learning.judge.model": "arbiter",
}

_ROLE_ROWS = {
    "replicas": Row(1, 2),
    "minReplicas": Row(1, 2),
    "maxReplicas": Row(3, 4),
    "gpus": Row(0, 1),
    "gpuResource": Row("nvidia.com/gpu", "amd.com/gpu", {"ROLE.gpus": 1}),
    "tensorParallel": Row(1, 2),
    "usdPerHour": Row("1", "2"),
    "resources.cpu": Row("1", "2"),
    "resources.memory": Row("1Gi", "2Gi"),
    "nodeSelector": Row({"a": "b"}, {"a": "c"}),
    "tolerations.key": Row("a", "b"),
    "tolerations.value": Row("a", "b"),
    "priorityClassName": Row("a", "b"),
    "podPatch": Row({"spec": {"hostNetwork": True}}, {"spec": {"hostIPC": True}}),
}
_POLICY_ROWS = {
    "signals.target": Row(
        "0.2", "0.8", {"ROLE.signals": [{"name": "KVUtilization", "target": "1"}]}
    ),
    "up.window": Row("0s", "120s"),
    "up.maxStep": Row(1, 8),
    "up.period": Row("0s", "60s"),
    "down.window": Row("10s", "900s", {"schedules": []}),
    "down.maxStep": Row(
        1, 8, {"ROLE.down.window": "10s", "ROLE.down.period": "0s", "schedules": []}
    ),
    "down.period": Row("0s", "120s", {"ROLE.down.window": "10s", "schedules": []}),
}


def _at(prefix: str, rows: Mapping[str, Row]) -> dict[str, Row]:
    return {
        f"{prefix}.{path}": Row(
            r.a, r.b, {k.replace("ROLE.", f"{prefix}."): v for k, v in r.given.items()}
        )
        for path, r in rows.items()
    }


ROWS: dict[str, dict[str, Row]] = {
    "Model": {
        "weights.source": Row("hf://org/name@v1", "hf://org/name@v2"),
        "weights.secretRef.name": Row("a", "b"),
        "weights.cache.size": Row("1Gi", "2Gi"),
        "weights.cache.storageClassName": Row("a", "b"),
        "servedName": Row("a", "b"),
        "engine.type": Row("VLLM", "OpenAI", {"image": "v"}),
        "engine.args": Row(
            {"max-loras": "2"}, {"max-loras": "4"}, {"engine.type": "VLLM", "image": "v"}
        ),
        "engine.maxModelLen": Row(1024, 2048),
        "engine.maxNumSeqs": Row(8, 16),
        "engine.maxBatchedTokens": Row(1024, 2048),
        "engine.kvCacheMemory": Row("1Gi", "2Gi"),
        **_at("unified", _ROLE_ROWS),
        **_at("prefill", _ROLE_ROWS),
        **_at("decode", _ROLE_ROWS),
        "kvTransfer.maxInflight": Row("64Mi", "32Mi"),
        "kvTransfer.localPrefillMaxTokens": Row(0, 64),
        "rollout.maxSurge": Row(1, 2),
        "rollout.maxUnavailable": Row(0, 1),
        "rollout.startupTimeout": Row("5m", "10m"),
        "drain.timeout": Row("30s", "60s"),
        "image": Row("a:1", "a:2"),
    },
    "Router": {
        "tiers.name": Row("small", "tiny"),
        "tiers.modelRef.name": Row("s", "l"),
        "tiers.external.url": Row("https://a.test/v1", "https://b.test/v1"),
        "tiers.external.model": Row("big", "bigger"),
        "tiers.external.apiKeySecretRef.name": Row("a", "b"),
        "tiers.external.apiKeySecretRef.key": Row("a", "b"),
        "tiers.external.usdPer1MInputTokens": Row("1", "2"),
        "tiers.external.usdPer1MOutputTokens": Row("1", "2"),
        "tiers.external.usdPer1MCachedInputTokens": Row("1", "2"),
        "tiers.external.usdPer1MReasoningTokens": Row("1", "2"),
        "tiers.external.capabilities.contextLength": Row(1000, 2000),
        "tiers.maxShare": Row("0.5", "0.6"),
        "tiers.usdPer1MInputTokens": Row("1", "2"),
        "tiers.usdPer1MOutputTokens": Row("1", "2"),
        "fallbackTier": Row("small", "large"),
        "predictor.artifact": Row("pvc://claim/a", "pvc://claim/b"),
        "predictor.embedding": Row("pvc://claim/e", "pvc://claim/f", LEARNED),
        "predictor.training.data": Row("pvc://claim/a", "pvc://claim/b"),
        "predictor.training.fromLabels": Row(None, None, CAPTURED),
        "predictor.training.every": Row("1h", "2h", RETRAINED),
        "predictor.training.minLabels": Row(100, 200, RETRAINED),
        "predictor.deadline": Row("20ms", "30ms"),
        "cascade.deadline": Row("100ms", "200ms", LEARNED),
        "cascade.streams": Row(None, None, LEARNED),
        "threshold": Row("0.1", "0.2"),
        "objective.qualityFloor": Row("0.9", "0.95", LEARNED),
        "slo.ttft.percentile": Row(90, 99),
        "slo.ttft.target": Row("100ms", "1s"),
        "slo.tpot.percentile": Row(90, 99),
        "slo.tpot.target": Row("10ms", "100ms"),
        "budget.gpus": Row(1, 40, MANAGED),
        "budget.usdPerHour": Row("9", "10"),
        "cache.maxMemory": Row("1Mi", "2Mi", CACHED),
        "cache.ttl": Row("1h", "2h", CACHED),
        "tenants.name": Row("a", "b"),
        "tenants.keyHashes": Row(["hmac-sha256:" + 64 * "0"], ["hmac-sha256:" + 64 * "1"]),
        "tenants.allowedTiers": Row(["small"], ["large"]),
        "tenants.maxConcurrency": Row(1, 2),
        "tenants.requestsPerMinute": Row(1, 2),
        "tenants.tokensPerMinute": Row(1, 2),
        "tenants.usdPerHour": Row("1", "2"),
        "tenants.maxCostUsd": Row("1", "2"),
        "learning.shadowShare": Row("0.1", "0.2", JUDGED),
        "learning.dailyUsd": Row("1", "2", JUDGED),
        "learning.judge.type": Row("Exact", "Numeric", {"learning.shadowShare": "0.1"}),
        "learning.judge.url": Row("http://a.test/v1", "http://b.test/v1", JUDGED),
        "learning.judge.model": Row("a", "b", JUDGED),
        "learning.judge.apiKeySecretRef.name": Row("a", "b", JUDGED),
        "learning.judge.apiKeySecretRef.key": Row(
            "a", "b", {**JUDGED, "learning.judge.apiKeySecretRef.name": "s"}
        ),
        "learning.judge.usdPer1MInputTokens": Row("1", "2", JUDGED),
        "learning.judge.usdPer1MOutputTokens": Row("1", "2", JUDGED),
        "learning.retention": Row("24h", "48h", JUDGED),
        "learning.redact": Row(["Emails"], ["Numbers"], JUDGED),
        "keySecretRef.name": Row("a", "b"),
        "keySecretRef.key": Row("a", "b"),
        "metricsTokenSecretRef.name": Row("a", "b"),
        "metricsTokenSecretRef.key": Row("a", "b", {"metricsTokenSecretRef.name": "s"}),
        "access.allowedHosts": Row(ABSENT, ["chat.example"]),
        "gateway.namespace": Row("gateways", "istio-ingress"),
        "gateway.tlsSecretName": Row(
            "picker-tls", "other-tls", given={"gateway": {"namespace": "gateways"}}
        ),
        "access.corsOrigins": Row([], ["https://app.example"]),
        "store.sqlite.size": Row("1Gi", "2Gi"),
        "store.sqlite.storageClassName": Row("a", "b", {"store.sqlite.size": "1Gi"}),
        "store.postgres.secretRef.name": Row("a", "b"),
        "store.postgres.secretRef.key": Row("a", "b", {"store.postgres.secretRef.name": "s"}),
        "scaling.policyRef.name": Row("default", "missing", MANAGED),
        "replicas": Row(1, 2),
        "resources.cpu": Row("1", "2"),
        "resources.memory": Row("1Gi", "2Gi"),
        "port": Row(8000, 8001),
        "image": Row("a:1", "a:2"),
        "podPatch": Row({"spec": {"hostNetwork": True}}, {"spec": {"hostIPC": True}}),
        # Given for fields whose values are all tried.
        "predictor.type": Row(None, None),
        "budget.onExhausted": Row(None, None),
        "cache.enabled": Row(None, None),
        "cache.eviction": Row(None, None, CACHED),
        "scaling.mode": Row(None, None, {**BOTH_MODELS, "budget": {}}),
    },
    "AutoscalingPolicy": {
        **_at("prefill", _POLICY_ROWS),
        **_at("decode", _POLICY_ROWS),
        **_at("unified", _POLICY_ROWS),
        "query": Row(
            "3", "7", {"unified.signals": [{"name": "Prometheus", "target": "1"}], "schedules": []}
        ),
        "schedules.name": Row("day", "night"),
        "schedules.cron": Row("0 8 * * *", "0 9 * * *"),
        "schedules.timeZone": Row("UTC", "Europe/Berlin"),
        "schedules.duration": Row("1h", "1m"),
        "schedules.minReplicas": Row(9, 10),
        "idle.after": Row("1m", "30m", {"idle.scaleToZero": True, "schedules": []}),
        "idle.scaleToZero": Row(None, None, {"idle.after": "1m", "schedules": []}),
    },
    "WorkerPool": {
        "modelRef.name": Row("m", "n"),
        "replicas": Row(1, 2),
        "minReplicas": Row(0, 3),
        "maxReplicas": Row(1, 3),
    },
}
for _role in ("prefill", "decode", "unified"):
    _signals = {f"{_role}.signals": [{"name": "KVUtilization", "target": "0.3"}]}
    ROWS["AutoscalingPolicy"][f"{_role}.signals.name"] = Row(None, None, _signals)


def changed(spec: Object, path: str, value: Any) -> Object:
    """A copy of a spec with one field set; the first item of a list, unless LIST_AT says which."""
    spec = copy.deepcopy(spec)
    for prefix, place in LIST_AT.items():
        if path.startswith(prefix):
            path = place + path.removeprefix(prefix)
    at: Any = spec
    *parents, last = path.split(".")
    for part in parents:
        name, _, index = part.partition("[")
        at = at.setdefault(name, {})
        if isinstance(at, list):
            at = at[int(index.rstrip("]") or 0)] if index else at[0]
    if value is ABSENT:
        at.pop(last, None)
    else:
        at[last] = value
    return spec


def variants(kind: str, door: Door, rows: Mapping[str, Row]) -> list[Object] | None:
    """Specs that differ in this field alone; None where no row says with which values."""
    row = rows.get(door.path)
    values = door.options or ([] if row is None else [row.a, row.b])
    if not values:
        return None
    split = kind == "Model" and door.path.split(".")[0] in ("prefill", "decode", "kvTransfer")
    spec = BASE["Model split" if split else kind]
    for path, value in (row.given if row is not None else {}).items():
        spec = changed(spec, path, value)
    return [changed(spec, door.path, value) for value in values]


def alike(kind: str, door: Door, rows: Mapping[str, Row]) -> str | None:
    """Why a field has no shown effect; None where all its values can be told apart."""
    found = variants(kind, door, rows)
    if found is None:
        return f"{kind} {door.path}: no row; add two values to tests/project/doors_resources.py"
    seen = [OBSERVE[kind](spec) for spec in found]
    if OBSERVE[kind](found[0]) != seen[0]:
        return f"{kind} {door.path}: what is seen differs where nothing does"
    for (i, a), (j, b) in itertools.combinations(enumerate(seen), 2):
        if a == b:
            return f"{kind} {door.path}: nothing shows which of values {i} and {j} it has"
    return None


# What can be seen ---------------------------------------------------------------------------------


def typed(kind: str, name: str, spec: Object) -> Any:
    """The resource as the operator reads it, or what it says of it."""
    metadata = {"name": name, "namespace": "default", "uid": "u"}
    found = parse({"kind": kind, "metadata": metadata, "spec": spec})
    return found if isinstance(found, (Model, Router, AutoscalingPolicy)) else str(found)


def refusal(kind: str, spec: Object) -> str | None:
    """What `tandem apply` says of it; None when it is taken."""
    body = {"apiVersion": "tandem.dev/v1alpha1", "kind": kind, "metadata": {"name": "x"}}
    try:
        load_text(yaml.safe_dump({**body, "spec": spec}))
    except ManifestError as error:
        return str(error)
    return None


def _pod(template: Object, name: str) -> Object:
    metadata = {"name": name, "namespace": "default", "labels": template["metadata"]["labels"]}
    status = {"podIP": "127.0.0.1", "conditions": [{"type": "Ready", "status": "True"}]}
    return {"kind": "Pod", "metadata": metadata, "spec": template["spec"], "status": status}


def _pods(planned: list[Object]) -> list[Object]:
    deployments = [o for o in planned if o["kind"] == "Deployment"]
    return [_pod(d["spec"]["template"], f"{d['metadata']['name']}-0") for d in deployments]


def see_model(spec: Object) -> str:
    """Children, problems and status of a Model."""
    model = typed("Model", "m", spec)
    said = refusal("Model", spec)
    if isinstance(model, str) or said:
        return f"{model if isinstance(model, str) else ''} {said}"
    plan = plan_model(model, [], [], Settings(), "t")
    pods = _pods(plan.apply)
    revision = revision_of(model, Settings())
    status = model_status(model, {}, plan, revision, {}, pods, LinkTest(True), NOW)
    return _text(plan.create, plan.apply, [str(p) for p in plan.problems], status)


MODELS: dict[str, Model] = {
    "s": typed("Model", "s", {"weights": WEIGHTS, "unified": {"gpus": 1, "usdPerHour": "2"}}),
    "l": typed(
        "Model",
        "l",
        {
            "weights": WEIGHTS,
            "prefill": {"gpus": 1, "usdPerHour": "6"},
            "decode": {"gpus": 1, "usdPerHour": "6"},
        },
    ),
}


def see_router(spec: Object) -> str:
    """Children, problems, status and, where it is managed, ten minutes of its control loop."""
    router = typed("Router", "r", spec)
    said = refusal("Router", spec)
    if isinstance(router, str) or said:
        return f"{router if isinstance(router, str) else ''} {said}"
    ref = router.spec.scaling.policy_ref
    found = ref is None or ref.name == "default"
    plan = plan_router(router, MODELS, [], Settings(), "t", found)
    pods = _pods(plan.apply)
    tiers = {"small": TierFacts(0.7, LatencyFacts(0.4, 100, 95), LatencyFacts(0.04, 100, 95))}
    reports = {pod["metadata"]["name"]: PredictorFacts("v", ("small", "large")) for pod in pods}
    facts = TrafficFacts("v", 0.1, 0.9, 0.8, tiers, reports)
    objects = {name: {"status": {"gpus": 3, "usdPerHour": "9.5"}} for name in MODELS}
    endpoint = service_endpoint(router, "cluster.local")
    status = router_status(router, {}, plan, MODELS, objects, pods, endpoint, facts, NOW)
    managed = scaled(router, None) if router.spec.scaling.has_loop else []
    return _text(plan.create, plan.apply, [str(p) for p in plan.problems], status, managed)


def see_policy(spec: Object) -> str:
    """What the loop of a managed Router does under this policy."""
    policy = typed("AutoscalingPolicy", "p", spec)
    said = refusal("AutoscalingPolicy", spec)
    if isinstance(policy, str) or said:
        return f"{policy if isinstance(policy, str) else ''} {said}"
    shape = {**BASE["Router"], **BOTH_MODELS, "scaling": {"mode": "Managed"}, "budget": {}}
    routers = [typed("Router", "r", shape)]
    return _text([scaled(router, policy) for router in routers])


def see_pool(spec: Object) -> str:
    """The status of a WorkerPool, and what an apiserver says when it changes into this."""
    metadata = {"name": "m-decode", "namespace": "default"}
    old = BASE["WorkerPool"]
    full = {"replicas": 1, "minReplicas": 0, "maxReplicas": 1000}
    broken = violations("WorkerPool", {"spec": {**full, **spec}}, {"spec": {**full, **old}})
    status = pool_status({"metadata": metadata, "spec": {**full, **spec}}, [], "x", NOW)
    return _text([str(v) for v in broken], status)


OBSERVE: dict[str, Callable[[Object], str]] = {
    "Model": see_model,
    "Router": see_router,
    "AutoscalingPolicy": see_policy,
    "WorkerPool": see_pool,
}


def _text(*parts: Any) -> str:
    return json.dumps(parts, sort_keys=True, default=str)


# A managed Router's loop on a virtual clock ------------------------------------------------------

STEP_S = 30.0
# 7:50 UTC on 2027-01-15, so that schedules of the base policy begin within the run.
START_S = 1_799_999_400.0
# Requests per second of each step: quiet, a burst, quiet long enough to sleep, then no metrics.
RATES = [2.0] * 6 + [300.0] * 14 + [0.5] * 14 + [0.0] * 28
MISSING_FROM = 58
CURVE = [
    {"threshold": 0.0, "shares": {"small": 0.0, "large": 1.0}, "quality_ratio": 1.0},
    {"threshold": 0.5, "shares": {"small": 0.6, "large": 0.4}, "quality_ratio": 0.97},
    {"threshold": 1.0, "shares": {"small": 1.0, "large": 0.0}, "quality_ratio": 0.8},
]


def scaled(router: Router, policy: AutoscalingPolicy | None) -> list[Any]:
    """Workers, threshold and decisions of each step."""
    managed, total, threshold = ManagedScaling(), 0.0, 0.5
    workers = {("small", "unified"): 1, ("large", "prefill"): 1, ("large", "decode"): 1}
    seen: list[Any] = []
    for number, rate in enumerate(RATES):
        total += rate * STEP_S
        missing = number >= MISSING_FROM
        plan = managed.step(
            START_S + STEP_S * number,
            "default/r",
            router,
            MODELS,
            policy.spec if policy is not None else None,
            workers,
            {} if missing else {"pod": _state(total, threshold)},
            [] if missing else [load for load in _loads(rate) if workers[load[0], load[1]["role"]]],
            queried=_queried(policy, workers),
        )
        if plan is None:
            return [None]
        workers, threshold = dict(plan.workers), plan.threshold
        seen.append([sorted((*key, count) for key, count in workers.items()), threshold])
    return [seen, managed.status_decisions("default/r")]


def _queried(
    policy: AutoscalingPolicy | None, pools: Iterable[tuple[str, str]]
) -> dict[tuple[str, str], float]:
    """A Prometheus that can read numbers only."""
    if policy is None or policy.spec.query is None:
        return {}
    return {pool: float(policy.spec.query) for pool in pools}


def _state(requests: float, threshold: float) -> Object:
    tiers = [
        {
            "name": name,
            "num_requests": requests / 2,
            "prompt_tokens": 500 * requests,
            "output_tokens": 100 * requests,
        }
        for name in ("small", "large")
    ]
    points = {"gain_threshold": threshold}
    asked = {"num_arrived": requests / 2, "prompt_tokens": 500 * requests, "num_held": 0}
    arrivals = {"num_refused": 0, "tiers": {"small": asked, "large": asked}}
    return {"tiers": tiers, "arrivals": arrivals, "curve": CURVE, "set_points": points}


def _loads(rate: float) -> list[tuple[str, Object]]:
    busy = min(1.0, rate / 40.0)
    found = []
    for tier, role, scale in (
        ("small", "unified", 0.3),
        ("large", "prefill", 1.0),
        ("large", "decode", 1.0),
    ):
        halves = {
            "prefill": [0.02 * scale, 1e-4 * scale, 0.0],
            "decode": [0.02 * scale, 5e-8, 5e-5],
        }
        profile = {half: n for half, n in halves.items() if role in ("unified", half)}
        load = {
            "role": role,
            "profile": profile,
            "kv_blocks": {"total": 5000, "used": int(5000 * busy)},
            "block_size": 64,
            "num_running": int(20 * busy),
            "pending_prefill_tokens": int(50 * busy),
        }
        found.append((tier, load))
    return found
