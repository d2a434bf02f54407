"""The configuration of a Model's workers, as the class that they parse it with."""

from __future__ import annotations

import math

from tandem_operator.plan.objects import Settings
from tandem_operator.resources import Model
from tandem_operator.resources.base import Object, quantity, seconds
from tandem_worker.config import WorkerConfig


def worker_config(model: Model, role: str, settings: Settings, revision: str = "") -> WorkerConfig:
    """The configuration of one role's workers.

    Raises pydantic.ValidationError when the engine settings contradict each other.
    """
    engine, transfer = model.spec.engine, model.spec.kv_transfer
    data: Object = {
        "served_model": model.served_name,
        "role": role,
        "dtype": engine.dtype,
        "device": engine.device,
        "max_num_seqs": engine.max_num_seqs,
        "max_batched_tokens": engine.max_batched_tokens,
        "scheduler": engine.scheduler,
        "prefix_cache": engine.prefix_cache,
        "http_port": settings.worker_port,
        "drain_timeout_s": seconds(model.spec.drain.timeout),
    }
    spec = next(spec for name, spec in model.spec.roles().items() if name == role)
    ranks = spec.tensor_parallel
    if spec.resources.cpu and not spec.gpus:
        data["num_threads"] = max(1, math.floor(quantity(spec.resources.cpu) / ranks))
    if ranks > 1:
        data["tensor_parallel"] = ranks
    if engine.kv_cache_dtype != "auto":  # written only if set: no new pods by an upgrade
        data["kv_cache_dtype"] = engine.kv_cache_dtype
    if "max-loss" in engine.args:
        data["max_loss"] = float(engine.args["max-loss"])
    if engine.max_model_len is not None:
        data["max_model_len"] = engine.max_model_len
    if engine.kv_cache_memory is not None:
        data["kv_cache_bytes"] = int(quantity(engine.kv_cache_memory))
    if role != "unified":
        data["kv_port"] = settings.kv_port
        data["transfer"] = {
            "checksum": transfer.checksum,
            "max_inflight_bytes": int(quantity(transfer.max_inflight)),
        }
        if transfer.local_prefill_max_tokens is not None:
            data["local_prefill_max_tokens"] = transfer.local_prefill_max_tokens
    if revision:
        data["revision"] = revision
    return WorkerConfig.model_validate(data)
