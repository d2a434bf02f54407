"""The whole of a router's configuration, and how it is read from a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from tandem_router.config.access import AccessConfig, OutwardConfig, TenantConfig
from tandem_router.config.endpoints import EndpointSliceEndpoints, FileEndpoints, PickingConfig
from tandem_router.config.failover import FailoverConfig
from tandem_router.config.learning import LearningConfig
from tandem_router.config.limits import LimitsConfig
from tandem_router.config.objectives import BudgetConfig, ObjectiveConfig, SloConfig
from tandem_router.config.prediction import CascadeConfig, PredictorConfig
from tandem_router.config.section import Name, Positive, Section
from tandem_router.config.tiers import TierConfig
from tandem_router.errors import ConfigError


class CacheConfig(Section):
    """Exact response cache; off unless switched on."""

    enabled: bool = Field(default=False, description="Answer repeated requests from memory.")
    max_bytes: int = Field(
        default=64 * 2**20, ge=1024, description="Memory for cached responses, bytes."
    )
    ttl_s: Positive = Field(default=3600.0, description="Oldest response served, seconds.")
    eviction: Literal["GDSF", "LEC"] = Field(
        default="GDSF",
        description="What leaves first. LEC: the answer that saves least per byte; GDSF: the same, "
        "and old fame ages, for traffic that changes.",
    )


class StoreConfig(Section):
    """Where spend, decisions, keys and labels are kept; the place is a command-line argument."""

    type: Literal["memory", "sqlite", "postgres"] = Field(
        default="memory",
        description="memory: gone with the process; sqlite: the file given by --store-file, for "
        "one router; postgres: the database whose URL is in --store-url-file, for several.",
    )
    flush_s: Positive = Field(
        default=0.5,
        description="Time between two batches: what a killed process loses at most.",
    )
    max_decisions: int = Field(
        default=100_000, ge=1, le=100_000_000, description="Decisions kept; the oldest go first."
    )


class RouterConfig(Section):
    """Everything one router needs besides its mounted files."""

    name: Name = Field(description="Model name that routes: `model: <name>`.")
    generation: int = Field(
        default=0,
        ge=0,
        description="Of the settings that change while it runs; older ones that come late are "
        "ignored.",
    )
    tiers: tuple[TierConfig, ...] = Field(min_length=1, max_length=16)
    fallback_tier: str = Field(description="Tier used when the predictor is late or broken.")
    predictor: PredictorConfig = PredictorConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    slo: SloConfig = SloConfig()
    budget: BudgetConfig = BudgetConfig()
    cascade: CascadeConfig | None = Field(
        default=None,
        description="Where the prompt leaves it open, the cheaper tier answers, a verifier reads "
        "the answer, and only then it is sent or the dearer tier asked; absent: never.",
    )
    cache: CacheConfig = CacheConfig()
    tenants: tuple[TenantConfig, ...] = Field(default=(), max_length=1024)
    threshold: float | None = Field(
        default=None,
        ge=-1.0,
        le=1.0,
        allow_inf_nan=False,
        description="Gain above which the dearest tier answers; absent: what holds "
        "`objective.quality_floor`, else 0.1 (Length: 0.5). A floor that is held clips it.",
    )
    replicas: int = Field(
        default=1,
        ge=1,
        le=1000,
        description="Routers that share the budget and the tenants' limits: by leases where they "
        "share a postgres store, else each has its equal part.",
    )
    routing: Literal["Active", "Advise"] = Field(
        default="Active",
        description="Advise: decide and record, and send everything to the fallback tier.",
    )
    store: StoreConfig = StoreConfig()
    learning: LearningConfig = LearningConfig()
    limits: LimitsConfig = LimitsConfig()
    access: AccessConfig = AccessConfig()
    outward: OutwardConfig = OutwardConfig()
    failover: FailoverConfig = FailoverConfig()
    picking: PickingConfig = PickingConfig()
    endpoints: Annotated[FileEndpoints | EndpointSliceEndpoints, Field(discriminator="type")] = (
        FileEndpoints()
    )
    http_port: int = Field(default=8000, ge=1, le=65535, description="Port of the HTTP server.")
    gateway_port: int | None = Field(
        default=None,
        ge=1,
        le=65535,
        description="gRPC port at which a gateway asks for the worker of each request, as the "
        "endpoint picker of an InferencePool; absent: none.",
    )
    drain_timeout_s: Positive = Field(
        default=30.0, description="After SIGTERM, time for requests in flight to finish."
    )
    decisions_kept: int = Field(
        default=1000, ge=1, le=100_000, description="Decisions held for /admin/decisions."
    )

    @model_validator(mode="before")
    @classmethod
    def _file_is_the_default_source(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("endpoints"), dict):
            endpoints = data["endpoints"]
            if "type" not in endpoints:
                return {**data, "endpoints": {"type": "file", **endpoints}}
        return data

    @model_validator(mode="after")
    def _names_agree(self) -> Self:
        names = [tier.name for tier in self.tiers]
        if len(set(names)) != len(names):
            raise ValueError(f"tiers have the same name: {', '.join(sorted(names))}")
        if self.learning.shadow_share > 0.0 and len(names) < 2:
            raise ValueError("learning.shadow_share needs a second tier to ask")
        if self.fallback_tier not in names:
            raise ValueError(
                f"fallback_tier={self.fallback_tier!r} is not a tier; use one of {', '.join(names)}"
            )
        models = [tier.served_model for tier in self.tiers]
        for kind, taken in (("a tier", names), ("the model name of a tier", models)):
            if self.name in taken:
                raise ValueError(
                    f"name={self.name!r} is also {kind}; `model: {self.name}` would be ambiguous"
                )
        if len(set(models)) != len(models):
            twice = sorted({m for m in models if models.count(m) > 1})
            raise ValueError(
                f"two tiers serve the model name {', '.join(twice)}; give each its own: servedName "
                "of a Model, external.model of an external tier, served_model in a file"
            )
        tenants = [tenant.name for tenant in self.tenants]
        if len(set(tenants)) != len(tenants):
            raise ValueError("two tenants have the same name")
        judge = self.learning.judge
        asks = self.cascade is not None and self.cascade.judge_timeout_s is not None
        if asks and (judge is None or judge.type != "External"):
            raise ValueError(
                "cascade.judge_timeout_s asks learning.judge, which is not of type External; give "
                "one, or remove it"
            )
        for tenant in self.tenants:
            for tier in tenant.allowed_tiers or ():
                if tier not in names:
                    raise ValueError(
                        f"tenant {tenant.name!r}: allowed tier {tier!r} does not exist; "
                        f"use one of {', '.join(names)}"
                    )
        if isinstance(self.endpoints, EndpointSliceEndpoints):
            for ref in self.endpoints.services:
                if ref.tier not in names:
                    raise ValueError(
                        f"endpoints.services names tier {ref.tier!r}, which does not exist"
                    )
        return self

    @model_validator(mode="after")
    def _keys_tell_tenants_apart(self) -> Self:
        whose: dict[str, str] = {}
        for tenant in self.tenants:
            for entry in tenant.key_hashes:
                other = whose.setdefault(entry, tenant.name)
                if other != tenant.name:
                    raise ValueError(
                        f"tenants {other!r} and {tenant.name!r} have the same key, so that nobody "
                        "knows who asks; give each a key of its own"
                    )
        return self

    @model_validator(mode="after")
    def _providers_may_be_asked(self) -> Self:
        asked = [(f"tier {tier.name!r}", tier.url, tier.api_key_file) for tier in self.tiers]
        judge = self.learning.judge
        if judge is not None:
            asked.append(("learning.judge", judge.url, judge.api_key_file))
        for who, url, key in asked:
            why = self.outward.refused(url, key is not None) if url is not None else None
            if why is not None:
                raise ValueError(f"{who}: url {why}")
        return self

    def tier(self, name: str) -> TierConfig:
        for tier in self.tiers:
            if tier.name == name:
                return tier
        raise KeyError(name)


def served_by(config: RouterConfig, tier: TierConfig) -> tuple[str | None, ...]:
    """Who answers a tier's requests: where this differs, what was learnt of it is of another."""
    services: tuple[str, ...] = ()
    if isinstance(config.endpoints, EndpointSliceEndpoints):
        services = tuple(s.service for s in config.endpoints.services if s.tier == tier.name)
    return (tier.served_model, tier.engine, tier.url, *services)


def parse_config(text: str | bytes, source: str = "configuration") -> RouterConfig:
    """Parse JSON text. Raises ConfigError with one line per broken field."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{source} is not JSON: {error}") from error
    try:
        return RouterConfig.model_validate(data)
    except ValidationError as error:
        lines = []
        for item in error.errors(include_url=False):
            where = ".".join(str(part) for part in item["loc"]) or "the whole"
            message = item["msg"].removeprefix("Value error, ")
            if item["type"] == "extra_forbidden":
                message = "unknown field; remove it or check its spelling"
            lines.append(f"{source}: {where}: {message}")
        raise ConfigError("\n".join(lines)) from error


def load_config(path: Path) -> RouterConfig:
    """Read and parse a file. Raises ConfigError that names the file."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    return parse_config(text, str(path))
