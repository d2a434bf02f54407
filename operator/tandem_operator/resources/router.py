"""Router: one endpoint over two or more tiers, with its predictor, objective, SLO and budget."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from tandem_operator.resources.base import (
    Condition,
    Decimal,
    Duration,
    Fraction,
    LabelValue,
    Metadata,
    Name,
    ObjectRef,
    Quantity,
    Resource,
    SecretKeyRef,
    Text,
)
from tandem_operator.resources.model import Image, Resources

ShortText = Annotated[str, StringConstraints(max_length=64)]


class ExternalCapabilities(Resource):
    """What an outside service can do; a request that needs what it cannot goes elsewhere."""

    tools: bool = Field(default=True, description="Function calling.")
    structured_output: bool = Field(
        default=True, description="response_format other than text, guided decoding."
    )
    images: bool = Field(default=True, description="Images in chat messages.")
    logprobs: bool = Field(default=True, description="Log-probabilities of tokens.")
    embeddings: bool = Field(default=False, description="/v1/embeddings.")
    generation: bool = Field(
        default=True, description="Answers with text; false for a model that only embeds."
    )
    context_length: int | None = Field(
        default=None, ge=1, description="Prompt plus answer, in tokens; not known when absent."
    )


class ExternalEndpoint(Resource):
    """An OpenAI-compatible service outside the cluster."""

    url: Annotated[
        str, StringConstraints(pattern=r"^https?://[^\s]{1,1000}$", min_length=8, max_length=1024)
    ] = Field(description="Base URL up to and including /v1, http or https.")
    model: Annotated[str, StringConstraints(min_length=1, max_length=253)] = Field(
        description="Model name that the service knows."
    )
    api_key_secret_ref: SecretKeyRef | None = Field(
        default=None, description="Secret with the API key, sent as a bearer token."
    )
    usd_per_1m_input_tokens: Decimal = Field(
        default="0", description="Price of a million prompt tokens in US dollars."
    )
    usd_per_1m_output_tokens: Decimal = Field(
        default="0", description="Price of a million output tokens in US dollars."
    )
    usd_per_1m_cached_input_tokens: Decimal | None = Field(
        default=None,
        description="Price of a million prompt tokens that the service had cached, in US dollars; "
        "as other prompt tokens when absent.",
    )
    usd_per_1m_reasoning_tokens: Decimal | None = Field(
        default=None,
        description="Price of a million reasoning tokens in US dollars; as output when absent.",
    )
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = Field(
        default="max_tokens",
        description="Name under which the service takes the bound of a chat's answer.",
    )
    capabilities: ExternalCapabilities | None = Field(
        default=None, description="What the service can do; everything when absent."
    )


class TierSpec(Resource):
    """One choice of the router, cheapest first."""

    name: Name = Field(description="Name of the tier in replies, metrics and overrides.")
    model_ref: ObjectRef | None = Field(
        default=None, description="A Model in this namespace; excludes external."
    )
    external: ExternalEndpoint | None = Field(
        default=None, description="A service outside the cluster; excludes modelRef."
    )
    max_share: Fraction | None = Field(
        default=None,
        description='Largest share of requests that may go here, a decimal string, 0 to "1".',
    )
    usd_per_1m_input_tokens: Decimal | None = Field(
        default=None,
        description="Price of a million prompt tokens in US dollars, for a tier with modelRef; "
        "derived from its price per hour when absent.",
    )
    usd_per_1m_output_tokens: Decimal | None = Field(
        default=None,
        description="Price of a million output tokens in US dollars, for a tier with modelRef.",
    )


class Training(Resource):
    """Train the predictor from measured outcomes."""

    data: Annotated[
        str,
        StringConstraints(
            pattern=r"^((file|pvc|configmap)://|image:///)[^\s]{1,1000}$",
            min_length=8,
            max_length=1024,
        ),
    ] = Field(
        description="JSON lines (plain or .gz) of prompts and the quality of each tier: "
        "configmap://name/key, pvc://claim/path, image:///path (inside the router image), "
        "file:///path (on the node) or, in local mode, file://./path."
    )
    from_labels: bool = Field(
        default=False,
        description="Train again from data and the prompts of labels (learning.capture: Prompts); "
        "a new predictor is scored beside the old one and takes over where it proves better.",
    )
    every: Duration = Field(
        default="24h", description="With fromLabels: least time between two trainings."
    )
    min_labels: int = Field(
        default=500,
        ge=50,
        le=100_000,
        description="With fromLabels: new labels that a training needs, a count.",
    )


class Predictor(Resource):
    """How the gain of the larger tier is predicted for a prompt."""

    type: Literal["Learned", "Length", "Fixed"] | None = Field(
        default=None,
        description="Learned: from outcomes, what artifact or training mean. Length: longer "
        "prompts are harder. Fixed: always the fallback tier. When absent: Learned with artifact "
        "or training, else Length.",
    )
    artifact: (
        Annotated[
            str,
            StringConstraints(
                pattern=r"^((file|pvc|configmap)://|image:///)[^\s]{1,1000}$",
                min_length=8,
                max_length=1024,
            ),
        ]
        | None
    ) = Field(
        default=None,
        description="A trained predictor: configmap://name, pvc://claim/dir, image:///dir (inside "
        "the router image), file:///dir (on the node) or, in local mode, file://./dir.",
    )
    embedding: (
        Annotated[
            str,
            StringConstraints(
                pattern=r"^((file|pvc)://|image:///)[^\s]{1,1000}$", min_length=8, max_length=1024
            ),
        ]
        | None
    ) = Field(
        default=None,
        description="The model directory that the artifact was trained with (tandem train "
        "--embedding): pvc://claim/dir, image:///dir (inside the router image), file:///dir (on "
        "the node) or, in local mode, file://./dir. Without it that view is off.",
    )
    training: Training | None = Field(
        default=None, description="Train one before use; the router answers meanwhile."
    )
    deadline: Duration = Field(
        default="20ms", description="A prediction later than this means the fallback tier."
    )

    @property
    def kind(self) -> Literal["Learned", "Length", "Fixed"]:
        """The type, with what artifact or training imply."""
        learned = self.artifact is not None or self.training is not None
        return self.type or ("Learned" if learned else "Length")


# The floor of a Learned predictor that is given none; nothing measures quality without one.
DEFAULT_QUALITY_FLOOR = 0.95


class Objective(Resource):
    """What the cheapest choice must keep."""

    quality_floor: Fraction | None = Field(
        default=None,
        description="Least quality to keep, as a fraction of the last tier's quality. When absent: "
        "0.95 with a Learned predictor that has no threshold, else none. With Length only labels "
        "(learning) hold it; with Fixed, or without them, nothing does: condition FloorNotHeld "
        "says so.",
    )


class LatencyTarget(Resource):
    """A latency that a share of requests must meet."""

    percentile: int = Field(
        default=95,
        ge=50,
        le=99,
        description="Share of the last five minutes' requests that must meet it, in percent.",
    )
    target: Duration = Field(description="The latency, such as 500ms.")


class SLO(Resource):
    """Latency objectives."""

    ttft: LatencyTarget | None = Field(default=None, description="Time to first token.")
    tpot: LatencyTarget | None = Field(
        default=None, description="Time per output token after the first."
    )


class Budget(Resource):
    """What may be spent."""

    gpus: int | None = Field(
        default=None, ge=0, le=100_000, description="Most GPUs over all tiers, a count."
    )
    usd_per_hour: Decimal | None = Field(
        default=None,
        description="Most US dollars per hour, worker hours plus external tokens. Beside an "
        "external tier, workers have the price of the replicas that their Models ask for, and "
        "tokens the rest.",
    )
    on_exhausted: Literal["Downgrade", "Queue", "Reject"] = Field(
        default="Downgrade", description="What happens to requests beyond the budget."
    )


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


class Cascade(Resource):
    """Reading the cheaper tier's answer before it is sent, where the prompt leaves it open."""

    streams: bool = Field(
        default=False,
        description="Also for requests with stream: true; their first token then waits for the "
        "cheaper tier's whole answer.",
    )
    deadline: Duration = Field(
        default="250ms",
        description="A verdict on an answer later than this does not count, and the answer is "
        "sent.",
    )


class SqliteStore(Resource):
    """One file on a claim, for one router pod."""

    size: Quantity = Field(default="1Gi", description="Size of the claim, a quantity in bytes.")
    storage_class_name: ShortText | None = Field(
        default=None, description="StorageClass of the claim; the cluster's default when absent."
    )


class PostgresStore(Resource):
    """A PostgreSQL database, which several router pods share."""

    secret_ref: SecretKeyRef = Field(
        description="Secret with the URL, postgresql://user:password@host:port/database."
    )


class Store(Resource):
    """Where spend, decisions, keys and labels outlive the pods."""

    sqlite: SqliteStore | None = Field(default=None, description="A file; excludes postgres.")
    postgres: PostgresStore | None = Field(default=None, description="A database; excludes sqlite.")


class Judge(Resource):
    """Who says which of two answers is good."""

    type: Literal["Exact", "Normalised", "Numeric", "Json", "External"] = Field(
        default="External",
        description="External: a model is asked which answer is better, in both orders. The others "
        "take the last tier's answer for right and compare: the same characters, words, number or "
        "JSON value.",
    )
    url: (
        Annotated[
            str,
            StringConstraints(pattern=r"^https?://[^\s]{1,1000}$", min_length=8, max_length=1024),
        ]
        | None
    ) = Field(default=None, description="External: base URL up to and including /v1.")
    model: Annotated[str, StringConstraints(min_length=1, max_length=253)] | None = Field(
        default=None, description="External: model name that the service knows."
    )
    api_key_secret_ref: SecretKeyRef | None = Field(
        default=None, description="External: Secret with the API key, sent as a bearer token."
    )
    usd_per_1m_input_tokens: Decimal = Field(
        default="0", description="External: price of a million prompt tokens in US dollars."
    )
    usd_per_1m_output_tokens: Decimal = Field(
        default="0", description="External: price of a million output tokens in US dollars."
    )


class Learning(Resource):
    """What is found out about quality on live traffic, and what may be spent and kept for it."""

    shadow_share: Fraction = Field(
        default="0",
        description="Probability with which an answered request is answered by another tier too, "
        "unseen, and judged, a decimal string.",
    )
    daily_usd: Decimal = Field(
        default="1",
        description="Most US dollars that this may cost in a day (UTC), at list prices.",
    )
    judge: Judge | None = Field(
        default=None, description="Who judges; shadowShare above 0 needs one."
    )
    capture: Literal["None", "Features", "Prompts"] = Field(
        default="None",
        description="What a label keeps of its request. Features: hashed n-grams and numbers, "
        "which can be guessed; Prompts: the text, which tandem train can learn from.",
    )
    retention: Duration = Field(
        default="720h", description="Age at which captured features and prompts are deleted."
    )
    redact: list[Literal["Emails", "Numbers", "Urls"]] = Field(
        default_factory=list,
        max_length=3,
        description="What is taken out of a prompt before it is captured.",
    )


class Tenant(Resource):
    """One customer with API keys and limits."""

    name: Name = Field(description="Name in metrics and logs.")
    key_hashes: list[
        Annotated[
            str,
            StringConstraints(pattern=r"^hmac-sha256:[0-9a-f]{64}$", min_length=76, max_length=76),
        ]
    ] = Field(
        default_factory=list,
        max_length=16,
        description="Keyed hashes of the tenant's API keys, hmac-sha256:<64 hex digits>; "
        "`python -m tandem_router.api.api_keys` makes key and hash. `tandem keys create` mints "
        "more at run time; a key that is revoked there stays revoked.",
    )
    allowed_tiers: list[Name] | None = Field(
        default=None, max_length=8, description="Tiers that the tenant may use; all when absent."
    )
    max_concurrency: int | None = Field(
        default=None, ge=1, le=100_000, description="Most requests at the same time, a count."
    )
    requests_per_minute: int | None = Field(
        default=None, ge=1, le=10_000_000, description="Most requests in a minute, a count."
    )
    tokens_per_minute: int | None = Field(
        default=None, ge=1, le=1_000_000_000, description="Most prompt plus output tokens a minute."
    )
    usd_per_hour: Decimal | None = Field(default=None, description="Most US dollars in an hour.")
    max_cost_usd: Decimal | None = Field(
        default=None, description="Most US dollars that one request may cost."
    )
    learning: bool = Field(
        default=True,
        description="Whether the tenant's requests may be asked again, judged and captured.",
    )


class Access(Resource):
    """Which names and which web pages the endpoint answers to."""

    allowed_hosts: (
        list[
            Annotated[
                str,
                StringConstraints(pattern=r"^[a-z0-9.:\[\]_-]+$", min_length=1, max_length=253),
            ]
        ]
        | None
    ) = Field(
        default=None,
        max_length=64,
        description="Host names without port, in lower case, that requests may be sent to; every "
        "one when absent (in local mode: this machine's).",
    )
    cors_origins: list[
        Annotated[
            str,
            StringConstraints(
                pattern=r"^(\*|https?://[a-z0-9.:\[\]_-]+)$", min_length=1, max_length=253
            ),
        ]
    ] = Field(
        default_factory=list,
        max_length=64,
        description="Origins such as https://app.example whose pages may use /v1 from a browser, "
        "or *: all.",
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
    image: Image | None = Field(
        default=None, description="Router image; the operator's own version when absent."
    )
    pod_patch: dict[str, Any] | None = Field(
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
        if self.predictor.kind != "Learned" or self.threshold is not None:
            return None
        given = self.objective.quality_floor
        return DEFAULT_QUALITY_FLOOR if given is None else float(given)

    @property
    def learned_floor(self) -> float | None:
        """The floor that only labels can hold: prompt length ranks and states no quality."""
        given, learning = self.objective.quality_floor, self.learning
        if self.predictor.kind != "Length" or given is None or learning is None:
            return None
        return float(given) if float(learning.shadow_share) > 0.0 else None


class TierStatus(Resource):
    """What one tier does."""

    name: Name = Field(description="Name of the tier.")
    ready: bool = Field(default=False, description="Whether it can answer.")
    share: Decimal | None = Field(default=None, description="Share of requests, 0 to 1.")
    ttft: Duration | None = Field(
        default=None,
        description="Time to first token of the last five minutes, at the percentile of slo.ttft "
        "or 95.",
    )
    tpot: Duration | None = Field(
        default=None,
        description="Time per output token of the last five minutes, at the percentile of "
        "slo.tpot or 95.",
    )
    usd_per_hour: Decimal | None = Field(
        default=None, description="US dollars per hour of its Model's wanted workers."
    )
    token_prices: Literal["Listed", "Measured", "Nominal", "None"] | None = Field(
        default=None,
        description="Where its prices per token are from: Listed in spec; Measured: its Model's "
        "price per hour at the speed that its workers report; Nominal: the same at 1,000 tokens a "
        "second, which nothing measured; None: it counts as free, and so do savings.",
    )
    usd_per_1m_input_tokens: Decimal | None = Field(
        default=None, description="Measured price of one million prompt tokens, US dollars."
    )
    usd_per_1m_output_tokens: Decimal | None = Field(
        default=None, description="Measured price of one million output tokens, US dollars."
    )


class PredictorStatus(Resource):
    """The predictor in use."""

    version: ShortText | None = Field(default=None, description="Version of the artifact.")
    threshold: ShortText | None = Field(
        default=None, description="Predicted gain above which the larger tier is taken now."
    )
    quality_ratio: ShortText | None = Field(
        default=None,
        description="Quality that it expects of the last 500 answers, as a fraction of what it "
        "expects had the last tier given them all.",
    )
    baseline_quality_ratio: ShortText | None = Field(
        default=None,
        description="The same for content-blind routing at equal cost: as many requests for each "
        "tier, whatever is in them.",
    )
    candidate: ShortText | None = Field(
        default=None, description="Version of the one trained from labels that is compared now."
    )
    comparison: Text | None = Field(
        default=None, description="What new labels say so far of it, or of the one it replaced."
    )
    last_change: Text | None = Field(
        default=None,
        description="The last training, promotion, rejection or return: when, of which version, "
        "and why.",
    )
    problem: Text | None = Field(default=None, description="Why none is trained from labels now.")


class QualityStatus(Resource):
    """What labels say of the quality that was delivered."""

    measured: ShortText | None = Field(
        default=None,
        description="Quality delivered, as a fraction of the last tier's; absent with too few "
        "labels.",
    )
    interval: ShortText | None = Field(
        default=None,
        description="Where it lies with 95 % certainty, at any time, such as 0.93-0.97.",
    )
    labels: int = Field(
        default=0, ge=0, description="Requests of which two answers were judged, a count."
    )
    since: ShortText | None = Field(
        default=None, description="Time of the first of these labels, RFC 3339, UTC."
    )
    cost_usd: Decimal | None = Field(
        default=None, description="US dollars spent on second answers and their judge so far."
    )


class ScalingDecision(Resource):
    """One step of the control loop."""

    time: ShortText = Field(description="When, RFC 3339, UTC.")
    pool: ShortText = Field(description="WorkerPool, or threshold.")
    before: ShortText = Field(description="Value before.")
    after: ShortText = Field(description="Value after.")
    reason: Text = Field(description="Why.")


class RouterStatus(Resource):
    """What a Router is, as last observed."""

    observed_generation: int | None = Field(
        default=None, ge=0, description="metadata.generation this status was computed from."
    )
    conditions: list[Condition] = Field(
        default_factory=list,
        max_length=16,
        description="Accepted, ModelsResolved, PredictorReady, SLOMet, WithinBudget, Durable and "
        "Ready; with a cascade CascadeReady; with a floor FloorHeld; with learning Learning and "
        "QualityProven; where they hold, also FloorNotHeld and QualityDrifted.",
    )
    endpoint: LabelValue | None = Field(default=None, description="Base URL for clients.")
    ready: ShortText | None = Field(
        default=None, description="Ready and wanted router pods, such as 1/1."
    )
    tiers: list[TierStatus] = Field(
        default_factory=list, max_length=8, description="What each tier does, in spec's order."
    )
    predictor: PredictorStatus | None = Field(default=None, description="The predictor in use.")
    quality: QualityStatus | None = Field(
        default=None, description="What labels say of the quality that was delivered."
    )
    decisions: list[ScalingDecision] = Field(
        default_factory=list, max_length=10, description="The last scaling decisions."
    )
    gpus: int | None = Field(
        default=None, ge=0, description="GPUs that the pods of all tiers hold or wait for, a count."
    )
    usd_per_hour: Decimal | None = Field(
        default=None, description="US dollars per hour of all tiers."
    )
    message: Text | None = Field(default=None, description="Ready's message, for one-line views.")


class Router(Resource):
    """One OpenAI-compatible endpoint over several tiers."""

    metadata: Metadata
    spec: RouterSpec
    status: RouterStatus = Field(default_factory=RouterStatus)
