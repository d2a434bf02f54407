"""Which quantized checkpoints are read, from what ``config.json`` says of them. No torch here.

The published layouts say almost everything in their tensors' names, types and shapes (bits, group
sizes, zero points, which layers stay dense), so that is where it is read
(:mod:`tandem_worker.models.quantized`); the configuration decides what tensors cannot tell and
refuses what has no path here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tandem_worker.errors import ModelError

Method = Literal["compressed-tensors", "fp8", "awq", "gptq"]
SUPPORTED = "compressed-tensors (W8A8, W8A16, W4A16, FP8), fp8, awq (gemm) and gptq (4 and 8 bits)"


@dataclass(frozen=True)
class Quantization:
    """Attributes:
    method: Whose layout the tensors have.
    gptq_zero_offset: What GPTQ's packed zero points lack: 1 in its first format, 0 in the second.
    quantizes_activations: The format also rounds activations, which is not done here: they stay
        in the model's dtype, which is at least as exact.
    """

    method: Method
    gptq_zero_offset: int = 1
    quantizes_activations: bool = False


def read_quantization(given: Any, source: str) -> Quantization:
    """What a ``quantization_config`` (or GPTQ's ``quantize_config.json``) asks for.

    Raises:
        ModelError: a format without a path here.
    """
    if not isinstance(given, dict):
        raise ModelError(f"{source}: quantization_config must be an object")
    method = given.get("quant_method") or ("compressed-tensors" if "config_groups" in given else "")
    readers = {
        "compressed-tensors": _compressed_tensors,
        "fp8": _fp8,
        "awq": _awq,
        "gptq": _gptq,
    }
    reader = readers.get(method) if isinstance(method, str) else None
    if reader is None:
        raise _refused(source, f"quant_method={method!r}"[:120])
    return reader(given, source)


def _refused(source: str, what: str) -> ModelError:
    return ModelError(
        f"{source}: the weights are quantized with {what}, which this worker does not read; it "
        f"reads {SUPPORTED}; use one of these or the model's original weights"
    )


def _compressed_tensors(given: Mapping[str, Any], source: str) -> Quantization:
    groups = given.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise ModelError(f"{source}: quantization_config.config_groups must name a group")
    sparsity = given.get("sparsity_config")
    layout = sparsity.get("format") if isinstance(sparsity, dict) else None
    if layout not in (None, "dense"):
        raise _refused(source, f"compressed-tensors and sparsity {layout!r}"[:120])
    activations = False
    for group in groups.values():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            raise _refused(source, "compressed-tensors without weights")
        bits, kind = weights.get("num_bits"), weights.get("type", "int")
        if (bits, kind) not in ((4, "int"), (8, "int"), (8, "float")):
            raise _refused(source, f"compressed-tensors of {bits!r} bits, type {kind!r}"[:120])
        activations = activations or bool(group.get("input_activations"))
    if given.get("transform_config"):
        raise _refused(source, "compressed-tensors and transform_config (rotated activations)")
    return Quantization("compressed-tensors", quantizes_activations=activations)


def _fp8(given: Mapping[str, Any], source: str) -> Quantization:
    if given.get("fmt", "e4m3") != "e4m3":
        raise _refused(source, f"fp8 of fmt {given['fmt']!r}"[:120])
    if given.get("scale_fmt", "float") not in ("float", None):
        raise _refused(source, f"fp8 of scale_fmt {given['scale_fmt']!r}"[:120])
    return Quantization("fp8", quantizes_activations=True)


def _awq(given: Mapping[str, Any], source: str) -> Quantization:
    bits = given.get("bits", given.get("w_bit", 4))
    version = str(given.get("version", "gemm")).lower()
    if bits != 4 or version != "gemm":
        raise _refused(source, f"awq of {bits!r} bits, version {version!r}"[:120])
    return Quantization("awq")


def _gptq(given: Mapping[str, Any], source: str) -> Quantization:
    bits, layout = given.get("bits"), given.get("checkpoint_format") or "gptq"
    if bits not in (4, 8) or layout not in ("gptq", "gptq_v2"):
        raise _refused(source, f"gptq of {bits!r} bits, checkpoint_format {layout!r}"[:120])
    if given.get("dynamic"):
        raise _refused(source, "gptq with dynamic (another format by layer)")
    return Quantization("gptq", gptq_zero_offset=1 if layout == "gptq" else 0)
