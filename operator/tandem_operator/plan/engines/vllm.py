"""vLLM: each field of a Model as the flag or variable that means the same there."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from tandem_operator.plan.engines.protocol import cpu_threads, flags
from tandem_operator.plan.objects import SCRATCH_DIR, Settings
from tandem_operator.resources import Model, RoleSpec
from tandem_operator.resources.base import Object, quantity, seconds

# A further name of the model tells its revision; the router's adapter reads it.
REVISION_NAME = "tandem.revision="
# Flags of vLLM 0.32 that take several values (of those that a Model may set).
_LISTS = frozenset(
    "allowed-media-domains collect-detailed-traces cpu-offload-params cudagraph-capture-sizes "
    "ignore-patterns kv-cache-dtype-skip-layers lora-modules lora-target-modules numa-bind-cpus "
    "numa-bind-nodes offload-params sleep-preserve-parameter-names".split()
)
# All of them by priority: in vLLM's own fcfs a tenant's flood would go before everybody else.
_ORDERS = {"fcfs": "Arrival", "sjf": "Length", "edf": "Deadline"}


class VLLMPod:
    ready_path = "/health"
    health_path = "/health"
    reads_config = False

    def config(self, model: Model, role: str, settings: Settings, revision: str) -> Object | None:
        return None

    def container(
        self, model: Model, role: str, spec: RoleSpec, weights: str, revision: str, at: Settings
    ) -> Object:
        engine = model.spec.engine
        own = {
            "host": "$(POD_IP)",
            "port": str(at.worker_port),
            "dtype": _dtype(engine.dtype, spec),
            "max-num-seqs": str(engine.max_num_seqs),
            "max-num-batched-tokens": str(engine.max_batched_tokens),
            "enable-prefix-caching": "true" if engine.prefix_cache else "false",
            "scheduling-policy": "priority",
            "shutdown-timeout": str(math.ceil(seconds(model.spec.drain.timeout))),
            "tensor-parallel-size": str(spec.tensor_parallel),
        }
        if engine.max_model_len is not None:
            own["max-model-len"] = str(engine.max_model_len)
        if engine.kv_cache_memory is not None:
            own["kv-cache-memory-bytes"] = str(int(quantity(engine.kv_cache_memory)))
        if role != "unified":
            transfer: Object = {"kv_connector": "NixlConnector", "kv_role": "kv_both"}
            if not spec.gpus:
                transfer["kv_buffer_device"] = "cpu"
            own["kv-transfer-config"] = json.dumps(transfer, separators=(",", ":"))
        names = ["--served-model-name", model.served_name, f"{REVISION_NAME}{revision}"]
        return {
            "command": ["vllm", "serve"],
            "args": [weights, *names, *flags(own), *flags(engine.args, _LISTS)],
            "env": _environment(role, spec, at),
        }

    def router_fields(self, model: Model) -> Mapping[str, Any]:
        return {"engine": "VLLM", "engine_order": _ORDERS[model.spec.engine.scheduler]}


def _dtype(dtype: str, spec: RoleSpec) -> str:
    """On a CPU auto is float32, in which answers are the same whoever goes on with them."""
    return "float32" if dtype == "auto" and not spec.gpus else dtype


def _environment(role: str, spec: RoleSpec, at: Settings) -> list[Object]:
    values = {
        "HOME": SCRATCH_DIR,
        "VLLM_CACHE_ROOT": f"{SCRATCH_DIR}/vllm",
        "TRITON_CACHE_DIR": f"{SCRATCH_DIR}/triton",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
    if not spec.gpus:
        # Cores are the pod's by its limits, not by their numbers.
        values["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        cpu = quantity(spec.resources.cpu) if spec.resources.cpu else None
        if (threads := cpu_threads(spec, cpu)) is not None:
            values["OMP_NUM_THREADS"] = str(threads)
    if role != "unified":
        values["VLLM_NIXL_SIDE_CHANNEL_HOST"] = "$(POD_IP)"
        values["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(at.kv_port)
    return [{"name": name, "value": value} for name, value in values.items()]
