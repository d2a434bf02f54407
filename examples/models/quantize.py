"""Writes an int8 or int4 version of a model directory, in compressed-tensors' layout.

    python examples/models/quantize.py examples/models/large large-w4 --bits 4

Weights are rounded to the nearest code (no calibration): int8 by output channel (W8A16), int4 in
groups of 32 inputs (W4A16). Embeddings, norms and biases stay as they are. Any engine that reads
compressed-tensors' pack-quantized format loads the result.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

GROUP = 32


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Unsigned codes along the last axis into int32 words, low bits first."""
    per_word = 32 // bits
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % per_word))
    shifts = torch.arange(0, 32, bits, dtype=torch.int64)
    words = (padded.long().view(codes.shape[0], -1, per_word) << shifts).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def quantized(weight: torch.Tensor, bits: int) -> dict[str, torch.Tensor]:
    """The tensors that take a weight's place."""
    n, k = weight.shape
    half = 1 << (bits - 1)
    parts = weight.float().view(n, -1, GROUP if bits == 4 else k)
    scale = (parts.abs().amax(-1) / (half - 1)).clamp(min=1e-9).to(torch.bfloat16)
    codes = (parts / scale.float()[..., None]).round().clamp(-half, half - 1).view(n, k)
    return {
        "weight_packed": pack((codes + half).int(), bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor([n, k]),
    }


def write(source: Path, target: Path, bits: int) -> None:
    """Copy a model directory with its linear layers quantized."""
    shutil.copytree(source, target)
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            base = name.removesuffix(".weight")
            stored |= {f"{base}.{part}": v for part, v in quantized(tensor, bits).items()}
        else:
            stored[name] = tensor
    save_file(stored, target / "model.safetensors", metadata={"format": "pt"})
    strategy = {"strategy": "group", "group_size": GROUP} if bits == 4 else {"strategy": "channel"}
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False} | strategy
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="a model directory")
    parser.add_argument("target", type=Path, help="a directory that does not exist yet")
    parser.add_argument("--bits", type=int, choices=(4, 8), default=8)
    given = parser.parse_args()
    if given.target.exists():
        parser.error(f"{given.target} exists; name a new directory")
    write(given.source, given.target, given.bits)


if __name__ == "__main__":
    main()
