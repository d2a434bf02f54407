"""Model: one language model, where its weights are and which worker pools serve it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from tandem_operator.resources.base import (
    GPU_RESOURCE,
    ClassName,
    Condition,
    Decimal,
    Duration,
    ExtendedResource,
    LabelValue,
    Metadata,
    ModelName,
    Name,
    ObjectRef,
    OpaqueObject,
    Quantity,
    Resource,
    Text,
)

Image = Annotated[
    str,
    StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@+-]*$", min_length=1, max_length=512),
]
Role = Literal["unified", "prefill", "decode"]
FlagName = Annotated[str, StringConstraints(max_length=64)]
FlagValue = Annotated[str, StringConstraints(max_length=4096)]


class WeightsCache(Resource):
    """A PersistentVolumeClaim that keeps downloaded weights between pods."""

    size: Quantity = Field(description="Size of the claim, a quantity in bytes such as 80Gi.")
    storage_class_name: ClassName | None = Field(
        default=None, description="StorageClass of the claim; the cluster's default when absent."
    )
    access_mode: Literal["ReadWriteMany", "ReadWriteOnce"] = Field(
        default="ReadWriteMany",
        description="How pods share the claim: ReadWriteMany on any node; ReadWriteOnce, which "
        "every storage class offers, only on one node, so for one worker or workers kept together.",
    )
    reclaim: Literal["Retain", "Delete"] = Field(
        default="Retain",
        description="What becomes of the claim with its Model: Retain keeps it, and a Model of the "
        "same name takes it up again; Delete deletes it and the weights.",
    )


class Weights(Resource):
    """Where the model's files come from."""

    source: Annotated[
        str,
        StringConstraints(
            pattern=r"^((file|pvc|hf|s3)://|image:///)[^\s]{1,1000}$", min_length=8, max_length=1024
        ),
    ] = Field(
        description="URI of a Hugging Face model directory: hf://org/name@rev, s3://bucket/prefix, "
        "pvc://claim/dir, image:///dir (inside Tandem's worker image), file:///dir (on the node, "
        "which restricted pod security refuses; in local mode also file://./dir, relative to the "
        "YAML file)."
    )
    secret_ref: ObjectRef | None = Field(
        default=None,
        description="Secret whose keys become environment variables of the download, such as "
        "HF_TOKEN or AWS_ACCESS_KEY_ID.",
    )
    cache: WeightsCache | None = Field(
        default=None,
        description="Keep downloads (hf, s3) in a claim shared by the pods; without it each pod "
        "downloads into its own empty directory.",
    )


class Engine(Resource):
    """Settings of the inference engine, the same for all roles."""

    type: Literal["Tandem", "VLLM", "OpenAI"] = Field(
        default="Tandem",
        description="Which engine serves the model. Tandem: this project's own; VLLM: vLLM in "
        "spec.image; OpenAI: any server of spec.image that speaks OpenAI's API, without exact "
        "resumption, load reports and prefill and decode roles.",
    )
    args: dict[FlagName, FlagValue] = Field(
        default_factory=dict,
        max_length=64,
        description="Flags of the engine by name without dashes, such as {quantization: fp8}; "
        '"true" gives the bare flag, "false" its --no- form. For VLLM and OpenAI; Tandem sets '
        "model, names, addresses and what other fields of this resource say. Of Tandem itself: "
        "max-loss, the share by which lossy settings may raise the perplexity of the exact "
        "model's answers before a worker refuses to serve; 0.05 when absent.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Number format of weights and KV cache; auto takes the checkpoint's own; on "
        "a CPU bfloat16 for 16-bit checkpoints where the CPU multiplies them, else float32 (for "
        "VLLM always). Name it where pods of one Model run on unlike CPUs.",
    )
    kv_cache_dtype: Literal["auto", "int8", "fp8"] = Field(
        default="auto",
        description="Number format of KV blocks; auto is that of dtype. int8 (a scale per token "
        "and KV head) and fp8 (e4m3) hold two to four times the tokens and are lossy. For Tandem.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Where to compute; auto takes CUDA when the pod has a GPU."
    )
    max_model_len: int | None = Field(
        default=None,
        ge=16,
        le=10_000_000,
        description="Longest prompt plus output, in tokens; the checkpoint's own when absent.",
    )
    max_num_seqs: int = Field(
        default=64, ge=1, le=4096, description="Most sequences in one engine step, a count."
    )
    max_batched_tokens: int = Field(
        default=2048,
        ge=64,
        le=1_048_576,
        description="Most tokens computed in one engine step; bounds the time of a step and so "
        "the time between tokens of running requests.",
    )
    kv_cache_memory: Quantity | None = Field(
        default=None,
        description="Memory for KV blocks, a quantity in bytes; measured from free memory when "
        "absent.",
    )
    prefix_cache: bool = Field(
        default=True, description="Reuse the KV blocks of prompts that begin the same way."
    )
    scheduler: Literal["fcfs", "mlfq", "sjf", "edf"] = Field(
        default="fcfs",
        description="Order of waiting requests. fcfs: as they arrive; mlfq: skip-join multi-level "
        "feedback; sjf: fewest tokens first, uncomputed ones of the prompt plus max_tokens (256 of "
        "it at most); edf: least slack to the request's deadline first.",
    )


class Resources(Resource):
    """CPU and memory that one replica asks for."""

    cpu: Quantity | None = Field(default=None, description="CPU cores requested, such as 4.")
    memory: Quantity | None = Field(
        default=None, description="Memory requested and limited to, in bytes, such as 16Gi."
    )


class Toleration(Resource):
    """Lets pods run on nodes with a matching taint."""

    key: LabelValue | None = Field(default=None, description="Key of the taint; all when absent.")
    operator: Literal["Exists", "Equal"] = Field(
        default="Exists", description="How value is compared."
    )
    value: LabelValue | None = Field(default=None, description="Value of the taint, for Equal.")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(
        default=None, description="Effect of the taint; all when absent."
    )


class RoleSpec(Resource):
    """One pool of identical workers."""

    replicas: int = Field(
        default=1,
        ge=0,
        le=1000,
        description="Workers to start with, a count; scaling changes the WorkerPool afterwards "
        "and a changed value here resets it.",
    )
    min_replicas: int | None = Field(
        default=None, ge=0, le=1000, description="Fewest workers that scaling may leave, a count."
    )
    max_replicas: int | None = Field(
        default=None, ge=1, le=1000, description="Most workers that scaling may start, a count."
    )
    gpus: int = Field(
        default=0,
        ge=0,
        le=64,
        description="GPUs of one worker, a count: 0 for the CPU, else tensorParallel.",
    )
    gpu_resource: ExtendedResource = Field(
        default=GPU_RESOURCE,
        description="Name under which nodes offer these GPUs, such as amd.com/gpu, or "
        "nvidia.com/mig-3g.40gb for a part of one; budgets count each as a GPU.",
    )
    tensor_parallel: int = Field(
        default=1,
        ge=1,
        le=64,
        description="Processes that share one copy of the weights, a count: with engine.type "
        "Tandem on a CPU (gpus 0), each with its share of resources.cpu; with VLLM one per GPU, so "
        "that gpus must be the same. Prefill and decode may differ.",
    )
    usd_per_hour: Decimal | None = Field(
        default=None,
        description='Price of one worker for one hour in US dollars, a decimal string like "1.2".',
    )
    resources: Resources = Field(
        default_factory=Resources, description="CPU and memory of one worker."
    )
    node_selector: dict[LabelValue, LabelValue] = Field(
        default_factory=dict, max_length=32, description="Labels that a node must have."
    )
    tolerations: list[Toleration] = Field(
        default_factory=list, max_length=32, description="Taints that the pods tolerate."
    )
    priority_class_name: Name | None = Field(default=None, description="PriorityClass of the pods.")
    pod_patch: OpaqueObject | None = Field(
        default=None,
        description="Anything else: merged into the pod template last (strategic for containers, "
        "by name).",
        json_schema_extra={"x-kubernetes-preserve-unknown-fields": True},
    )


class KVTransfer(Resource):
    """How KV blocks travel from prefill to decode workers."""

    checksum: bool = Field(
        default=False,
        description="Check every block after the transfer, which then takes about 1.7 times as "
        "long; TCP and the link test check already.",
    )
    max_inflight: Quantity = Field(
        default="64Mi", description="Most bytes under way to one decode worker, a quantity."
    )
    local_prefill_max_tokens: int | None = Field(
        default=None,
        ge=0,
        le=1_000_000,
        description="Prompts with at most this many uncached tokens are prefilled by the decode "
        "worker itself; measured when absent.",
    )


class Rollout(Resource):
    """How a changed Model reaches its pods."""

    max_surge: int = Field(
        default=1, ge=0, le=1000, description="Extra workers per role during a rollout, a count."
    )
    max_unavailable: int | None = Field(
        default=None,
        ge=0,
        le=1000,
        description="Workers per role that may be missing, a count. When absent, none; but where "
        "the new worker finds no room an old one goes first, unless it is the only one. 0 forbids "
        "that, 1 allows it for the only one too.",
    )
    startup_timeout: Duration = Field(
        default="10m", description="Time a worker may take to load its weights."
    )


class Drain(Resource):
    """How a worker leaves."""

    timeout: Duration = Field(
        default="60s",
        description="Time a worker gets to finish running requests before it is killed.",
    )


class ModelSpec(Resource):
    """What a Model should be."""

    weights: Weights = Field(description="Where the model's files come from.")
    served_name: ModelName | None = Field(
        default=None, description="Name in API replies and /v1/models; metadata.name when absent."
    )
    engine: Engine = Field(
        default_factory=Engine, description="Settings of the inference engine, for all roles."
    )
    unified: RoleSpec | None = Field(
        default=None,
        description="Workers that read prompts and write answers themselves; excludes prefill and "
        "decode.",
    )
    prefill: RoleSpec | None = Field(
        default=None,
        description="Workers that read prompts and push KV blocks to decode workers; needs decode.",
    )
    decode: RoleSpec | None = Field(
        default=None, description="Workers that write answers, token by token; needs prefill."
    )
    kv_transfer: KVTransfer = Field(
        default_factory=KVTransfer, description="How KV blocks travel between the roles."
    )
    rollout: Rollout = Field(
        default_factory=Rollout, description="How changes reach the pods: surge and patience."
    )
    drain: Drain = Field(
        default_factory=Drain, description="How a worker leaves: time for its running requests."
    )
    image: Image | None = Field(
        default=None,
        description="Worker image; the operator's own version when absent. Needed for engines "
        "other than Tandem's.",
    )

    def roles(self) -> dict[Role, RoleSpec]:
        """The roles that are set, in the order in which they are shown."""
        pairs: tuple[tuple[Role, RoleSpec | None], ...] = (
            ("unified", self.unified),
            ("prefill", self.prefill),
            ("decode", self.decode),
        )
        return {name: role for name, role in pairs if role is not None}


class WeightsStatus(Resource):
    """Which weights the ready workers hold."""

    digest: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$", max_length=64)] = Field(
        description="SHA-256 over names and content of the files that a worker reads."
    )
    source: Annotated[str, StringConstraints(max_length=1024)] = Field(
        default="", description="URI that they were downloaded from; empty for other volumes."
    )
    commit: Annotated[str, StringConstraints(max_length=64)] = Field(
        default="", description="The hub's commit that the source was resolved to, for hf://."
    )


class RoleStatus(Resource):
    """What is running for one role."""

    role: Annotated[str, StringConstraints(max_length=16)] = Field(
        description="unified, prefill or decode."
    )
    wanted: int = Field(default=0, ge=0, description="Workers wanted, a count.")
    ready: int = Field(default=0, ge=0, description="Workers ready, a count.")
    updated: int = Field(default=0, ge=0, description="Workers on the current revision, a count.")


class ModelStatus(Resource):
    """What a Model is, as last observed."""

    observed_generation: int | None = Field(
        default=None, ge=0, description="metadata.generation this status was computed from."
    )
    conditions: list[Condition] = Field(
        default_factory=list,
        max_length=16,
        description="Accepted, WeightsReady, Qualified, PrefillReady, DecodeReady, KVLinkReady, "
        "Progressing and Ready; Ready's reason is the first blocking cause.",
    )
    revision: LabelValue | None = Field(
        default=None, description="Hash that pairs the pods of both roles."
    )
    weights: WeightsStatus | None = Field(
        default=None, description="The weights that are served; kept while no worker runs."
    )
    roles: list[RoleStatus] = Field(
        default_factory=list, max_length=3, description="Counts of workers, one entry per role."
    )
    ready: Annotated[str, StringConstraints(max_length=16)] | None = Field(
        default=None, description="Ready and wanted workers of all roles, such as 2/3."
    )
    gpus: int | None = Field(
        default=None, ge=0, description="GPUs that its pods hold or wait for, a count."
    )
    usd_per_hour: Decimal | None = Field(
        default=None, description="Price of the running workers in US dollars per hour."
    )
    message: Text | None = Field(default=None, description="Ready's message, for one-line views.")


class Model(Resource):
    """A language model and the worker pools that serve it."""

    metadata: Metadata
    spec: ModelSpec
    status: ModelStatus = Field(default_factory=ModelStatus)

    @property
    def served_name(self) -> str:
        """The name that API replies carry."""
        return self.spec.served_name or self.metadata.name
