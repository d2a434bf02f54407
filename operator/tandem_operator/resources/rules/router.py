"""What a Router's fields must be to each other."""

from __future__ import annotations

import re

from tandem_operator.resources.rules.rule import Obj, Rule
from tandem_operator.resources.rules.values import ROUTER_VALUES, rule_of

# What no installation allows; the rest is `plan/permissions.py`, and the router's at connections.
FORBIDDEN_URL = (
    "^https?://([^/]*@|169[.]254[.]|[^a-z0-9.]fe[89ab][0-9a-f]:"
    "|metadata([.]google[.]internal)?([:/]|$))"
)


def _from_labels(spec: Obj) -> bool:
    return bool(spec["predictor"].get("training", {}).get("fromLabels"))


def _models_of(spec: Obj) -> list[str]:
    return [str(t["modelRef"]["name"]) for t in spec["tiers"] if "modelRef" in t]


def _has_source(predictor: Obj) -> bool:
    return bool({"artifact", "training"} & predictor.keys())


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
        "self.type in ['External', 'ExternalInCascade'] ? has(self.url) && has(self.model) : "
        "!has(self.url) && !has(self.model) && !has(self.apiKeySecretRef)",
        "a judge of type External or ExternalInCascade has url and model (and apiKeySecretRef), "
        "and only these types; add them or remove them",
        lambda o, _: (
            "url" in o and "model" in o
            if o["type"] in ("External", "ExternalInCascade")
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
        ("spec",),
        "has(self.cascade) || !has(self.learning) || !has(self.learning.judge) || "
        "self.learning.judge.type != 'ExternalInCascade'",
        "a judge of type ExternalInCascade is asked by spec.cascade; add cascade: {}, or write "
        "type: External",
        lambda o, _: (
            "cascade" in o
            or ((o.get("learning") or {}).get("judge") or {}).get("type") != "ExternalInCascade"
        ),
        "learning.judge.type",
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
    *map(rule_of, ROUTER_VALUES),
]
