"""What one worker process may be told: the class that parses the file is the class that renders it.

The operator builds its ConfigMaps from :class:`WorkerConfig`, so this module imports neither torch
nor anything that does. Paths, addresses and secrets are command-line arguments, never fields here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tandem_worker.errors import ConfigError

BLOCK_SIZE = 64
"""Tokens per KV block, everywhere: a TMA box, an RDMA segment and a Quest page have this size."""

Role = Literal["unified", "prefill", "decode"]
Order = Literal["fcfs", "mlfq", "sjf", "edf"]


class TransferConfig(BaseModel):
    """How KV blocks travel between prefill and decode workers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    transport: Literal["tcp"] = Field(
        default="tcp", description="How blocks travel; tcp is the one there is."
    )
    max_inflight_bytes: int = Field(
        default=64 * 1024 * 1024,
        ge=64 * 1024,
        le=16 * 1024**3,
        description="Bytes all prefill workers together may have under way to this worker.",
    )
    checksum: bool = Field(
        default=False,
        description="Checksum each frame. TCP already checks; on for tests and link self-tests.",
    )
    reserve_timeout_s: float = Field(
        default=30.0,
        gt=0,
        le=3600,
        description="How long a decode worker keeps blocks reserved for a prefill worker, seconds.",
    )
    attempts: int = Field(
        default=2,
        ge=1,
        le=5,
        description="Remote prefills tried before the decode worker prefills by itself.",
    )


class WorkerConfig(BaseModel):
    """Settings of one worker. Unknown keys are an error; every default is the tested one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    served_model: str = Field(
        min_length=1,
        max_length=253,
        description="Name under which the model is served (the Model resource's name).",
    )
    role: Role = Field(
        default="unified",
        description="unified does both phases; decode asks a prefill worker for KV blocks.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Weights and KV blocks. auto: the checkpoint's own; on a CPU bfloat16 for "
        "16-bit checkpoints where it multiplies them natively, else float32.",
    )
    kv_cache_dtype: Literal["auto", "int8", "fp8"] = Field(
        default="auto",
        description="KV blocks. auto: as dtype. int8: codes with a scale per token and KV head. "
        "fp8: e4m3 without a scale. Both are lossy and hold two to four times the tokens.",
    )
    max_loss: float = Field(
        default=0.05,
        ge=0,
        le=1000,
        description="By which share the perplexity of the exact model's answers may rise through "
        "lossy settings (8-bit KV blocks, quantized weights, a narrower dtype). A worker measures "
        "it when it starts, on exact_answers.json beside the weights or, for KV blocks, on answers "
        "of its own, and does not serve above it.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="auto: cuda where torch finds one, else cpu."
    )
    block_size: Literal[64] = Field(default=64, description="Tokens per KV block; fixed.")
    kv_cache_bytes: int | None = Field(
        default=None,
        ge=1024 * 1024,
        description="Memory for KV blocks. Absent: 256 MiB on a CPU, 80 % of free GPU memory.",
    )
    num_kv_blocks: int | None = Field(
        default=None, ge=2, le=2**31 - 1, description="Number of KV blocks, instead of bytes."
    )
    max_num_seqs: int = Field(
        default=64, ge=1, le=4096, description="Sequences that take part in one step."
    )
    max_batched_tokens: int = Field(
        default=1024,
        ge=16,
        le=1_048_576,
        description="Token budget of one step; bounds how long a prefill can hold up decodes.",
    )
    max_waiting: int = Field(
        default=512,
        ge=1,
        le=100_000,
        description="Requests that may wait; beyond this the answer is 429 with Retry-After.",
    )
    max_model_len: int | None = Field(
        default=None,
        ge=1,
        description="Longest prompt + answer, tokens. Absent: what the model and the blocks allow.",
    )
    scheduler: Order = Field(
        default="fcfs",
        description=(
            "Order of waiting requests. fcfs: arrival. mlfq: skip-join multi-level feedback queue. "
            "sjf: fewest tokens left, counting the prompt's uncomputed ones and min(max_tokens, "
            "256) for the answer. edf: least slack, the deadline less the measured time of the "
            "same tokens."
        ),
    )
    prefix_cache: bool = Field(
        default=True, description="Keep finished blocks for requests with the same prefix."
    )
    transfer: TransferConfig = Field(default_factory=TransferConfig)
    http_port: int = Field(default=8100, ge=1, le=65535, description="Port of the HTTP server.")
    kv_port: int = Field(
        default=8200, ge=0, le=65535, description="Port on which KV blocks arrive; 0 picks one."
    )
    drain_timeout_s: float = Field(
        default=30.0,
        ge=0,
        le=3600,
        description="After SIGTERM or /drain: how long running requests may take to finish.",
    )
    local_prefill_max_tokens: int | None = Field(
        default=None,
        ge=0,
        description=(
            "A decode worker prefills up to this many uncached tokens by itself; 0 sends every "
            "prompt to a prefill worker; absent compares measured costs."
        ),
    )
    tensor_parallel: int = Field(
        default=1,
        ge=1,
        le=64,
        description="Processes of this worker that share the model, each with its part of the "
        "weights and KV blocks and its own num_threads; on CPUs only. Prefill and decode workers "
        "may have different numbers.",
    )
    num_threads: int = Field(
        default=1,
        ge=1,
        le=1024,
        description="torch's CPU threads; the operator sets the pod's CPUs. More workers beat more "
        "threads.",
    )
    revision: str = Field(
        default="", max_length=128, description="Hash that pairs prefill and decode in a rollout."
    )

    @model_validator(mode="after")
    def _check_together(self) -> WorkerConfig:
        if self.kv_cache_bytes is not None and self.num_kv_blocks is not None:
            raise ValueError(
                "kv_cache_bytes and num_kv_blocks are both set; give one of them, or neither"
            )
        if self.max_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_batched_tokens={self.max_batched_tokens} is below "
                f"max_num_seqs={self.max_num_seqs}; each decoding sequence needs one token per "
                "step, so raise max_batched_tokens or lower max_num_seqs"
            )
        if self.tensor_parallel > 1 and self.device == "cuda":
            raise ValueError(
                f"tensor_parallel={self.tensor_parallel} with device='cuda' is not served; use "
                "engine VLLM for several GPUs, or device 'cpu'"
            )
        return self

    @classmethod
    def parse(cls, data: Any, *, source: str = "worker config") -> WorkerConfig:
        """Validate plain data.

        Raises:
            ConfigError: one sentence per problem, naming the field, the value and the rule.
        """
        if not isinstance(data, dict):
            raise ConfigError(f"{source}: expected a JSON object, got {type(data).__name__}")
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise ConfigError(_explain(error, source)) from error

    @classmethod
    def load(cls, path: str | Path) -> WorkerConfig:
        """Read and validate a JSON file.

        Raises:
            ConfigError: the file is absent, not JSON, or breaks a rule.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"config file {path} cannot be read: {error}") from error
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(
                f"config file {path} is not JSON: line {error.lineno}, column {error.colno}: "
                f"{error.msg}"
            ) from error
        return cls.parse(data, source=str(path))


def _explain(error: ValidationError, source: str) -> str:
    problems = []
    for item in error.errors():
        field = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            problems.append(f"{field} is not a known field; remove it or correct its spelling")
        elif item["type"] == "missing":
            problems.append(f"{field} is required")
        elif item["type"] == "value_error":
            problems.append(str(item["ctx"]["error"]) if "ctx" in item else item["msg"])
        else:
            rule = item["msg"].removeprefix("Input ")
            problems.append(f"{field}={item['input']!r}: {rule}")
    return f"{source}: " + "; ".join(problems)
