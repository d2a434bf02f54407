"""What a router can be told, field by field.

The operator renders this class into a ConfigMap and the router parses the same class, so the
two cannot disagree. File locations that a pod mounts are command-line arguments, never fields:
a local node remaps them there. Importing this module costs pydantic and nothing else.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from tandem_router.addresses import Outward, networks, shows_key
from tandem_router.errors import ConfigError

Name = Annotated[
    str, Field(min_length=1, max_length=253, pattern=r"^[A-Za-z0-9][A-Za-z0-9._/:-]*$")
]
Fraction = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
Usd = Annotated[float, Field(ge=0.0, le=1e9, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0.0, le=1e9, allow_inf_nan=False)]


class Section(BaseModel):
    """Common rules: values never change after parsing, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class CapabilitiesConfig(Section):
    """What an external tier can do; a request that needs what it cannot goes elsewhere."""

    tools: bool = Field(default=True, description="Function calling: `tools`, `functions`.")
    structured_output: bool = Field(
        default=True, description="`response_format` other than text, guided decoding."
    )
    images: bool = Field(default=True, description="Image parts in chat messages.")
    logprobs: bool = Field(default=True, description="Log-probabilities of tokens.")
    embeddings: bool = Field(default=False, description="/v1/embeddings.")
    generation: bool = Field(
        default=True, description="Answers with text; false for a model that only embeds."
    )
    context_length: int | None = Field(
        default=None, ge=1, description="Prompt plus answer, tokens; absent: not known."
    )


class TierConfig(Section):
    """One model that can answer: a pool of our workers or an external endpoint."""

    name: Name = Field(description="Name of the tier; `model: <name>` in a request forces it.")
    served_model: Name = Field(
        description="Model name that the workers serve; `model: <served_model>` forces the tier "
        "too, and replies carry it."
    )
    kind: Literal["pool", "external"] = Field(
        default="pool",
        description="pool: our workers, found through the endpoints; external: an "
        "OpenAI-compatible server at `url`.",
    )
    engine: Literal["Tandem", "VLLM", "OpenAI"] = Field(
        default="Tandem",
        description="Pool only: what its workers are, so how they are asked and what they tell.",
    )
    engine_order: Literal["None", "Length", "Deadline"] = Field(
        default="None",
        description="What an engine that orders its queue by a number is given: None: nothing; "
        "Length: expected tokens of the answer, few first; Deadline: the first token's, early "
        "first. A client's x-tandem-priority goes before either.",
    )
    url: str | None = Field(
        default=None,
        max_length=2048,
        pattern=r"^https?://[^\s?#]+$",
        description="External tier only: base URL up to and including /v1.",
    )
    api_key_file: str | None = Field(
        default=None,
        max_length=4096,
        description="External tier only: file with the bearer token to send; read once.",
    )
    capabilities: CapabilitiesConfig | None = Field(
        default=None,
        description="External tier only: what it can do; absent: everything. Workers report it.",
    )
    usd_per_1m_input_tokens: Usd = Field(
        default=0.0, description="Price of one million prompt tokens, US dollars."
    )
    usd_per_1m_output_tokens: Usd = Field(
        default=0.0, description="Price of one million generated tokens, US dollars."
    )
    token_prices: Literal["Listed", "Measured", "Nominal", "None"] = Field(
        default="Listed",
        description="Where the prices are from; the page says of Nominal ones that nothing "
        "measured them, and of None that the tier counts as free.",
    )
    usd_per_1m_cached_input_tokens: Usd | None = Field(
        default=None,
        description="Price of one million prompt tokens that the provider had cached, as its "
        "usage says; absent: as other prompt tokens.",
    )
    usd_per_1m_reasoning_tokens: Usd | None = Field(
        default=None,
        description="Price of one million reasoning tokens, as usage says; absent: as output.",
    )
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = Field(
        default="max_tokens",
        description="External tier only: the name under which a chat's bound on the answer is "
        "forwarded where the client named none. A provider that does not know the name must "
        "refuse it: one that ignores it would be paid without bound.",
    )
    max_share: Fraction | None = Field(
        default=None,
        description="Largest share of routed requests this tier may take; absent: no limit.",
    )

    @model_validator(mode="after")
    def _external_has_url(self) -> Self:
        if (self.kind == "external") != (self.url is not None):
            raise ValueError(
                f"tier {self.name!r}: `url` belongs to kind external and only there; "
                f"kind is {self.kind!r}"
            )
        if self.kind == "external" and (self.engine, self.engine_order) != ("Tandem", "None"):
            raise ValueError(
                f"tier {self.name!r}: `engine` and `engine_order` belong to kind pool; a provider "
                "has neither"
            )
        if self.kind == "pool" and self.capabilities is not None:
            raise ValueError(
                f"tier {self.name!r}: `capabilities` belongs to kind external; workers report "
                "theirs with their load"
            )
        return self


class RetrainingConfig(Section):
    """When the predictor is trained anew from this router's own labels."""

    every_s: Positive = Field(
        default=86_400.0, description="Least time between two trainings, seconds."
    )
    min_labels: int = Field(
        default=500, ge=50, le=100_000, description="New labels that a training needs."
    )


class PredictorConfig(Section):
    """Which predictor scores a prompt, and what happens when it is late."""

    type: Literal["Learned", "Fixed", "Length"] = Field(
        default="Length",
        description="Learned: the artifact given by --predictor. Length: longer prompts are "
        "harder. Fixed: no prompt is scored, the fallback tier answers.",
    )
    deadline_ms: Positive = Field(
        default=20.0, description="A score later than this counts as late: fallback tier."
    )
    max_prompt_chars: int = Field(
        default=32_768, ge=256, le=1_000_000, description="Only so much of a prompt is scored."
    )
    embedding: str | None = Field(
        default=None,
        max_length=4096,
        description="Learned only: the local model directory named at `tandem train --embedding`; "
        "without it an artifact's embedding view is off.",
    )
    retraining: RetrainingConfig | None = Field(
        default=None,
        description="Learned only: train again from labels that hold prompts (`learning.capture: "
        "Prompts`), into --retraining-dir; absent: never.",
    )
    length_midpoint_chars: Positive = Field(
        default=240.0, description="Length only: prompt length where gain reaches one half."
    )


class ObjectiveConfig(Section):
    """What the cheapest choice must keep."""

    quality_floor: Fraction | None = Field(
        default=None,
        description="Smallest acceptable mean quality, as a fraction of the dearest tier's; "
        "a learned predictor's threshold is chosen to hold it, and `threshold` clipped to that.",
    )


class SloConfig(Section):
    """Latency promised to clients."""

    ttft_ms: Positive | None = Field(default=None, description="Time to first token, ms.")
    tpot_ms: Positive | None = Field(default=None, description="Time per output token, ms.")
    ttft_percentile: float = Field(
        default=95.0, gt=0.0, lt=100.0, description="Requests that must meet ttft_ms, percent."
    )
    tpot_percentile: float = Field(
        default=95.0, gt=0.0, lt=100.0, description="Requests that must meet tpot_ms, percent."
    )


class BudgetConfig(Section):
    """Money."""

    usd_per_hour: Usd | None = Field(
        default=None,
        description="What this process may spend on answers of external tiers, $/h; workers are "
        "paid by the hour and held within the budget by the operator. 0: they use all of it.",
    )
    on_exhausted: Literal["Downgrade", "Queue", "Reject"] = Field(
        default="Downgrade",
        description="Downgrade: cheapest tier; Queue: wait for budget; Reject: 429.",
    )
    max_paid_tokens: int = Field(
        default=4096,
        ge=1,
        le=10_000_000,
        description="Under any ceiling of money an answer has a bound, because a price has. This "
        "is it where the client sets none: forwarded as `max_tokens`, and held until the answer "
        "ends.",
    )
    min_paid_tokens: int = Field(
        default=16,
        ge=1,
        le=1_000_000,
        description="A ceiling that pays only part of an answer shortens it; one that does not "
        "pay this many tokens refuses the request.",
    )


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


class CascadeConfig(Section):
    """Reading the cheaper tier's answer before it is sent, where prompts alone do not decide."""

    streams: bool = Field(
        default=False,
        description="Also for requests with `stream: true`, whose first token then waits for the "
        "cheaper tier's whole answer.",
    )
    deadline_ms: Positive = Field(
        default=250.0,
        description="A verdict on an answer that is later than this does not count: the answer is "
        "sent.",
    )


class TenantConfig(Section):
    """One API tenant. Where any tenant is configured, a request without a key is refused."""

    name: Name = Field(description="Shown in metrics and decisions.")
    key_hashes: tuple[str, ...] = Field(
        default=(),
        max_length=16,
        description="`hmac-sha256:<64 hex digits>` of each API key under the secret given by "
        "--key-secret-file (`python -m tandem_router.api.api_keys` makes both); more may be minted "
        "at run time.",
    )
    allowed_tiers: tuple[str, ...] | None = Field(
        default=None, description="Tiers this tenant may use; absent: all."
    )
    max_concurrency: int | None = Field(default=None, ge=1, description="Requests in flight.")
    requests_per_minute: Positive | None = Field(default=None, description="Rate ceiling.")
    tokens_per_minute: Positive | None = Field(
        default=None, description="Prompt plus generated tokens per minute."
    )
    usd_per_hour: Positive | None = Field(default=None, description="Spend ceiling, $/h.")
    highest_priority: int = Field(
        default=0,
        ge=-100,
        le=100,
        description="Lowest number (lower goes first) that `x-tandem-priority` may give.",
    )
    max_cost_usd: Positive | None = Field(
        default=None, description="Most that one request may cost, US dollars."
    )

    learning: bool = Field(
        default=True,
        description="Whether answers of this tenant may be asked again of another tier, judged and "
        "captured (`learning`).",
    )

    @model_validator(mode="after")
    def _hashes_well_formed(self) -> Self:
        for entry in self.key_hashes:
            scheme, _, digest = entry.partition(":")
            if (
                scheme != "hmac-sha256"
                or len(digest) != 64
                or set(digest) - set("0123456789abcdef")
            ):
                raise ValueError(
                    f"tenant {self.name!r}: key hash {entry[:24]!r} is not "
                    "hmac-sha256:<64 lower-case hex digits>; make one with "
                    "`python -m tandem_router.api.api_keys`"
                )
        return self


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


class JudgeConfig(Section):
    """Who says which of two answers is good."""

    type: Literal["Exact", "Normalised", "Numeric", "Json", "External"] = Field(
        default="External",
        description="External: a model at `url` is asked which answer is better, in both orders. "
        "The others take the dearest tier's answer for right and compare: the same characters, "
        "words, number or JSON value.",
    )
    url: str | None = Field(
        default=None,
        max_length=2048,
        pattern=r"^https?://[^\s?#]+$",
        description="External only: base URL up to and including /v1.",
    )
    model: str | None = Field(
        default=None, max_length=253, description="External only: model name that the URL knows."
    )
    api_key_file: str | None = Field(
        default=None, max_length=4096, description="External only: file with the bearer token."
    )
    usd_per_1m_input_tokens: Usd = Field(
        default=0.0, description="External only: price of one million prompt tokens, US dollars."
    )
    usd_per_1m_output_tokens: Usd = Field(
        default=0.0, description="External only: price of one million output tokens, US dollars."
    )
    timeout_s: Positive = Field(
        default=30.0, description="External only: a verdict that takes longer is given up."
    )

    @model_validator(mode="after")
    def _external_has_a_model(self) -> Self:
        if self.type == "External" and (self.url is None or self.model is None):
            raise ValueError("a judge of type External needs `url` and `model`")
        if self.type != "External":
            given = sorted(self.model_fields_set - {"type"})
            if given:
                raise ValueError(f"`{given[0]}` belongs to a judge of type External only")
        return self


class LearningConfig(Section):
    """What is found out about quality on live traffic, and what may be spent and kept for it."""

    shadow_share: Fraction = Field(
        default=0.0,
        description="Probability with which an answered request is answered by another tier too, "
        "unseen, and judged; 0: never.",
    )
    daily_usd: Usd = Field(
        default=1.0,
        description="Most that shadow answers and their judge may cost in a day (UTC), over all "
        "replicas, US dollars at list prices.",
    )
    judge: JudgeConfig | None = Field(
        default=None, description="Who judges; `shadow_share` needs one."
    )
    capture: Literal["None", "Features", "Prompts"] = Field(
        default="None",
        description="What a label keeps of its request. Features: hashed n-grams and hand features "
        "(hashes can be guessed); Prompts: the text.",
    )
    retention_days: Positive = Field(
        default=30.0, description="Captured prompts and features are deleted after it."
    )
    redact: tuple[Literal["Emails", "Numbers", "Urls"], ...] = Field(
        default=(), description="What is taken out of a prompt before it is captured."
    )

    @model_validator(mode="after")
    def _shadows_are_judged(self) -> Self:
        if self.shadow_share > 0.0 and self.judge is None:
            raise ValueError("shadow_share needs a `judge`: an unjudged second answer says nothing")
        return self


class LimitsConfig(Section):
    """Largest request the router accepts; beyond any of these it answers 4xx."""

    max_body_bytes: int = Field(default=4 * 2**20, ge=1024, description="Request body, bytes.")
    max_header_bytes: int = Field(default=32_768, ge=1024, description="All headers, bytes.")
    max_json_depth: int = Field(default=32, ge=4, le=500, description="Nesting of the body.")
    max_n: int = Field(default=16, ge=1, description="Choices per request (`n`, `best_of`).")
    max_tokens: int = Field(default=131_072, ge=1, description="`max_tokens` of one request.")
    max_stop: int = Field(default=16, ge=1, description="Stop strings of one request.")
    max_stop_chars: int = Field(default=1024, ge=1, description="Length of one stop string.")
    max_messages: int = Field(default=2048, ge=1, description="Messages of one chat request.")
    max_inflight: int = Field(default=1024, ge=1, description="Requests in flight, all tenants.")
    max_sequences: int = Field(
        default=64, ge=1, description="Prompts times choices (`n`, `best_of`) of one request."
    )
    max_embedding_inputs: int = Field(
        default=2048, ge=1, description="Texts of one request for embeddings."
    )
    max_logit_bias: int = Field(default=300, ge=0, description="Entries of `logit_bias`.")
    max_logprobs: int = Field(
        default=20, ge=0, description="`top_logprobs`, `logprobs` of one request."
    )
    body_timeout_s: Positive = Field(default=30.0, description="Time a client has to send a body.")
    header_timeout_s: Positive = Field(
        default=10.0, description="Time a client has to send a request's header."
    )
    write_timeout_s: Positive = Field(
        default=30.0, description="A client that reads nothing of its reply this long is left."
    )
    max_held_body_bytes: int = Field(
        default=256 * 2**20, ge=1024, description="Request bodies held at once, bytes."
    )
    max_held_body_bytes_per_sender: int = Field(
        default=64 * 2**20,
        ge=1024,
        description="The same of one tenant, or of one address where no key is needed.",
    )
    max_connections: int = Field(
        default=4096,
        ge=1,
        description="Client connections at once; less where the process may not open as many "
        "files. Probes have a reserve beyond it.",
    )
    max_waiting_connections_per_address: int = Field(
        default=256, ge=1, description="Connections of one address that have asked nothing yet."
    )


class AccessConfig(Section):
    """Which names and which web pages a router answers to."""

    allowed_hosts: tuple[str, ...] | None = Field(
        default=None,
        max_length=64,
        description="Host names without port that requests may be sent to; absent: every one, but "
        "only this machine's where the router listens on a loopback address.",
    )
    cors_origins: tuple[str, ...] = Field(
        default=(),
        max_length=64,
        description="Origins (`https://app.example`) whose pages may use /v1 from a browser; `*`: "
        "all.",
    )


class OutwardConfig(Section):
    """Where external tiers and judges may be; checked at the start and at every connection."""

    only_public: bool = Field(
        default=False,
        description="Public addresses only, as the operator sets it in a cluster. Link-local and "
        "metadata addresses are refused in any case.",
    )
    allowed_networks: tuple[str, ...] = Field(
        default=(),
        max_length=64,
        description="Networks (`10.20.0.0/16`) that are not refused, whatever they are.",
    )
    plain_http_keys: bool = Field(
        default=False,
        description="Send API keys over plain http to other machines, where they can be read.",
    )

    @field_validator("allowed_networks")
    @classmethod
    def _are_networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        networks(value)
        return value

    @property
    def rule(self) -> Outward:
        """What connections are held to."""
        return Outward(self.only_public, networks(self.allowed_networks))

    def refused(self, url: str, has_key: bool) -> str | None:
        """What is wrong with a provider's URL, and the next step; None where nothing is."""
        why = self.rule.refused_url(url)
        if why is not None:
            return f"{url!r} {why}; use another, or add its network to outward.allowed_networks"
        if has_key and not self.plain_http_keys and shows_key(url):
            return (
                f"{url!r} is plain http, which shows the API key on the way; use https, or set "
                "outward.plain_http_keys"
            )
        return None


class OutlierConfig(Section):
    """When a worker that keeps failing requests is left out, whatever its load report says."""

    consecutive_failures: int = Field(
        default=5, ge=1, description="Failed requests in a row that eject a worker."
    )
    base_ejection_s: Positive = Field(
        default=30.0, description="First ejection; each further one lasts twice as long."
    )
    max_ejection_s: Positive = Field(default=300.0, description="Longest ejection.")
    max_ejected_share: Fraction = Field(
        default=0.5,
        description="Largest share of a tier's workers that may be out at once; one always may.",
    )


class FailoverConfig(Section):
    """How long and how often a request is carried on when workers or providers fail."""

    wait_s: Positive = Field(
        default=60.0,
        description="A request that has no answer yet this long after its arrival is refused; a "
        "stream that lost its worker waits this long for another. Longer than a worker's restart "
        "with weights in page cache.",
    )
    wake_s: Positive = Field(
        default=30.0,
        description="A request for a tier that has no worker at all, because it is scaled to zero, "
        "waits this long: as long as a worker takes to start.",
    )
    tier_wait_s: float = Field(
        default=2.0,
        ge=0.0,
        le=3600.0,
        description="A routed request whose pool has no worker waits this long for a restart, "
        "then takes another tier.",
    )
    tier_patience_s: Positive = Field(
        default=15.0,
        description="A routed request leaves an external tier that has not begun to answer after "
        "this long, where another tier may answer; a pool, whose workers report their load, "
        "after half of wait_s.",
    )
    answer_s_per_token: float = Field(
        default=0.05,
        ge=0.0,
        le=60.0,
        description="A whole reply comes at its end: each token it may have (at most 4096; 1024 "
        "where max_tokens is absent) adds this to what wait_s and a tier's patience leave it.",
    )
    max_attempts: int = Field(default=8, ge=1, description="Workers tried per request.")
    retry_share: Fraction = Field(
        default=0.2,
        description="Retries on the same tier that may be under way at once, as a share of its "
        "requests in flight.",
    )
    min_retries: int = Field(
        default=3, ge=0, le=10_000, description="Retries that may always be under way per tier."
    )
    outliers: OutlierConfig = OutlierConfig()
    connect_timeout_s: Positive = Field(default=2.0, description="Name look-up and TCP connect.")
    stall_timeout_s: Positive = Field(
        default=120.0,
        description="No byte for this long counts as a dead worker: above the longest queue "
        "wait plus prefill, because failing over a live worker only adds load.",
    )
    dead_after_s: Positive = Field(
        default=15.0,
        description="A worker without a load report for this long loses its requests to others; "
        "well above what a report takes on an overloaded machine.",
    )
    max_kept_bytes: int = Field(
        default=256 * 1024,
        ge=1024,
        description="Forwarded bytes kept per stream; beyond it they are condensed to token ids.",
    )


class PickingConfig(Section):
    """How a worker is chosen within a tier."""

    prefix_block_bytes: int = Field(
        default=256, ge=16, description="Bytes per hashed prefix block (about 64 tokens)."
    )
    max_prefix_blocks: int = Field(
        default=256, ge=0, description="Hashed blocks per prompt; 0 switches affinity off."
    )
    max_prefix_entries: int = Field(
        default=65_536, ge=1, description="Blocks remembered for each worker."
    )
    load_poll_s: Positive = Field(default=1.0, description="Period of GET /v1/load per worker.")


class FileEndpoints(Section):
    """Endpoints from the JSON file given by --endpoints, read again when it changes."""

    type: Literal["file"] = "file"
    poll_s: Positive = Field(default=0.25, description="How often the file's stamp is looked at.")


class ServiceRef(Section):
    """A Kubernetes Service whose EndpointSlices name the workers of one role."""

    tier: Name
    role: Literal["unified", "prefill", "decode"]
    service: Name
    port: int = Field(default=8100, ge=1, le=65535, description="Used where a slice names none.")


class EndpointSliceEndpoints(Section):
    """Endpoints from watching EndpointSlices with the pod's ServiceAccount."""

    type: Literal["endpointslice"]
    namespace: Name
    services: tuple[ServiceRef, ...] = Field(min_length=1, max_length=64)
    api_url: str | None = Field(
        default=None,
        max_length=2048,
        description="API server; absent: KUBERNETES_SERVICE_HOST and _PORT.",
    )
    credentials_dir: str = Field(
        default="/var/run/secrets/kubernetes.io/serviceaccount",
        max_length=4096,
        description="Folder with token and ca.crt; the token is read again as it rotates.",
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
        return next(tier for tier in self.tiers if tier.name == name)


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
