"""The whole of what a user writes of a Router."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tandem_operator.resources.base import (
    Duration,
    Fraction,
    Name,
    ObjectRef,
    OpaqueObject,
    Quantity,
    Resource,
    SecretKeyRef,
)
from tandem_operator.resources.model import Image, Resources
from tandem_operator.resources.router.access import Access, Tenant
from tandem_operator.resources.router.learning import Learning
from tandem_operator.resources.router.objectives import (
    DEFAULT_QUALITY_FLOOR,
    SLO,
    Budget,
    Objective,
)
from tandem_operator.resources.router.predictor import Cascade, Predictor
from tandem_operator.resources.router.store import Store
from tandem_operator.resources.router.tiers import TierSpec


class Cache(Resource):
    """Cache of exact responses."""

    enabled: bool = Field(default=False, description="Answer repeated requests from the cache.")
    max_memory: Quantity = Field(
        default="64Mi", description="Memory for cached responses, a quantity in bytes."
    )
    ttl: Duration = Field(default="1h", description="Age at which a response is dropped.")
    eviction: Literal["GDSF", "LEC"] = Field(
        default="GDSF",
        description="What leaves first: LEC the response that saves least per byte; GDSF the same, "
        "and old fame ages.",
    )


class Scaling(Resource):
    """Who sets the replica counts of the pools."""

    mode: Literal["Managed", "External", "Advise"] = Field(
        default="External",
        description="Managed: this Router's control loop. External: whoever writes the scale of "
        "the WorkerPools, an HPA, KEDA or a person; the Models' own counts begin. Advise: as "
        "External, and the loop tells in status and Events what it would do.",
    )
    policy_ref: ObjectRef | None = Field(
        default=None,
        description="AutoscalingPolicy for Managed and Advise; built-in values when absent.",
    )

    @property
    def has_loop(self) -> bool:
        """Whether a control loop runs for the Router, with hands or without."""
        return self.mode != "External"


class Gateway(Resource):
    """Who asks the Router as the endpoint picker of an InferencePool."""

    namespace: Name = Field(
        description="Namespace of the gateway's pods; its pods alone may ask, and reach workers."
    )
    tls_secret_name: Name | None = Field(
        default=None,
        description="Secret of type kubernetes.io/tls by which the gateway speaks TLS with the "
        "Router; taken up when renewed. In the clear when absent.",
    )


class RouterResources(Resources):
    """What one router pod asks for; a share of the CPU, so that no neighbour starves it."""

    cpu: Quantity | None = Field(
        default="500m", description="CPU cores requested, such as 500m or 2."
    )


class RouterSpec(Resource):
    """What a Router should be."""

    tiers: list[TierSpec] = Field(
        min_length=1, max_length=8, description="The choices, cheapest first; the last is the best."
    )
    fallback_tier: Name | None = Field(
        default=None,
        description="Tier used when the predictor is late, missing or broken; the last tier when "
        "absent.",
    )
    predictor: Predictor = Field(
        default_factory=Predictor, description="How the gain of the larger tier is predicted."
    )
    threshold: Fraction | None = Field(
        default=None,
        description="Predicted gain above which the larger tier is taken; it stays, only a budget "
        "moves it up meanwhile. When absent, what holds qualityFloor, else 0.1 (Length: 0.5).",
    )
    objective: Objective = Field(
        default_factory=Objective,
        description="The quality that the cheapest choice must keep.",
    )
    slo: SLO = Field(
        default_factory=SLO, description="Latency objectives: time to first token and per token."
    )
    budget: Budget = Field(
        default_factory=Budget, description="What may be spent: GPUs and US dollars per hour."
    )
    cascade: Cascade | None = Field(
        default=None,
        description="Where the prompt leaves it open, the cheaper tier answers, a verifier reads "
        "the answer, and only then it is sent or the dearer tier asked. Needs a Learned predictor "
        "whose data held answers. Never when absent.",
    )
    cache: Cache = Field(default_factory=Cache, description="Cache of exact responses.")
    tenants: list[Tenant] = Field(
        default_factory=list,
        max_length=256,
        description="Customers with API keys; without any, the endpoint is open.",
    )
    key_secret_ref: SecretKeyRef | None = Field(
        default=None, description="Secret with the key of the tenants' hashes."
    )
    metrics_token_secret_ref: SecretKeyRef | None = Field(
        default=None,
        description="Secret with the bearer token of /metrics, needed once there are tenants.",
    )
    store: Store | None = Field(
        default=None,
        description="Where spend, decisions, keys and labels outlive the pods; in memory when "
        "absent (in local mode: a file of the run).",
    )
    access: Access = Field(
        default_factory=Access,
        description="Which names and which web pages the endpoint answers to.",
    )
    learning: Learning | None = Field(
        default=None,
        description="What is found out about quality on live traffic; nothing but users' feedback "
        "when absent.",
    )
    routing: Literal["Active", "Advise"] = Field(
        default="Active",
        description="Advise decides and records, and sends everything to the fallback tier.",
    )
    scaling: Scaling = Field(
        default_factory=Scaling, description="Who sets the replica counts of the pools."
    )
    replicas: int = Field(default=1, ge=0, le=100, description="Router pods, a count.")
    resources: RouterResources = Field(
        default_factory=RouterResources, description="CPU and memory of one router pod."
    )
    service_type: Literal["ClusterIP", "NodePort", "LoadBalancer"] | None = Field(
        default=None,
        description="Type of the endpoint's Service; the installation's (routers.serviceType of "
        "the chart, ClusterIP) when absent.",
    )
    port: int = Field(
        default=8000, ge=1, le=65_535, description="TCP port of the endpoint's Service."
    )
    gateway: Gateway | None = Field(
        default=None,
        description="A Gateway API Inference Extension gateway that asks this Router which worker "
        "takes each request, and carries it there; none when absent.",
    )
    image: Image | None = Field(
        default=None, description="Router image; the operator's own version when absent."
    )
    pod_patch: OpaqueObject | None = Field(
        default=None,
        description="Anything else: merged into the pod template last (strategic for containers, "
        "by name).",
        json_schema_extra={"x-kubernetes-preserve-unknown-fields": True},
    )

    def providers(self) -> list[tuple[str, str, bool]]:
        """(path, URL, whether a key is sent) of everybody outside that the router asks."""
        found = [
            (
                f"spec.tiers[{index}].external.url",
                tier.external.url,
                tier.external.api_key_secret_ref is not None,
            )
            for index, tier in enumerate(self.tiers)
            if tier.external is not None
        ]
        judge = self.learning.judge if self.learning is not None else None
        if judge is not None and judge.url is not None:
            has_key = judge.api_key_secret_ref is not None
            found.append(("spec.learning.judge.url", judge.url, has_key))
        return found

    @property
    def fallback(self) -> str:
        """The fallback tier's name, with its default."""
        return self.fallback_tier or self.tiers[-1].name

    @property
    def held_floor(self) -> float | None:
        """The floor that is held; None where nothing measures quality or a threshold is set."""
        if self.predictor.ranks_by != "Learned" or self.threshold is not None:
            return None
        given = self.objective.quality_floor
        return DEFAULT_QUALITY_FLOOR if given is None else float(given)

    @property
    def learned_floor(self) -> float | None:
        """The floor that only labels can hold: prompt length ranks and states no quality."""
        given, learning = self.objective.quality_floor, self.learning
        if self.predictor.ranks_by != "Length" or given is None or learning is None:
            return None
        return float(given) if float(learning.shadow_share) > 0.0 else None
