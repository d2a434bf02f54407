"""What a Model's fields must be to each other."""

from __future__ import annotations

from tandem_operator.resources.rules.engines import (
    ENGINE_RULES,
    NO_TRANSFER,
    EngineRule,
    says_no_transfer,
)
from tandem_operator.resources.rules.rule import Rule
from tandem_operator.resources.rules.values import MODEL_VALUES, rule_of


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
        f"!has(self.unified) || {NO_TRANSFER}",
        "kvTransfer is between prefill and decode workers, and unified ones transfer nothing; "
        "remove it, or use prefill and decode",
        lambda o, _: "unified" not in o or says_no_transfer(o),
        "kvTransfer",
        harmless=True,
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
    *map(rule_of, MODEL_VALUES),
]
