"""What the fields of an AutoscalingPolicy and of a WorkerPool must be to each other."""

from __future__ import annotations

from tandem_operator.resources.rules.rule import Rule
from tandem_operator.resources.rules.values import POLICY_VALUES, rule_of

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
POLICY_RULES += map(rule_of, POLICY_VALUES)

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
