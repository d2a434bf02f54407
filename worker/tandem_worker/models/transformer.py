"""The forward pass that all families share, over a packed mixed batch.

Shapes: ``num_tokens`` counts all tokens of the step, decodes first (one token each), then prefill
chunks back to back; the KV cache of a layer is two tensors
``(num_blocks, num_kv_heads, 64, head_dim)``, or as `models.kv_cache` says of quantized ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from tandem_kernels.paged_decode import paged_decode_attention
from tandem_kernels.prefill import prefill_attention
from tandem_kernels.qk_norm_rope import qk_norm_rope_write
from tandem_kernels.rms_norm import add_rms_norm
from tandem_kernels.rope import rope_table
from tandem_kernels.swiglu import swiglu
from tandem_worker.errors import ModelError
from tandem_worker.models.checkpoint import DenseMlp, LayerWeights, ModelWeights
from tandem_worker.models.kv_cache import opened
from tandem_worker.models.mixture import Experts, mixture
from tandem_worker.models.quantized import Weight, linear
from tandem_worker.models.spec import ModelSpec


@dataclass(frozen=True)
class Decodes:
    """Sequences that compute one token each.

    Attributes:
        block_tables: ``(num_decodes, max_blocks)`` int32.
        seq_lens: ``(num_decodes,)`` int32, context including the query.
    """

    block_tables: torch.Tensor
    seq_lens: torch.Tensor


@dataclass(frozen=True)
class Prefills:
    """Sequences that compute a chunk of their prompt.

    Attributes:
        block_tables: ``(num_prefills, max_blocks)`` int32.
        query_start: ``(num_prefills + 1,)`` int32, offsets after the decodes' tokens.
        seq_lens: ``(num_prefills,)`` int32, context including the chunk.
    """

    block_tables: torch.Tensor
    query_start: torch.Tensor
    seq_lens: torch.Tensor


@dataclass(frozen=True)
class Batch:
    """One step's packed input.

    Attributes:
        token_ids: ``(num_tokens,)`` int64.
        positions: ``(num_tokens,)`` int64, position in its sequence.
        slot_mapping: ``(num_tokens,)`` int64, block * 64 + offset where K and V go.
        num_decodes: Leading tokens that belong to ``decodes``.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    num_decodes: int
    decodes: Decodes | None
    prefills: Prefills | None


class Transformer:
    """A dense decoder with paged KV blocks.

    Args:
        spec: Shapes and switches.
        weights: From :func:`tandem_worker.models.checkpoint.load_weights`.
        reduce: Sums a tensor over the ranks that hold the other parts of the model.
        max_positions: Rows of the rotary table: the longest context that will be asked for.

    Raises:
        ModelError: the rotary settings of config.json are unknown or impossible.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: ModelWeights,
        *,
        max_positions: int,
        reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        self.spec = spec
        self._reduce = reduce or _as_it_is
        self.weights = weights
        self._scale = spec.head_dim**-0.5
        try:
            self._cos_sin = rope_table(
                spec.head_dim,
                max_positions,
                spec.rope_theta,
                spec.rope_scaling,
                max_position_embeddings=spec.trained_position or spec.max_position,
                device=weights.embed.device,
            )
        except (ValueError, TypeError, ZeroDivisionError) as error:
            settings = dict(spec.rope_scaling)
            raise ModelError(f"config.json: rope scaling {settings}: {error}") from error

    def forward(
        self,
        batch: Batch,
        kv_caches: list[tuple[torch.Tensor, torch.Tensor]],
        on_layer: Callable[[int], None] | None = None,
    ) -> torch.Tensor:
        """Hidden states after the final norm, ``(num_tokens, hidden_size)``.

        Writes K and V of the batch's tokens into their slots; ``on_layer(i)`` is called as soon as
        layer i's are written, on every rank.
        """
        eps = self.spec.rms_norm_eps
        hidden = self._embedded(batch)
        residual: torch.Tensor | None = None
        for index, layer in enumerate(self.weights.layers):
            normed, residual = add_rms_norm(hidden, residual, layer.input_norm, eps)
            k_cache, v_cache = kv_caches[index]
            attended = self._attention(index, layer, normed, batch, k_cache, v_cache)
            hidden = self._reduce(self._linear(attended, layer.o, layer.o_bias))
            if on_layer is not None:  # after the sum: only then have the other ranks written theirs
                on_layer(index)
            normed, residual = add_rms_norm(hidden, residual, layer.post_norm, eps)
            hidden = self._reduce(self._mlp(normed, layer.mlp))
        normed, _ = add_rms_norm(hidden, residual, self.weights.norm, eps)
        return normed

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """``(rows, hidden_size)`` to float32 ``(rows, vocab_size)``."""
        return self._linear(hidden, self.weights.lm_head, None).float()

    def _mlp(self, x: torch.Tensor, mlp: DenseMlp | Experts) -> torch.Tensor:
        if isinstance(mlp, Experts):
            return mixture(x, mlp)
        inner = swiglu(self._linear(x, mlp.gate_up, mlp.gate_up_bias))
        return self._linear(inner, mlp.down, mlp.down_bias)

    def _linear(self, x: torch.Tensor, weight: Weight, bias: torch.Tensor | None) -> torch.Tensor:
        return linear(x, weight, bias)

    def _embedded(self, batch: Batch) -> torch.Tensor:
        return F.embedding(batch.token_ids, self.weights.embed)

    def _attention(
        self,
        index: int,
        layer: LayerWeights,
        normed: torch.Tensor,
        batch: Batch,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
    ) -> torch.Tensor:
        spec = self.spec
        num_tokens = normed.shape[0]
        qkv = self._linear(normed, layer.qkv, layer.qkv_bias)
        rows = qkv.view(num_tokens, -1, spec.head_dim)
        num_q, num_kv = spec.num_heads, spec.num_kv_heads
        (k_cache, k_scale), (v_cache, v_scale) = opened(k_cache), opened(v_cache)
        q = qk_norm_rope_write(
            rows[:, :num_q],
            rows[:, num_q : num_q + num_kv],
            rows[:, num_q + num_kv :],
            positions=batch.positions,
            cos_sin_cache=self._cos_sin,
            slot_mapping=batch.slot_mapping,
            k_cache=k_cache,
            v_cache=v_cache,
            q_weight=layer.q_norm,
            k_weight=layer.k_norm,
            eps=spec.rms_norm_eps,
            k_scale=k_scale,
            v_scale=v_scale,
        )
        window = spec.sliding_windows[index]
        parts = []
        if batch.decodes is not None:
            out = paged_decode_attention(
                q[: batch.num_decodes].unsqueeze(1),
                k_cache,
                v_cache,
                batch.decodes.block_tables,
                batch.decodes.seq_lens,
                scale=self._scale,
                sliding_window=window,
                k_scale=k_scale,
                v_scale=v_scale,
            )
            parts.append(out.reshape(batch.num_decodes, -1))
        if batch.prefills is not None:
            out = prefill_attention(
                q[batch.num_decodes :],
                k_cache,
                v_cache,
                batch.prefills.block_tables,
                batch.prefills.query_start,
                batch.prefills.seq_lens,
                scale=self._scale,
                sliding_window=window,
                k_scale=k_scale,
                v_scale=v_scale,
            )
            parts.append(out.reshape(num_tokens - batch.num_decodes, -1))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _as_it_is(whole: torch.Tensor) -> torch.Tensor:
    return whole
