"""What each engine type takes of a Model's fields: refused by name, before a pod is made."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Obj = Mapping[str, Any]

# vLLM's flags that a Model sets, and by what; a second source for one flag would hide a mistake.
VLLM_SET_BY: dict[str, str] = {
    "model": "spec.weights",
    "served-model-name": "spec.servedName",
    "host": "the operator",
    "port": "the operator",
    "uds": "the operator",
    "api-key": "the operator",
    "ssl-keyfile": "the operator",
    "ssl-certfile": "the operator",
    "root-path": "the operator",
    "config": "the operator",
    "shutdown-timeout": "spec.drain.timeout",
    "dtype": "spec.engine.dtype",
    "max-model-len": "spec.engine.maxModelLen",
    "max-num-seqs": "spec.engine.maxNumSeqs",
    "max-num-batched-tokens": "spec.engine.maxBatchedTokens",
    "kv-cache-memory-bytes": "spec.engine.kvCacheMemory",
    "enable-prefix-caching": "spec.engine.prefixCache",
    "no-enable-prefix-caching": "spec.engine.prefixCache",
    "scheduling-policy": "spec.engine.scheduler",
    "tensor-parallel-size": "tensorParallel of the role",
    "kv-transfer-config": "prefill and decode",
    "data-parallel-size": "replicas of the role",
    "data-parallel-size-local": "replicas of the role",
    "data-parallel-rank": "replicas of the role",
    "data-parallel-start-rank": "replicas of the role",
    "data-parallel-address": "replicas of the role",
    "data-parallel-rpc-port": "replicas of the role",
    "data-parallel-backend": "replicas of the role",
    "data-parallel-hybrid-lb": "replicas of the role",
    "data-parallel-external-lb": "replicas of the role",
    "api-server-count": "the operator",
    "headless": "the operator",
    "nnodes": "the operator",
    "node-rank": "the operator",
    "master-addr": "the operator",
    "master-port": "the operator",
}
# Flags whose value would be code or a module to load from outside the image.
VLLM_LOADS_CODE = (
    "middleware",
    "logits-processors",
    "worker-extension-cls",
    "tool-parser-plugin",
    "reasoning-parser-plugin",
    "scheduler-cls",
    "worker-cls",
)


@dataclass(frozen=True)
class EngineRule:
    """A rule on spec, as CEL and as Python; see `rules.Rule`."""

    cel: str
    message: str
    check: Callable[[Obj], bool]
    field: str


def _type(spec: Obj) -> str:
    return str(spec.get("engine", {}).get("type", "Tandem"))


_TYPE = "(has(self.engine) && has(self.engine.type) ? self.engine.type : 'Tandem')"
_ARGS = "has(self.engine) && has(self.engine.args)"
_LOSS = "^[0-9]{1,3}([.][0-9]{1,6})?$"


def _args(spec: Obj) -> list[str]:
    return list(spec.get("engine", {}).get("args", {}))


def _list(names: list[str] | tuple[str, ...]) -> str:
    return "[" + ",".join(f"'{name}'" for name in names) + "]"


def _needs(kinds: tuple[str, ...], cel: str, text: str, good: Any, field: str) -> EngineRule:
    """A rule that holds for other engines whatever they say."""
    return EngineRule(
        f"!({_TYPE} in {_list(kinds)}) || ({cel})",
        text,
        lambda o: _type(o) not in kinds or good(o),
        field,
    )


def _refuses_args(names: list[str], why: str) -> EngineRule:
    # As vLLM itself reads them: with underscores, abbreviated, or a part of one behind a dot.
    return EngineRule(
        f"{_TYPE} != 'VLLM' || !({_ARGS}) || self.engine.args.all(k, "
        f"!{_list(sorted(names))}.exists(n, n.startsWith(k.replace('_', '-').split('.')[0])))",
        why,
        lambda o: (
            _type(o) != "VLLM"
            or not any(
                name.startswith(key.replace("_", "-").split(".")[0])
                for key in _args(o)
                for name in names
            )
        ),
        "engine.args",
    )


_NAME_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789_.-")
_OTHERS = ("VLLM", "OpenAI")


def _ranks(role: str) -> list[EngineRule]:
    """Which engine cuts a model over what: ours over a CPU's processes, vLLM over GPUs."""
    at = f"self.{role}"
    one = f"!has({at}) || !has({at}.tensorParallel) || {at}.tensorParallel <= 1"
    gpus = f"(has({at}.gpus) ? {at}.gpus : 0)"

    def is_one(spec: Obj) -> bool:
        return bool(spec.get(role, {}).get("tensorParallel", 1) <= 1)

    def has_gpus(spec: Obj) -> bool:
        return bool(spec[role].get("gpus", 0) > 0)

    field = f"{role}.tensorParallel"
    return [
        EngineRule(
            f"{_TYPE} != 'Tandem' || {one} || {gpus} == 0",
            "engine.type Tandem cuts a model over processes on a CPU only, and would leave the "
            "other GPUs idle; set gpus to 0, or tensorParallel to 1 and raise replicas, or set "
            "engine.type: VLLM",
            lambda o: _type(o) != "Tandem" or is_one(o) or not has_gpus(o),
            field,
        ),
        EngineRule(
            f"{_TYPE} != 'VLLM' || {one} || {gpus} > 0",
            "tensorParallel above 1 of engine.type VLLM needs gpus; set gpus to tensorParallel",
            lambda o: _type(o) != "VLLM" or is_one(o) or has_gpus(o),
            field,
        ),
        EngineRule(
            f"{_TYPE} != 'OpenAI' || {one}",
            "engine.type OpenAI is told nothing of several GPUs; set tensorParallel to 1 and name "
            "the server's own flag in engine.args",
            lambda o: _type(o) != "OpenAI" or is_one(o),
            field,
        ),
    ]


def _device(role: str) -> EngineRule:
    cel = (
        f"!has(self.engine) || !has(self.engine.device) || !has(self.{role}) || "
        f"!has(self.{role}.gpus) || (self.engine.device == 'cpu' ? self.{role}.gpus == 0 : "
        f"self.engine.device != 'cuda' || self.{role}.gpus > 0)"
    )

    def check(spec: Obj) -> bool:
        device, gpus = spec["engine"].get("device", "auto"), spec.get(role, {}).get("gpus")
        if gpus is None or device == "auto":
            return True
        return bool(gpus == 0) if device == "cpu" else bool(gpus > 0)

    return EngineRule(
        cel,
        "engine.device must fit gpus: cuda computes on GPUs that the role asks for, cpu would hold "
        "them idle; set gpus, or leave device at auto",
        check,
        "engine.device",
    )


# Defaults are stored, so that what nobody wrote is there, too.
NO_TRANSFER = (
    "!has(self.kvTransfer) || (!(has(self.kvTransfer.checksum) && self.kvTransfer.checksum) "
    "&& (!has(self.kvTransfer.maxInflight) || self.kvTransfer.maxInflight == '64Mi') "
    "&& !has(self.kvTransfer.localPrefillMaxTokens))"
)


def says_no_transfer(o: Obj) -> bool:
    """NO_TRANSFER in local mode: nothing but defaults."""
    transfer = o.get("kvTransfer", {})
    return (
        not transfer.get("checksum")
        and transfer.get("maxInflight", "64Mi") == "64Mi"
        and "localPrefillMaxTokens" not in transfer
    )


ENGINE_RULES: list[EngineRule] = [
    _needs(
        _OTHERS,
        "has(self.image)",
        "an engine other than Tandem needs spec.image, such as vllm/vllm-openai:v0.32.0; name one",
        lambda o: "image" in o,
        "image",
    ),
    EngineRule(
        f"{_TYPE} != 'Tandem' || !({_ARGS}) || self.engine.args.all(k, k == 'max-loss')",
        "engine.args are flags of engine.type VLLM or OpenAI; Tandem's settings are fields of "
        "engine, but for max-loss: set type, or remove the others",
        lambda o: _type(o) != "Tandem" or set(_args(o)) <= {"max-loss"},
        "engine.args",
    ),
    EngineRule(
        f"{_TYPE} != 'Tandem' || !({_ARGS}) || !('max-loss' in self.engine.args) || "
        f"self.engine.args['max-loss'].matches('{_LOSS}')",
        "engine.args.max-loss must be a share like 0.05: the most that lossy settings may raise "
        "the perplexity of exact answers by, below 1000",
        lambda o: (
            _type(o) != "Tandem"
            or "max-loss" not in _args(o)
            or re.search(_LOSS, str(o["engine"]["args"]["max-loss"])) is not None
        ),
        "engine.args",
    ),
    EngineRule(
        f"!({_ARGS}) || self.engine.args.all(k, k.matches('^[a-z0-9][a-z0-9_.-]*$'))",
        "engine.args are named without dashes in front and in lower case; write max-loras, not "
        "--max-loras",
        lambda o: all(
            k[:1].isalnum() and k.isascii() and k == k.lower() and set(k[1:]) <= _NAME_LETTERS
            for k in _args(o)
        ),
        "engine.args",
    ),
    _refuses_args(
        list(VLLM_SET_BY),
        "engine.args holds a flag that Tandem sets from another field or by itself ("
        + ", ".join(sorted(VLLM_SET_BY))
        + "); remove it and set the field: weights, servedName, drain, engine or the role",
    ),
    _refuses_args(
        list(VLLM_LOADS_CODE),
        "engine.args holds a flag that makes vLLM load code by name ("
        + ", ".join(VLLM_LOADS_CODE)
        + "); build it into spec.image instead",
    ),
    _needs(
        ("VLLM",),
        "!has(self.engine.scheduler) || self.engine.scheduler != 'mlfq'",
        "engine.scheduler mlfq is Tandem's only; vLLM takes fcfs, or sjf and edf by priority",
        lambda o: o["engine"].get("scheduler") != "mlfq",
        "engine.scheduler",
    ),
    _needs(
        _OTHERS,
        "!has(self.engine.device) || self.engine.device == 'auto'",
        "engine.device is decided by spec.image for this engine type; leave it at auto",
        lambda o: o["engine"].get("device", "auto") == "auto",
        "engine.device",
    ),
    _needs(
        _OTHERS,
        NO_TRANSFER,
        "kvTransfer's fields steer Tandem's own KV link; this engine brings its own: remove them",
        says_no_transfer,
        "kvTransfer",
    ),
    _needs(
        ("OpenAI",),
        "has(self.unified)",
        "engine.type OpenAI has no prefill and decode roles; use unified",
        lambda o: "unified" in o,
        "unified",
    ),
    _needs(
        ("OpenAI",),
        "!has(self.engine) || ("
        "(!has(self.engine.dtype) || self.engine.dtype == 'auto') && "
        "!has(self.engine.maxModelLen) && !has(self.engine.kvCacheMemory) && "
        "(!has(self.engine.maxNumSeqs) || self.engine.maxNumSeqs == 64) && "
        "(!has(self.engine.maxBatchedTokens) || self.engine.maxBatchedTokens == 2048) && "
        "(!has(self.engine.prefixCache) || self.engine.prefixCache) && "
        "(!has(self.engine.scheduler) || self.engine.scheduler == 'fcfs'))",
        "engine.type OpenAI takes its settings as engine.args only; remove dtype, maxModelLen, "
        "kvCacheMemory, maxNumSeqs, maxBatchedTokens, prefixCache and scheduler",
        lambda o: (
            o["engine"].get("dtype", "auto") == "auto"
            and "maxModelLen" not in o["engine"]
            and "kvCacheMemory" not in o["engine"]
            and o["engine"].get("maxNumSeqs", 64) == 64
            and o["engine"].get("maxBatchedTokens", 2048) == 2048
            and o["engine"].get("prefixCache", True)
            and o["engine"].get("scheduler", "fcfs") == "fcfs"
        ),
        "engine",
    ),
    _needs(
        ("OpenAI",),
        f"!({_ARGS}) || !('port' in self.engine.args) || "
        "self.engine.args['port'] == '$(TANDEM_PORT)'",
        "engine.args.port of engine.type OpenAI must be $(TANDEM_PORT): probes and routers ask "
        "there, and a server at another port would stay Starting; set port: $(TANDEM_PORT)",
        lambda o: o["engine"].get("args", {}).get("port", "$(TANDEM_PORT)") == "$(TANDEM_PORT)",
        "engine.args",
    ),
    _needs(
        _OTHERS,
        "!has(self.engine.kvCacheDtype) || self.engine.kvCacheDtype == 'auto'",
        "engine.kvCacheDtype is for engine.type Tandem; name another engine's own flag in "
        "engine.args, such as {kv-cache-dtype: fp8} for VLLM",
        lambda o: o["engine"].get("kvCacheDtype", "auto") == "auto",
        "engine.kvCacheDtype",
    ),
    *(rule for role in ("unified", "prefill", "decode") for rule in _ranks(role)),
    *(_device(role) for role in ("unified", "prefill", "decode")),
]
