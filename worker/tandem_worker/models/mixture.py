"""A layer's mixture of experts: which experts a token goes to, and what they make of it together.

Tokens are sorted by expert; one grouped product for gate and up and one for down compute all
experts (on a GPU in one launch each, whose host looks at no value). Scores are float32, from a
float32 router, because two experts that are nearly equal must not change places with rounding;
results are added in float32. Fedus et al. 2021 (Switch); Jiang et al. 2024 (Mixtral, section 2.1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from tandem_kernels.grouped_gemm import grouped_gemm
from tandem_kernels.swiglu import swiglu


@dataclass
class Experts:
    """The experts of one layer.

    Attributes:
        router: ``(num_experts, hidden_size)`` float32.
        gate_up: ``(num_experts, 2 * width, hidden_size)``, rows of gate, then of up.
        down: ``(num_experts, hidden_size, width)``.
        per_token: Experts that each token goes to.
        normalise: Whether the weights of a token's experts sum to one.
    """

    router: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    per_token: int
    normalise: bool


def choose_experts(x: torch.Tensor, experts: Experts) -> tuple[torch.Tensor, torch.Tensor]:
    """Per token the weights, float32, and the ids of its experts, ``(num_tokens, per_token)``."""
    scores = F.linear(x.float(), experts.router).softmax(-1)
    weights, ids = scores.topk(experts.per_token, dim=-1)
    if experts.normalise:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, ids


def mixture(x: torch.Tensor, experts: Experts) -> torch.Tensor:
    """The experts' weighted sum for ``x`` of shape ``(num_tokens, hidden_size)``."""
    weights, ids = choose_experts(x, experts)
    chosen, order = ids.flatten().sort(stable=True)
    numbers = torch.arange(len(experts.router) + 1, device=x.device)
    starts = torch.searchsorted(chosen, numbers).int()
    tokens = torch.div(order, experts.per_token, rounding_mode="floor")
    inner = swiglu(grouped_gemm(x, experts.gate_up, starts, rows=tokens))
    parts = torch.empty((len(order), x.shape[1]), dtype=torch.float32, device=x.device)
    parts[order] = grouped_gemm(inner, experts.down, starts).float()
    return (parts.view(*ids.shape, -1) * weights[..., None]).sum(1).to(x.dtype)
