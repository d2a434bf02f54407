"""The rules between fields: each once as CEL for the apiserver and once as Python for local mode.

Both read the object with defaults filled in. A CEL rule on an object that defaults to {} sees the
bare default, so optional fields are guarded with has().
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tandem_operator.resources.engine_rules import ENGINE_RULES, EngineRule
from tandem_operator.resources.value_rules import (
    MODEL_VALUES,
    POLICY_VALUES,
    ROUTER_VALUES,
    ValueRule,
)

Obj = Mapping[str, Any]


# What no installation allows; the rest is `plan/permissions.py`, and the router's at connections.
FORBIDDEN_URL = (
    "^https?://([^/]*@|169[.]254[.]|[^a-z0-9.]fe[89ab][0-9a-f]:"
    "|metadata([.]google[.]internal)?([:/]|$))"
)


@dataclass(frozen=True)
class Rule:
    """One rule on one object of the schema.

    path: where in the kind it hangs, such as ("spec", "tiers", "*"); "*" is any list item.
    field: the field to name in the error, relative to path; "" names the object itself.
    check: true when the rule holds; the second argument is the old object for transition rules.
    """

    path: tuple[str, ...]
    cel: str
    message: str
    check: Callable[[Obj, Obj | None], bool]
    field: str = ""
    transition: bool = False


def _role_rules(role: str) -> list[Rule]:
    path = ("spec", role)
    return [
        Rule(
            path,
            "!has(self.minReplicas) || !has(self.maxReplicas) || "
            "self.minReplicas <= self.maxReplicas",
            "minReplicas must be at most maxReplicas; raise maxReplicas or lower minReplicas",
            lambda o, _: o.get("minReplicas", 0) <= o.get("maxReplicas", 1 << 30),
            "minReplicas",
        ),
        Rule(
            path,
            "!has(self.minReplicas) || self.replicas >= self.minReplicas || self.replicas == 0",
            "replicas must be at least minReplicas; raise replicas or lower minReplicas",
            lambda o, _: o["replicas"] == 0 or o["replicas"] >= o.get("minReplicas", 0),
            "replicas",
        ),
        Rule(
            path,
            "!has(self.maxReplicas) || self.replicas <= self.maxReplicas",
            "replicas must be at most maxReplicas; lower replicas or raise maxReplicas",
            lambda o, _: o["replicas"] <= o.get("maxReplicas", 1 << 30),
            "replicas",
        ),
        Rule(
            path,
            "self.gpus == 0 || self.gpus == self.tensorParallel",
            "a worker computes on tensorParallel GPUs and would hold the others idle; set gpus to "
            "tensorParallel, or to 0 for the CPU, and raise replicas for more",
            lambda o, _: o["gpus"] in (0, o["tensorParallel"]),
            "gpus",
        ),
    ]


def _engine_rule(rule: EngineRule) -> Rule:
    return Rule(("spec",), rule.cel, rule.message, lambda o, _: rule.check(o), rule.field)


def _value_rule(rule: ValueRule) -> Rule:
    return Rule(rule.path, rule.cel, rule.message, lambda o, _: rule.check(o))


def _from_labels(spec: Obj) -> bool:
    return bool(spec["predictor"].get("training", {}).get("fromLabels"))


def _models_of(spec: Obj) -> list[str]:
    return [str(t["modelRef"]["name"]) for t in spec["tiers"] if "modelRef" in t]


def _has_source(predictor: Obj) -> bool:
    return bool({"artifact", "training"} & predictor.keys())


MODEL_RULES: list[Rule] = [
    Rule(
        ("spec",),
        "has(self.unified) != (has(self.prefill) || has(self.decode))",
        "set either unified or prefill and decode; exactly one of the two forms is needed",
        lambda o, _: ("unified" in o) != ("prefill" in o or "decode" in o),
    ),
    Rule(
        ("spec",),
        "has(self.prefill) == has(self.decode)",
        "prefill and decode go together; add the missing one or use unified",
        lambda o, _: ("prefill" in o) == ("decode" in o),
    ),
    Rule(
        ("spec",),
        "!has(self.prefill) || !has(self.decode) || "
        "(self.prefill.replicas == 0) == (self.decode.replicas == 0)",
        "prefill and decode must both have replicas or both have none; set both to 0 to stop "
        "the model",
        lambda o, _: (
            "prefill" not in o
            or "decode" not in o
            or (o["prefill"]["replicas"] == 0) == (o["decode"]["replicas"] == 0)
        ),
        "prefill.replicas",
    ),
    Rule(
        ("spec",),
        "!has(self.prefill) || !has(self.decode) || "
        "(has(self.prefill.minReplicas) && self.prefill.minReplicas == 0) == "
        "(has(self.decode.minReplicas) && self.decode.minReplicas == 0)",
        "prefill and decode must both be able to reach zero or neither; set minReplicas: 0 on "
        "both or on none",
        lambda o, _: (
            "prefill" not in o
            or "decode" not in o
            or (o["prefill"].get("minReplicas") == 0) == (o["decode"].get("minReplicas") == 0)
        ),
        "prefill.minReplicas",
    ),
    Rule(
        ("spec",),
        "(has(self.servedName) ? self.servedName : '') == "
        "(has(oldSelf.servedName) ? oldSelf.servedName : '')",
        "servedName cannot change, clients know it; delete the Model and create it anew",
        lambda o, old: old is None or o.get("servedName") == old.get("servedName"),
        "servedName",
        transition=True,
    ),
    Rule(
        ("spec", "rollout"),
        "self.maxSurge > 0 || (has(self.maxUnavailable) && self.maxUnavailable > 0)",
        "without maxUnavailable of 1 or more nothing could move; set maxSurge: 1",
        lambda o, _: o["maxSurge"] + o.get("maxUnavailable", 0) > 0,
        "maxSurge",
    ),
    Rule(
        ("spec", "weights"),
        "!has(self.cache) || self.source.startsWith('hf://') || self.source.startsWith('s3://')",
        "cache is for downloads; remove it or use an hf:// or s3:// source",
        lambda o, _: "cache" not in o or o["source"].startswith(("hf://", "s3://")),
        "cache",
    ),
    Rule(
        ("spec", "weights"),
        "!has(self.secretRef) || self.source.startsWith('hf://') || "
        "self.source.startsWith('s3://')",
        "secretRef is for downloads; remove it or use an hf:// or s3:// source",
        lambda o, _: "secretRef" not in o or o["source"].startswith(("hf://", "s3://")),
        "secretRef",
    ),
    Rule(
        ("spec", "engine"),
        "!has(self.maxBatchedTokens) || !has(self.maxNumSeqs) || "
        "self.maxBatchedTokens >= self.maxNumSeqs",
        "each running sequence takes a token of a step, so maxBatchedTokens must be at least "
        "maxNumSeqs; raise it, or lower maxNumSeqs",
        lambda o, _: o["maxBatchedTokens"] >= o["maxNumSeqs"],
        "maxBatchedTokens",
    ),
    *_role_rules("unified"),
    *_role_rules("prefill"),
    *_role_rules("decode"),
    *map(_engine_rule, ENGINE_RULES),
    *map(_value_rule, MODEL_VALUES),
]

ROUTER_RULES: list[Rule] = [
    Rule(
        ("spec",),
        "self.tiers.all(t, self.tiers.exists_one(u, u.name == t.name))",
        "tier names must be unique; rename one",
        lambda o, _: len({t["name"] for t in o["tiers"]}) == len(o["tiers"]),
        "tiers",
    ),
    Rule(
        ("spec",),
        "!has(self.fallbackTier) || self.tiers.exists(t, t.name == self.fallbackTier)",
        "fallbackTier must be the name of a tier",
        lambda o, _: (
            "fallbackTier" not in o or o["fallbackTier"] in {t["name"] for t in o["tiers"]}
        ),
        "fallbackTier",
    ),
    Rule(
        ("spec",),
        "!has(self.tenants) || self.tenants.all(t, self.tenants.exists_one(u, u.name == t.name))",
        "tenant names must be unique; rename one",
        lambda o, _: len({t["name"] for t in o.get("tenants", [])}) == len(o.get("tenants", [])),
        "tenants",
    ),
    Rule(
        ("spec",),
        "!has(self.tenants) || has(self.keySecretRef) || "
        "self.tenants.all(t, !has(t.keyHashes) || size(t.keyHashes) == 0)",
        "tenants with keyHashes need keySecretRef, the Secret with the key of the hashes",
        lambda o, _: "keySecretRef" in o or not any(t.get("keyHashes") for t in o["tenants"]),
        "keySecretRef",
    ),
    Rule(
        ("spec",),
        "!has(self.store) || !has(self.store.sqlite) || self.replicas <= 1",
        "store.sqlite is a file with one writer; keep replicas at 1, or use store.postgres",
        lambda o, _: "sqlite" not in (o.get("store") or {}) or o["replicas"] <= 1,
        "replicas",
    ),
    Rule(
        ("spec", "store"),
        "has(self.sqlite) != has(self.postgres)",
        "a store is either sqlite or postgres, exactly one of them",
        lambda o, _: ("sqlite" in o) != ("postgres" in o),
    ),
    Rule(
        ("spec", "learning"),
        "!has(self.shadowShare) || double(self.shadowShare) == 0.0 || has(self.judge)",
        "shadowShare needs a judge: an unjudged second answer says nothing; add learning.judge, or "
        'set shadowShare: "0"',
        lambda o, _: float(o.get("shadowShare", "0")) == 0.0 or "judge" in o,
        "judge",
    ),
    Rule(
        ("spec",),
        "!has(self.learning) || !has(self.learning.shadowShare) || "
        "double(self.learning.shadowShare) == 0.0 || size(self.tiers) > 1",
        'learning.shadowShare needs a second tier to ask; add one, or set shadowShare: "0"',
        lambda o, _: (
            float((o.get("learning") or {}).get("shadowShare", "0")) == 0.0 or len(o["tiers"]) > 1
        ),
        "learning.shadowShare",
    ),
    Rule(
        ("spec", "learning", "judge"),
        "self.type == 'External' ? has(self.url) && has(self.model) : "
        "!has(self.url) && !has(self.model) && !has(self.apiKeySecretRef)",
        "a judge of type External has url and model (and apiKeySecretRef), and only that type; add "
        "them or remove them",
        lambda o, _: (
            "url" in o and "model" in o
            if o["type"] == "External"
            else not o.keys() & {"url", "model", "apiKeySecretRef"}
        ),
        "type",
    ),
    Rule(
        ("spec", "tenants", "*"),
        "self.name != 'anonymous'",
        "anonymous are the requests without a key; rename the tenant",
        lambda o, _: o["name"] != "anonymous",
        "name",
    ),
    Rule(
        ("spec", "tiers", "*"),
        "!has(self.external) || !(has(self.usdPer1MInputTokens) || has(self.usdPer1MOutputTokens))",
        "the prices of an external tier are those of external; move them there",
        lambda o, _: (
            "external" not in o or not o.keys() & {"usdPer1MInputTokens", "usdPer1MOutputTokens"}
        ),
        "external",
    ),
    Rule(
        ("spec", "tiers", "*"),
        "has(self.modelRef) != has(self.external)",
        "a tier has either modelRef or external, exactly one of them",
        lambda o, _: ("modelRef" in o) != ("external" in o),
    ),
    Rule(
        ("spec", "tiers", "*", "external"),
        f"!self.url.matches('{FORBIDDEN_URL}')",
        "url must be a service's, without user name and password, not of a metadata service or a "
        "link-local address",
        lambda o, _: re.match(FORBIDDEN_URL, o["url"]) is None,
        "url",
    ),
    Rule(
        ("spec",),
        "!has(self.predictor) || !has(self.predictor.type) || self.predictor.type != 'Learned' || "
        "has(self.predictor.artifact) || has(self.predictor.training) || (has(self.learning) && "
        "has(self.learning.shadowShare) && double(self.learning.shadowShare) > 0.0)",
        "a Learned predictor needs artifact or training, or learning.shadowShare above 0 to gather "
        "labels for one; add one of them or use type: Length",
        lambda o, _: (
            o["predictor"].get("type") != "Learned"
            or _has_source(o["predictor"])
            or float((o.get("learning") or {}).get("shadowShare", "0")) > 0.0
        ),
        "predictor.type",
    ),
    Rule(
        ("spec", "predictor"),
        "!has(self.type) || self.type == 'Learned' || !(has(self.artifact) || has(self.training))",
        "artifact and training belong to type: Learned; remove them, or leave type out",
        lambda o, _: (
            o.get("type", "Learned") == "Learned" or not ("artifact" in o or "training" in o)
        ),
        "type",
    ),
    Rule(
        ("spec",),
        "!has(self.threshold) || !has(self.objective) || !has(self.objective.qualityFloor)",
        "threshold and objective.qualityFloor both say where the larger tier begins; keep one: "
        "threshold stays as it is, qualityFloor moves it",
        lambda o, _: "threshold" not in o or "qualityFloor" not in o["objective"],
        "threshold",
    ),
    Rule(
        ("spec",),
        "!has(self.threshold) || !has(self.predictor) || !has(self.predictor.type) || "
        "self.predictor.type != 'Fixed'",
        "threshold decides nothing beside predictor.type: Fixed, the fallback tier answers all; "
        "remove it or let another predictor choose",
        lambda o, _: "threshold" not in o or o["predictor"].get("type") != "Fixed",
        "threshold",
    ),
    Rule(
        ("spec",),
        "!has(self.cascade) || (has(self.predictor) && (has(self.predictor.artifact) || "
        "has(self.predictor.training)))",
        "a cascade reads answers with the verifier of a Learned predictor; add predictor.training "
        "or predictor.artifact, or remove cascade",
        lambda o, _: "cascade" not in o or _has_source(o["predictor"]),
        "cascade",
    ),
    Rule(
        ("spec",),
        "!has(self.cascade) || size(self.tiers) > 1",
        "a cascade needs a dearer tier to ask where an answer will not do; add a tier or remove "
        "cascade",
        lambda o, _: "cascade" not in o or len(o["tiers"]) > 1,
        "cascade",
    ),
    Rule(
        ("spec", "predictor"),
        "!has(self.artifact) || !self.artifact.matches('/[.][.](/|$)')",
        "artifact may not lead out of what it names; write the path without ..",
        lambda o, _: re.search("/[.][.](/|$)", o.get("artifact", "")) is None,
        "artifact",
    ),
    Rule(
        ("spec", "predictor"),
        "!has(self.embedding) || has(self.artifact)",
        "embedding goes with the artifact trained with it; add artifact or remove embedding",
        lambda o, _: "embedding" not in o or "artifact" in o,
        "embedding",
    ),
    Rule(
        ("spec", "predictor"),
        "!(has(self.artifact) && has(self.training))",
        "artifact and training exclude each other; keep one",
        lambda o, _: not ("artifact" in o and "training" in o),
        "training",
    ),
    Rule(
        ("spec",),
        "!has(self.predictor) || !has(self.predictor.training) || "
        "!self.predictor.training.fromLabels || "
        "(has(self.learning) && self.learning.capture != 'None')",
        "training from labels needs something of their prompts; set learning.capture to Features "
        "or Prompts, or fromLabels to false",
        lambda o, _: not _from_labels(o) or o.get("learning", {}).get("capture", "None") != "None",
        "predictor.training.fromLabels",
    ),
    Rule(
        ("spec",),
        "!has(self.predictor) || !has(self.predictor.training) || "
        "!self.predictor.training.fromLabels || self.replicas <= 1 || "
        "(has(self.store) && has(self.store.postgres))",
        "several router pods that train from labels need a store to share, or each would promote "
        "a predictor of its own; set store.postgres, or replicas to 1, or fromLabels to false",
        lambda o, _: (
            not _from_labels(o) or o["replicas"] <= 1 or "postgres" in (o.get("store") or {})
        ),
        "predictor.training.fromLabels",
    ),
    Rule(
        ("spec", "scaling"),
        "self.mode != 'External' || !has(self.policyRef)",
        "policyRef is only used with mode: Managed or Advise; remove it or set one of them",
        lambda o, _: o["mode"] != "External" or "policyRef" not in o,
        "policyRef",
    ),
    Rule(
        ("spec",),
        "self.tiers.all(t, !has(t.modelRef) || self.tiers.exists_one(u, has(u.modelRef) && "
        "u.modelRef.name == t.modelRef.name))",
        "two tiers have the same Model and would be one; remove one of them, or make it a Model of "
        "its own",
        lambda o, _: len(named := _models_of(o)) == len(set(named)),
        "tiers",
    ),
    Rule(
        ("spec",),
        "size(self.tiers) == 0 || self.tiers.exists(t, !has(t.maxShare)) || "
        "self.tiers.map(t, double(t.maxShare)).sum() >= 0.999999",
        "the maxShare of all tiers add up to less than 1, so that some requests would have none; "
        "raise one, or remove it",
        lambda o, _: (
            any("maxShare" not in t for t in o["tiers"])
            or sum(float(t["maxShare"]) for t in o["tiers"]) >= 0.999999
        ),
        "tiers",
    ),
    Rule(
        ("spec",),
        "!has(self.tenants) || self.tenants.all(t, !has(t.allowedTiers) || "
        "t.allowedTiers.all(n, self.tiers.exists(u, u.name == n)))",
        "allowedTiers of a tenant must be names of tiers; correct them, or add the tier",
        lambda o, _: all(
            {*t.get("allowedTiers", [])} <= {tier["name"] for tier in o["tiers"]}
            for t in o.get("tenants", [])
        ),
        "tenants",
    ),
    *map(_value_rule, ROUTER_VALUES),
]

POLICY_RULES: list[Rule] = [
    Rule(
        ("spec", role),
        "!has(self.signals) || self.signals.all(s, self.signals.exists_one(u, u.name == s.name))",
        "a signal may be listed once; remove the second",
        lambda o, _: len({s["name"] for s in o.get("signals", [])}) == len(o.get("signals", [])),
        "signals",
    )
    for role in ("prefill", "decode", "unified")
]
POLICY_RULES += [
    Rule(
        ("spec", role),
        "!has(self.signals) || self.signals.all(s, s.target.matches('[1-9]'))",
        "a target of 0 would be missed for ever; write one above 0",
        lambda o, _: all(float(s["target"]) > 0.0 for s in o.get("signals", [])),
        "signals",
    )
    for role in ("prefill", "decode", "unified")
]
_ASKS = " || ".join(
    f"(has(self.{role}) && has(self.{role}.signals) && "
    f"self.{role}.signals.exists(s, s.name == 'Prometheus'))"
    for role in ("prefill", "decode", "unified")
)
POLICY_RULES.append(
    Rule(
        ("spec",),
        f"has(self.query) == ({_ASKS})",
        "the signal Prometheus and the policy's query need each other; write both, or remove one",
        lambda o, _: (
            ("query" in o)
            == any(
                signal["name"] == "Prometheus"
                for role in ("prefill", "decode", "unified")
                for signal in o.get(role, {}).get("signals", [])
            )
        ),
        "query",
    )
)
POLICY_RULES.append(
    Rule(
        ("spec",),
        "!has(self.schedules) || "
        "self.schedules.all(s, self.schedules.exists_one(u, u.name == s.name))",
        "schedule names must be unique, decisions name them; rename one",
        lambda o, _: (
            len({s["name"] for s in o.get("schedules", [])}) == len(o.get("schedules", []))
        ),
        "schedules",
    )
)
POLICY_RULES += map(_value_rule, POLICY_VALUES)

POOL_RULES: list[Rule] = [
    Rule(
        ("spec",),
        "self.minReplicas <= self.maxReplicas",
        "minReplicas must be at most maxReplicas",
        lambda o, _: o["minReplicas"] <= o["maxReplicas"],
        "minReplicas",
    ),
    Rule(
        ("spec",),
        "self.modelRef == oldSelf.modelRef && self.role == oldSelf.role",
        "modelRef and role cannot change; the operator creates one WorkerPool per Model and role",
        lambda o, old: old is None or (o["modelRef"], o["role"]) == (old["modelRef"], old["role"]),
        "role",
        transition=True,
    ),
]

RULES: dict[str, list[Rule]] = {
    "Model": MODEL_RULES,
    "Router": ROUTER_RULES,
    "AutoscalingPolicy": POLICY_RULES,
    "WorkerPool": POOL_RULES,
}


@dataclass(frozen=True)
class Violation:
    """A rule that does not hold: where, its sentence, and the value there if it is one word."""

    path: tuple[str | int, ...]
    message: str
    value: str | float | None = None


def _find(obj: Any, path: tuple[str, ...], at: tuple[str | int, ...]) -> list[Any]:
    """All (location, value) pairs that path names in obj."""
    if not path:
        return [(at, obj)]
    head, rest = path[0], path[1:]
    if head == "*":
        return [x for i, item in enumerate(obj) for x in _find(item, rest, (*at, i))]
    if not isinstance(obj, Mapping) or head not in obj:
        return []
    return _find(obj[head], rest, (*at, head))


def violations(kind: str, obj: Obj, old: Obj | None = None) -> list[Violation]:
    """The rules of the kind that the object breaks.

    obj and old hold all defaults, as Resource.to_wire gives them; without old, rules that compare
    with the previous object are left out.
    """
    found: list[Violation] = []
    for rule in RULES[kind]:
        if rule.transition and old is None:
            continue
        before = dict(_find(old, rule.path, ())) if rule.transition and old is not None else {}
        for at, value in _find(obj, rule.path, ()):
            if not rule.check(value, before.get(at)):
                field = tuple(rule.field.split(".")) if rule.field else ()
                there = _find(value, field, at)
                plain = there[0][1] if len(there) == 1 else None
                said = plain if isinstance(plain, str | int | float) else None
                found.append(Violation((*at, *field), rule.message, said))
    return found
