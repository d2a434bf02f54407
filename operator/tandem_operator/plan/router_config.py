"""The configuration of a Router's pods, as the class that they parse it with."""

from __future__ import annotations

from collections.abc import Mapping

from tandem_operator.plan.engines import engine_of
from tandem_operator.plan.measured_prices import TokenPrice
from tandem_operator.plan.model import pool_name
from tandem_operator.plan.objects import Settings, service_name
from tandem_operator.plan.predictor import artifact_path, embedding_volume
from tandem_operator.plan.provider_keys import key_file
from tandem_operator.plan.router_store import store_config
from tandem_operator.plan.training import trains_by_job
from tandem_operator.resources import Model, Router, TierSpec
from tandem_operator.resources.base import Object, quantity, seconds
from tandem_operator.resources.budget_split import budget_split
from tandem_operator.resources.router import Learning
from tandem_router.config import RouterConfig

# Longer than a worker's: what a worker leaves unfinished another one carries on, but a client's
# stream ends with its router. An idle router ends at once.
DRAIN_TIMEOUT_S = 300
# What a judge has of an answer that waits for it; the SLO may leave less.
JUDGE_READS_S = 3.0

# Tokens that one worker makes in an hour, to turn a price per hour into one per token where no
# profile was measured: 1,000 tokens/s. Only the ratio between tiers matters for routing.
NOMINAL_TOKENS_PER_HOUR = 3_600_000
NOMINAL_INPUT_DISCOUNT = 0.25


def usd_per_hour(model: Model) -> float | None:
    """Price of one replica of each role for an hour; None when a role has no price."""
    prices = [role.usd_per_hour for role in model.spec.roles().values()]
    if any(p is None for p in prices):
        return None
    return sum(float(p) for p in prices if p is not None)


def token_prices(
    tier: TierSpec, models: Mapping[str, Model], measured: Mapping[str, TokenPrice]
) -> str:
    """Where a tier's prices per token are from; `Nominal` ones were never measured."""
    if tier.name in measured:
        return "Measured"
    if tier.external is not None:
        listed = float(tier.external.usd_per_1m_input_tokens) + float(
            tier.external.usd_per_1m_output_tokens
        )
        return "Listed" if listed > 0.0 else "None"
    if tier.usd_per_1m_input_tokens is not None and tier.usd_per_1m_output_tokens is not None:
        return "Listed"
    model = models.get(tier.model_ref.name) if tier.model_ref is not None else None
    return "Nominal" if model is not None and usd_per_hour(model) else "None"


def _tier(
    tier: TierSpec, models: Mapping[str, Model], measured: Mapping[str, TokenPrice]
) -> Object:
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
        for name in ("usd_per_1m_cached_input_tokens", "usd_per_1m_reasoning_tokens"):
            if (price := getattr(external, name)) is not None:
                entry[name] = float(price)
        if external.max_tokens_field != "max_tokens":
            entry["max_tokens_field"] = external.max_tokens_field
        if (able := external.capabilities) is not None:
            entry["capabilities"] = {
                "tools": able.tools,
                "structured_output": able.structured_output,
                "images": able.images,
                "logprobs": able.logprobs,
                "embeddings": able.embeddings,
                "generation": able.generation,
                "context_length": able.context_length,
            }
        if (ref := external.api_key_secret_ref) is not None:
            entry["api_key_file"] = key_file(ref)
        return entry
    if tier.model_ref is None:
        raise ValueError(f"tier {tier.name} has neither modelRef nor external")
    model = models[tier.model_ref.name]
    hourly = usd_per_hour(model) or 0.0
    nominal = hourly / NOMINAL_TOKENS_PER_HOUR * 1e6
    known = measured.get(tier.name) or TokenPrice(
        round(nominal * NOMINAL_INPUT_DISCOUNT, 6), round(nominal, 6)
    )
    prices = {
        "usd_per_1m_input_tokens": float(
            tier.usd_per_1m_input_tokens or known.usd_per_1m_input_tokens
        ),
        "usd_per_1m_output_tokens": float(
            tier.usd_per_1m_output_tokens or known.usd_per_1m_output_tokens
        ),
    }
    return {
        "name": tier.name,
        "served_model": model.served_name,
        "kind": "pool",
        "token_prices": token_prices(tier, models, measured),
        **prices,
        **share,
    } | dict(engine_of(model).router_fields(model))


def router_config(
    router: Router,
    models: Mapping[str, Model],
    settings: Settings,
    measured: Mapping[str, TokenPrice] | None = None,
) -> RouterConfig:
    """The configuration of a Router's pods; models holds every Model that a tier names.

    measured: prices of tokens by tier, of those that have no listed ones.

    Raises pydantic.ValidationError when names clash.
    """
    spec = router.spec
    data: Object = {
        "name": router.metadata.name,
        "generation": router.metadata.generation,
        "tiers": [_tier(t, models, measured or {}) for t in spec.tiers],
        "fallback_tier": spec.fallback,
        "predictor": {
            "type": spec.predictor.kind,
            "deadline_ms": seconds(spec.predictor.deadline) * 1000,
        },
        "slo": _slo(router),
        "budget": {"on_exhausted": spec.budget.on_exhausted},
        "http_port": settings.router_port,
        "failover": {"wake_s": _wake_s(router, models)},
        "drain_timeout_s": DRAIN_TIMEOUT_S,
    }
    if (tokens := budget_split(router, models).tokens_usd_per_hour) is not None:
        data["budget"]["usd_per_hour"] = max(0.0, round(tokens, 6))
    if spec.replicas > 1:
        data["replicas"] = spec.replicas
    if spec.gateway is not None:
        data["gateway_port"] = settings.gateway_port
    training = spec.predictor.training
    if training is not None and training.from_labels:
        data["predictor"]["retraining"] = {
            "every_s": seconds(training.every),
            "min_labels": training.min_labels,
        }
        if trains_by_job(router, settings):
            data["predictor"]["retraining"]["by"] = "Job"
    if spec.predictor.embedding is not None:
        data["predictor"]["embedding"] = embedding_volume(spec.predictor.embedding)[1]
    if (artifact := artifact_path(router)) is not None:
        data["predictor"]["artifact"] = artifact
    floor = spec.held_floor if spec.held_floor is not None else spec.learned_floor
    if floor is not None:
        data["objective"] = {"quality_floor": floor}
    if spec.cascade is not None:
        data["cascade"] = {
            "streams": spec.cascade.streams,
            "deadline_ms": seconds(spec.cascade.deadline) * 1000,
        }
        judge = spec.learning.judge if spec.learning is not None else None
        if judge is not None and judge.type == "ExternalInCascade":
            waits_s = max(JUDGE_READS_S, seconds(spec.cascade.deadline))
            data["cascade"]["judge_timeout_s"] = waits_s
    if spec.cache.enabled:
        data["cache"] = {
            "enabled": True,
            "max_bytes": int(quantity(spec.cache.max_memory)),
            "ttl_s": seconds(spec.cache.ttl),
            "eviction": spec.cache.eviction,
        }
    if (store := store_config(router, settings)) is not None:
        data["store"] = store
    if spec.access.cors_origins or spec.access.allowed_hosts is not None:
        data["access"] = {
            "cors_origins": spec.access.cors_origins,
            "allowed_hosts": spec.access.allowed_hosts,
        }
    if spec.learning is not None:
        data["learning"] = _learning(spec.learning)
    if spec.providers():
        data["outward"] = _outward(settings)
    if spec.routing != "Active":
        data["routing"] = spec.routing
    if spec.threshold is not None:
        data["threshold"] = float(spec.threshold)
    if spec.tenants:
        data["tenants"] = [_tenant(t.model_dump(exclude_none=True)) for t in spec.tenants]
    if settings.endpoints == "endpointslice":
        data["endpoints"] = {
            "type": "endpointslice",
            "namespace": router.metadata.namespace,
            "services": _services(router, models, settings),
            # Written out, so that a node without mount namespaces can put the real path in.
            "credentials_dir": "/var/run/secrets/kubernetes.io/serviceaccount",
        }
    else:
        data["endpoints"] = {"type": "file"}
    return RouterConfig.model_validate(data)


def _outward(settings: Settings) -> Object:
    """Where providers may be: what the installation allows; on one's own machine, oneself."""
    allow = settings.allow
    if allow is None:
        return {"plain_http_keys": True}
    return {
        "only_public": True,
        "allowed_networks": allow.external_networks,
        "plain_http_keys": allow.plain_http_keys,
    }


def _wake_s(router: Router, models: Mapping[str, Model]) -> float:
    """How long a request for a sleeping tier is held: as long as its workers may take to start."""
    used = [models[t.model_ref.name] for t in router.spec.tiers if t.model_ref is not None]
    return max([seconds(m.spec.rollout.startup_timeout) for m in used], default=30.0)


def _learning(learning: Learning) -> Object:
    data: Object = {
        "shadow_share": float(learning.shadow_share),
        "daily_usd": float(learning.daily_usd),
        "capture": learning.capture,
        "retention_days": seconds(learning.retention) / 86_400,
        "redact": list(learning.redact),
    }
    if (judge := learning.judge) is None:
        return data
    data["judge"] = {"type": judge.type}
    if judge.is_external:
        data["judge"] |= {
            "type": "External",
            "url": judge.url,
            "model": judge.model,
            "usd_per_1m_input_tokens": float(judge.usd_per_1m_input_tokens),
            "usd_per_1m_output_tokens": float(judge.usd_per_1m_output_tokens),
        }
        if (ref := judge.api_key_secret_ref) is not None:
            data["judge"]["api_key_file"] = key_file(ref)
    return data


def _tenant(fields: Object) -> Object:
    for name in ("usd_per_hour", "max_cost_usd"):
        if name in fields:
            fields[name] = float(fields[name])
    return fields


def _slo(router: Router) -> Object:
    slo: Object = {}
    if (ttft := router.spec.slo.ttft) is not None:
        slo["ttft_ms"] = seconds(ttft.target) * 1000
        slo["ttft_percentile"] = float(ttft.percentile)
    if (tpot := router.spec.slo.tpot) is not None:
        slo["tpot_ms"] = seconds(tpot.target) * 1000
        slo["tpot_percentile"] = float(tpot.percentile)
    return slo


def _services(router: Router, models: Mapping[str, Model], settings: Settings) -> list[Object]:
    return [
        {
            "tier": tier.name,
            "role": role,
            "service": service_name(pool_name(tier.model_ref.name, role)),
            "port": settings.worker_port,
        }
        for tier in router.spec.tiers
        if tier.model_ref is not None
        for role in models[tier.model_ref.name].spec.roles()
    ]
