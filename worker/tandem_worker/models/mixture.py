"""A layer's mixture of experts: which experts a token goes to, and what they make of it together.

Reference in torch, for every device: tokens are sorted by expert and each expert computes its own
in one matrix product. Scores are float32, from a float32 router, because two experts that are
nearly equal must not change places with rounding; results are added in float32. Fedus et al. 2021
(Switch); Jiang et al. 2024 (Mixtral, section 2.1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

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
    order = ids.flatten().argsort(stable=True)
    tokens = order // experts.per_token
    counts = ids.flatten().bincount(minlength=experts.router.shape[0]).tolist()
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    start = 0
    for expert, count in enumerate(counts):
        if not count:
            continue
        mine = tokens[start : start + count]
        hidden = swiglu(F.linear(x[mine], experts.gate_up[expert]))
        share = weights.flatten()[order[start : start + count], None]
        out.index_add_(0, mine, F.linear(hidden, experts.down[expert]).float() * share)
        start += count
    return out.to(x.dtype)
