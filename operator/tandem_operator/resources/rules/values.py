"""What a single value must be beyond its form: each field's own bounds, as CEL and as Python.

A value that no worker, router or cluster would take is refused where it is written, not when a pod
fails on it. Rules between fields are in `model.py`, `router.py` and `scaling.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tandem_operator.resources.base import DURATION_PATTERN, QUANTITY_PATTERN, quantity, seconds
from tandem_operator.resources.rules.rule import Rule

Path = tuple[str, ...]
ROLES = ("unified", "prefill", "decode")


@dataclass(frozen=True)
class ValueRule:
    """A rule on the value at a path, as CEL and as Python; see `Rule`."""

    path: Path
    cel: str
    message: str
    check: Callable[[Any], bool]
    harmless: bool = False


def rule_of(rule: ValueRule) -> Rule:
    """Among the rules between fields."""
    check = rule.check
    return Rule(rule.path, rule.cel, rule.message, lambda o, _: check(o), harmless=rule.harmless)


_PORT = "([1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5])"
_HOST = r"(\[[0-9A-Fa-f:.]+\]|[^\s/:@\[\]?#]+)"
_BASE_URL = rf"^https?://([^\s/@]*@)?{_HOST}(:{_PORT})?(/[^\s]*)?$"
_ENDPOINT = "/(chat/completions|completions|responses|embeddings|messages|models)/?$"
_ORIGIN = rf"^([*]|https?://{_HOST}(:{_PORT})?)$"

_PART = "[A-Za-z0-9][A-Za-z0-9._-]*"
_OBJECT_NAME = "[a-z0-9]([-a-z0-9.]*[a-z0-9])?"
_CLIMBS = "/[.][.](/|$)"
_WEIGHTS = (
    f"^(hf://{_PART}(/{_PART})?(@[^@]+)?|s3://[a-z0-9][a-z0-9.-]*[a-z0-9](/.*)?"
    f"|pvc://{_OBJECT_NAME}(/.*)?)$"
)
_DATA = f"^(configmap://{_OBJECT_NAME}(/[A-Za-z0-9._-]+)?|pvc://{_OBJECT_NAME}(/.*)?)$"

_LABEL_KEY = "^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$"
_LABEL_VALUE = "^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$"


def _form(path: Path, pattern: str, message: str, of: str = "") -> ValueRule:
    """Text must match pattern; of: what it must match for that, other text has a sentence."""
    guard = f"!self.matches(r'{of}') || " if of else ""
    return ValueRule(
        path,
        f"{guard}self.matches(r'{pattern}')",
        message,
        lambda text: re.search(pattern, str(text)) is not None or re.search(of, str(text)) is None,
    )


def _without(path: Path, pattern: str, message: str) -> ValueRule:
    return ValueRule(
        path,
        f"!self.matches(r'{pattern}')",
        message,
        lambda text: re.search(pattern, str(text)) is None,
    )


def _above_zero(path: Path, what: str) -> ValueRule:
    return _form(path, "[1-9]", f"{what} of 0 does nothing; write one above 0")


def _quantity(path: Path, least: str, most: str, message: str) -> ValueRule:
    """Bounds of a quantity; text that is none has a sentence of its own already."""
    tests = [f"quantity(self).compareTo(quantity('{least}')) >= 0"] if least else []
    tests += [f"quantity(self).compareTo(quantity('{most}')) <= 0"] if most else []

    def check(text: Any) -> bool:
        if re.match(QUANTITY_PATTERN, str(text)) is None:
            return True
        value = quantity(str(text))
        return (not least or value >= quantity(least)) and (not most or value <= quantity(most))

    return ValueRule(path, f"!isQuantity(self) || ({' && '.join(tests)})", message, check)


def _at_most(path: Path, most: str, message: str) -> ValueRule:
    return ValueRule(
        path,
        f"!self.matches(r'{DURATION_PATTERN}') || duration(self) <= duration('{most}')",
        message,
        lambda text: (
            re.match(DURATION_PATTERN, str(text)) is None or seconds(str(text)) <= seconds(most)
        ),
    )


def _selects(labels: Mapping[str, str]) -> bool:
    return all(
        re.match(_LABEL_KEY, key) and re.match(_LABEL_VALUE, value) and len(value) <= 63
        for key, value in labels.items()
    )


def _memory(path: Path) -> ValueRule:
    return _quantity(
        path,
        "64Mi",
        "",
        "memory below 64Mi starts no process; a number without a unit counts bytes: write 4Gi",
    )


def _cores(path: Path) -> list[ValueRule]:
    none = "cpu of 0 asks for no core; write 500m, 4 or the like"
    many = "cpu is a count of cores, at most 1024; write 500m, 4 or the like"
    # With none a pod runs on what its node has left.
    return [
        replace(_quantity(path, "1m", "", none), harmless=True),
        _quantity(path, "", "1024", many),
    ]


def _of_role(role: str) -> list[ValueRule]:
    path = ("spec", role)
    return [
        _memory((*path, "resources", "memory")),
        *_cores((*path, "resources", "cpu")),
        _without(
            (*path, "gpuResource"),
            "(^|[.])kubernetes[.]io/",
            "names below kubernetes.io are the cluster's own and no device has one; write one such "
            "as nvidia.com/gpu or amd.com/gpu (kubectl describe node lists them)",
        ),
        ValueRule(
            (*path, "nodeSelector"),
            f"self.all(k, k.matches(r'{_LABEL_KEY}') && self[k].matches(r'{_LABEL_VALUE}') && "
            "size(self[k]) <= 63)",
            "a label has a key such as gpu or example.com/gpu and a value of at most 63 letters, "
            "digits, dashes, dots and underscores; correct it (kubectl get nodes --show-labels)",
            _selects,
        ),
        ValueRule(
            (*path, "tolerations", "*"),
            "self.operator != 'Exists' || !has(self.value)",
            "value is compared with operator: Equal only; set that, or remove value",
            lambda o: o["operator"] != "Exists" or "value" not in o,
        ),
        ValueRule(
            (*path, "tolerations", "*"),
            "self.operator == 'Exists' || has(self.key)",
            "operator: Equal needs the key of the taint; add key",
            lambda o: o["operator"] == "Exists" or "key" in o,
        ),
    ]


MODEL_VALUES: list[ValueRule] = [
    _form(
        ("spec", "weights", "source"),
        _WEIGHTS,
        "source names a repository, bucket, claim or folder: hf://org/name[@revision], "
        "s3://bucket/prefix, pvc://claim/folder, image:///folder; correct it",
        "^(hf|s3|pvc)://",
    ),
    _without(
        ("spec", "weights", "source"),
        _CLIMBS,
        "source may not lead out of what it names; write the path without ..",
    ),
    _quantity(
        ("spec", "weights", "cache", "size"),
        "1Mi",
        "",
        "size below 1Mi holds no weights; a number without a unit counts bytes: write 80Gi",
    ),
    _quantity(
        ("spec", "engine", "kvCacheMemory"),
        "1Mi",
        "",
        "kvCacheMemory below 1Mi holds no block; a number without a unit counts bytes: write 4Gi",
    ),
    _quantity(
        ("spec", "kvTransfer", "maxInflight"),
        "64Ki",
        "16Gi",
        "maxInflight must be from 64Ki to 16Gi; write 64Mi or the like",
    ),
    _above_zero(("spec", "rollout", "startupTimeout"), "a startupTimeout"),
    _at_most(
        ("spec", "drain", "timeout"), "1h", "a worker may take at most 1h to leave; write less"
    ),
    *(rule for role in ROLES for rule in _of_role(role)),
]


def _url(path: Path) -> list[ValueRule]:
    return [
        _form(
            path,
            _BASE_URL,
            "url needs a host and, where it names one, a port from 1 to 65535; write "
            "https://host:port/v1",
            r"^https?://[^\s?#]+$",
        ),
        _without(
            path,
            _ENDPOINT,
            "url is the base to which the router adds /chat/completions and the like; remove that "
            "part",
        ),
    ]


def _data(field: str) -> list[ValueRule]:
    path = ("spec", "predictor", *field.split("."))
    return [
        _form(
            path,
            _DATA,
            f"{path[-1]} names a ConfigMap, claim or folder: configmap://name/key, "
            "pvc://claim/path, image:///path; correct it",
            "^(configmap|pvc)://",
        )
    ]


ROUTER_VALUES: list[ValueRule] = [
    *_url(("spec", "tiers", "*", "external", "url")),
    *_url(("spec", "learning", "judge", "url")),
    *(rule for field in ("artifact", "embedding", "training.data") for rule in _data(field)),
    ValueRule(
        ("spec", "tiers", "*", "external", "capabilities"),
        "self.generation || self.embeddings",
        "a tier that neither answers nor embeds serves no request; set generation or embeddings, "
        "or remove the tier",
        lambda o: o["generation"] or o["embeddings"],
    ),
    _above_zero(("spec", "slo", "ttft", "target"), "a target"),
    _above_zero(("spec", "slo", "tpot", "target"), "a target"),
    _above_zero(("spec", "cascade", "deadline"), "a deadline"),
    _above_zero(("spec", "predictor", "training", "every"), "every"),
    _above_zero(("spec", "learning", "retention"), "a retention"),
    _above_zero(("spec", "cache", "ttl"), "a ttl"),
    _quantity(
        ("spec", "cache", "maxMemory"),
        "1Ki",
        "",
        "maxMemory below 1Ki holds no response; write 64Mi or the like, or set enabled: false",
    ),
    _quantity(
        ("spec", "store", "sqlite", "size"),
        "1Mi",
        "",
        "size below 1Mi holds no store; a number without a unit counts bytes: write 1Gi",
    ),
    _form(
        ("spec", "access", "corsOrigins", "*"),
        _ORIGIN,
        "an origin is a scheme, a host and at most a port from 1 to 65535; write "
        "https://app.example:8443",
        "^https?://[^/]*$",
    ),
    _memory(("spec", "resources", "memory")),
    *_cores(("spec", "resources", "cpu")),
]

POLICY_VALUES: list[ValueRule] = [
    _above_zero(("spec", "schedules", "*", "duration"), "a duration"),
    _above_zero(("spec", "idle", "after"), "after"),
    *(
        ValueRule(
            ("spec", role, "signals", "*"),
            "self.name != 'KVUtilization' || !self.target.matches('^[0-9.]+$') || "
            "double(self.target) <= 1.0",
            "KVUtilization is the share of KV blocks in use and never above 1; write a target such "
            'as "0.8"',
            lambda o: o["name"] != "KVUtilization" or float(o["target"]) <= 1.0,
        )
        for role in ROLES
    ),
]
