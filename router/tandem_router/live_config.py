"""Which settings change while a router runs, and how two configurations differ in them.

What is not live (tiers, predictor, endpoints, ports) needs new pods: the operator gives those a
revision by `static_part`, and a router refuses a change of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from tandem_router.config import RouterConfig
from tandem_router.errors import ConfigError

LIVE_FIELDS = (
    "generation",
    "fallback_tier",
    "objective",
    "slo",
    "budget",
    "cascade",
    "tenants",
    "threshold",
    "routing",
    "replicas",
    "limits",
    "failover",
    "learning",
)
LIVE_TIER_FIELDS = (
    "usd_per_1m_input_tokens",
    "usd_per_1m_output_tokens",
    "usd_per_1m_cached_input_tokens",
    "usd_per_1m_reasoning_tokens",
    "token_prices",
    "max_share",
)


def live_part(config: RouterConfig) -> dict[str, Any]:
    """The settings that may change, as JSON; `tiers` holds those of each tier by name."""
    whole = config.model_dump(mode="json")
    live = {name: whole[name] for name in LIVE_FIELDS}
    live["tiers"] = {
        tier["name"]: {name: tier[name] for name in LIVE_TIER_FIELDS} for tier in whole["tiers"]
    }
    return live


def static_part(config: RouterConfig) -> dict[str, Any]:
    """Everything else."""
    whole = config.model_dump(mode="json", exclude_unset=True)
    static = {name: value for name, value in whole.items() if name not in LIVE_FIELDS}
    static["tiers"] = [
        {name: value for name, value in tier.items() if name not in LIVE_TIER_FIELDS}
        for tier in whole["tiers"]
    ]
    return static


def live_digest(live: Mapping[str, Any]) -> str:
    """Ten hex digits by which operator and router know whether they mean the same settings."""
    text = json.dumps(live, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def with_live(config: RouterConfig, live: Mapping[str, Any]) -> RouterConfig:
    """The configuration with other live settings. Raises ConfigError in words."""
    unknown = live.keys() - {*LIVE_FIELDS, "tiers"}
    if unknown:
        raise ConfigError(
            f"{', '.join(sorted(unknown))} cannot change while the router runs; start it anew"
        )
    whole = config.model_dump(mode="json", exclude_unset=True)
    tiers = live.get("tiers")
    if not isinstance(tiers, Mapping | None):
        raise ConfigError("tiers must be an object of tiers by name")
    for name, fields in (tiers or {}).items():
        if not isinstance(fields, Mapping) or fields.keys() - set(LIVE_TIER_FIELDS):
            raise ConfigError(f"tiers.{name}: only {', '.join(LIVE_TIER_FIELDS)} can change")
        if name not in {tier["name"] for tier in whole["tiers"]}:
            raise ConfigError(f"tiers.{name}: there is no such tier; tiers need new pods")
    for tier in whole["tiers"]:
        tier.update((tiers or {}).get(tier["name"], {}))
    whole.update({name: live[name] for name in LIVE_FIELDS if name in live})
    try:
        return RouterConfig.model_validate(whole)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{where}: {first['msg'].removeprefix('Value error, ')}") from error


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Each setting that differs, such as `budget.usd_per_hour: 1.0 -> 2.0`; no key hashes."""
    old, new = _flat(before), _flat(after)
    return [
        f"{name}: {_shown(name, old.get(name))} -> {_shown(name, new.get(name))}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and name != "generation"
    ]


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
