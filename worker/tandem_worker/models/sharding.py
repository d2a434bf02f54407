"""One rank's part of a model: which heads, which columns, and how weights are cut to them.

Megatron's cut (Shoeybi et al. 2019, section 3): query, key, value, gate and up by outputs, output
and down by inputs, so that a layer needs two sums over the ranks. Where there are fewer KV heads
than ranks, neighbouring ranks hold the same one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from tandem_kernels.quantize import QuantizedWeight, dequantize
from tandem_worker.errors import ConfigError
from tandem_worker.models.quantized import Weight
from tandem_worker.models.spec import ModelSpec


@dataclass(frozen=True)
class Shard:
    """Rank ``rank`` of ``size``."""

    rank: int = 0
    size: int = 1

    def spec(self, spec: ModelSpec) -> ModelSpec:
        """The spec of this rank's part: fewer heads, a narrower MLP, the same width between.

        Raises:
            ConfigError: the model cannot be cut into so many parts.
        """
        for name, count in (
            ("num_attention_heads", spec.num_heads),
            ("intermediate_size", spec.intermediate_size),
            ("moe_intermediate_size", spec.expert_size),
        ):
            if count % self.size:
                raise ConfigError(
                    f"tensor_parallel={self.size} does not divide {name}={count} of this model; "
                    "use a number that does, or 1"
                )
        num_kv_heads = spec.num_kv_heads
        if num_kv_heads % self.size and self.size % num_kv_heads:
            raise ConfigError(
                f"tensor_parallel={self.size} neither divides num_key_value_heads={num_kv_heads} "
                "of this model nor is a multiple of it; use a number that does, or 1"
            )
        return replace(
            spec,
            num_heads=spec.num_heads // self.size,
            num_kv_heads=max(1, num_kv_heads // self.size),
            intermediate_size=spec.intermediate_size // self.size,
            expert_size=spec.expert_size // self.size,
        )

    def part(self, count: int) -> slice:
        """This rank's of ``count`` things."""
        width = count // self.size
        return slice(self.rank * width, (self.rank + 1) * width)

    def kv_heads(self, count: int) -> slice:
        """This rank's KV heads; shared with neighbours where there are fewer than ranks."""
        if count % self.size == 0:
            return self.part(count)
        head = self.rank * count // self.size
        return slice(head, head + 1)


WHOLE = Shard()


def rows(weight: Weight, part: slice) -> Weight:
    """Outputs ``part`` of a layer."""
    if isinstance(weight, torch.Tensor):
        return weight[part].contiguous()
    return replace(
        weight,
        data=weight.data[part].contiguous(),
        scales=weight.scales[part].contiguous(),
        zeros=None if weight.zeros is None else weight.zeros[part].contiguous(),
    )


def columns(weight: Weight, part: slice, dtype: torch.dtype) -> Weight:
    """Inputs ``part`` of a layer; dequantized where the cut goes through a group."""
    if isinstance(weight, torch.Tensor):
        return weight[:, part].contiguous()
    size = weight.group_size
    if size is None:
        return replace(weight, data=weight.data[:, part].contiguous())
    if part.start % size or part.stop % size:
        return dequantize(weight)[:, part].to(dtype).contiguous()
    groups = slice(part.start // size, part.stop // size)
    codes = slice(part.start // 2, part.stop // 2) if weight.data.dtype == torch.uint8 else part
    return QuantizedWeight(
        weight.data[:, codes].contiguous(),
        weight.scales[:, groups].contiguous(),
        None if weight.zeros is None else weight.zeros[:, groups].contiguous(),
        size,
    )
