"""Which settings change while a router runs, and how two configurations differ in them.

Nearly all of them: what stays is what a process is built around (`STATIC_FIELDS`), which a router
refuses to change, and for which the operator gives its pods another revision (`static_part`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from tandem_router.config import EndpointSliceEndpoints, RouterConfig, TierConfig
from tandem_router.errors import ConfigError

STATIC_FIELDS = (
    "name",
    "store",
    "picking",
    "http_port",
    "gateway_port",
    "drain_timeout_s",
    "decisions_kept",
)
# Of the endpoints only which Services are watched may change, where any are.
SERVICES = "services"
LIVE_FIELDS = tuple(
    name for name in RouterConfig.model_fields if name not in (*STATIC_FIELDS, "endpoints")
)
TIER_FIELDS = tuple(name for name in TierConfig.model_fields if name != "name")


def live_part(config: RouterConfig) -> dict[str, Any]:
    """The settings that may change, as JSON."""
    whole = config.model_dump(mode="json")
    live = {name: whole[name] for name in LIVE_FIELDS}
    if SERVICES in whole["endpoints"]:
        live[SERVICES] = whole["endpoints"][SERVICES]
    return live


def static_part(config: RouterConfig) -> dict[str, Any]:
    """Everything else."""
    whole = config.model_dump(mode="json", exclude_unset=True)
    static = {name: value for name, value in whole.items() if name in STATIC_FIELDS}
    endpoints = config.endpoints.model_dump(mode="json")
    static["endpoints"] = {name: v for name, v in endpoints.items() if name != SERVICES}
    # Whether the predictor is trained again is decided by what the process was given to do so.
    static["retraining"] = config.predictor.retraining is not None
    return static


def live_digest(live: Mapping[str, Any]) -> str:
    """Ten hex digits by which operator and router know whether they mean the same settings."""
    text = json.dumps(live, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def with_live(config: RouterConfig, live: Mapping[str, Any]) -> RouterConfig:
    """The configuration with other live settings. Raises ConfigError in words.

    live: any of them. `tiers` is the whole list, or an object of tiers by name that says what
    changes of those that are there.
    """
    unknown = live.keys() - {*LIVE_FIELDS, SERVICES}
    if unknown:
        raise ConfigError(
            f"{', '.join(sorted(unknown))} cannot change while the router runs; start it anew"
        )
    whole = config.model_dump(mode="json", exclude_unset=True)
    before = whole["tiers"]
    whole.update({name: live[name] for name in LIVE_FIELDS if name in live})
    if isinstance(tiers := live.get("tiers", before), Mapping):
        whole["tiers"] = _tiers_with(before, tiers)
    if SERVICES in live:
        if not isinstance(config.endpoints, EndpointSliceEndpoints):
            raise ConfigError("services: this router finds its workers in a file")
        whole["endpoints"] = {**whole["endpoints"], SERVICES: live[SERVICES]}
    try:
        after = RouterConfig.model_validate(whole)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{where}: {first['msg'].removeprefix('Value error, ')}") from error
    if (after.predictor.retraining is None) != (config.predictor.retraining is None):
        raise ConfigError("predictor.retraining begins and ends with the router; start it anew")
    return after


def _tiers_with(before: list[dict[str, Any]], changed: Mapping[str, Any]) -> list[dict[str, Any]]:
    names = [tier["name"] for tier in before]
    for name, fields in changed.items():
        if not isinstance(fields, Mapping) or fields.keys() - set(TIER_FIELDS):
            raise ConfigError(f"tiers.{name}: an object with any of {', '.join(TIER_FIELDS)}")
        if name not in names:
            raise ConfigError(
                f"tiers.{name}: there is no such tier, only {', '.join(names)}; a list of whole "
                "tiers adds and removes some"
            )
    return [{**tier, **changed.get(tier["name"], {})} for tier in before]


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Each setting that differs, such as `budget.usd_per_hour: 1.0 -> 2.0`; no key hashes.

    Of tiers that came or went the names are told, and of those that stayed what differs.
    """
    lists = [
        f"{name}: {', '.join(old)} -> {', '.join(new)}"
        for name, key in ((SERVICES, "service"), ("tiers", "name"))
        if (old := _names(before, name, key)) != (new := _names(after, name, key))
    ]
    stayed = set(_names(before, "tiers", "name")) & set(_names(after, "tiers", "name"))
    was, now = _flat(_of(before, stayed)), _flat(_of(after, stayed))
    return lists + [
        f"{name}: {_shown(name, was.get(name))} -> {_shown(name, now.get(name))}"
        for name in sorted(was.keys() | now.keys())
        if was.get(name) != now.get(name) and name != "generation"
    ]


def _names(live: Mapping[str, Any], name: str, key: str) -> list[str]:
    return [entry[key] for entry in live.get(name) or ()]


def _of(live: Mapping[str, Any], tiers: set[str]) -> dict[str, Any]:
    kept = [tier for tier in live["tiers"] if tier["name"] in tiers]
    return {name: v for name, v in live.items() if name != SERVICES} | {"tiers": kept}


def _flat(value: Any, at: str = "") -> dict[str, Any]:
    if isinstance(value, list) and all(isinstance(e, dict) and "name" in e for e in value):
        value = {entry["name"]: entry for entry in value}
    if isinstance(value, dict):
        found: dict[str, Any] = {}
        for name, part in value.items():
            found.update(_flat(part, f"{at}.{name}" if at else str(name)))
        return found
    return {at: value}


def _shown(name: str, value: Any) -> str:
    if name.endswith("key_hashes"):
        return f"{len(value or ())} keys"
    return json.dumps(value)
