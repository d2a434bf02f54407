"""The forward pass as a CPU wants it: what all layers share is worked out once per step.

Same results as :class:`~tandem_worker.models.transformer.Transformer` over the kernels' references
(in float32 to rounding), for less: the rotary rows, where K and V go, which cached rows each
sequence reads and which of them it may see are one :class:`StepPlan`; a prompt computed from its
first token on attends to its K and V without a way through the cache; bfloat16 matrices are laid
out for the CPU, and a step of many rows is computed in float32 (`models.cpu_linear`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from tandem_worker.models.checkpoint import LayerWeights, ModelWeights
from tandem_worker.models.cpu_linear import CpuMatrix, is_suited, prefers_float32
from tandem_worker.models.kv_cache import read_rows, write_rows
from tandem_worker.models.quantized import Weight
from tandem_worker.models.spec import ModelSpec
from tandem_worker.models.transformer import Batch, Transformer

_BLOCK = 64
_CACHED_ELEMENTS = 262_144
"""Keys of so many elements fit the core's cache; sequences attend together up to that."""
_PADDING = 1.25
"""Sequences attend together where the longest one pads the others by no more."""


@dataclass(frozen=True)
class Readers:
    """Sequences that decode together.

    Attributes:
        which: Their rows among the decodes.
        rows: Where their keys are in a flat cache, ``(num_sequences * num_kv_heads * length,)``.
        lens: ``(num_sequences,)``, contexts; ``length`` is the longest.
    """

    which: torch.Tensor
    rows: torch.Tensor
    lens: torch.Tensor
    length: int


@dataclass(frozen=True)
class Reading:
    """A sequence that computes a chunk of its prompt, at ``start .. end`` of the step's tokens.

    ``rows`` is None where the chunk is the whole context so far.
    """

    start: int
    end: int
    length: int
    rows: torch.Tensor | None


@dataclass(frozen=True)
class StepPlan:
    """What every layer of a step needs.

    Attributes:
        cos, sin: ``(num_tokens, 1, rotary_dim)`` float32; ``sin`` is negative in the first half.
        written: Rows of a flat cache ``(num_blocks * num_kv_heads * 64, head_dim)`` that K and V of
            the step's tokens go to, head after head.
        masks: Which keys may be seen, by window and group; filled as layers ask.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    written: torch.Tensor
    readers: list[Readers]
    readings: list[Reading]
    masks: dict[tuple[int, int | None], torch.Tensor | None] = field(default_factory=dict)

    def decode_mask(self, number: int, window: int | None) -> torch.Tensor | None:
        """``(num_sequences, 1, 1, length)`` bool, or None where all is seen."""
        key = (number, window)
        if key not in self.masks:
            readers = self.readers[number]
            at, lens = torch.arange(readers.length), readers.lens[:, None]
            mask = at < lens
            if window is not None:
                mask &= at >= lens - window
            self.masks[key] = None if bool(mask.all()) else mask[:, None, None]
        return self.masks[key]

    def prompt_mask(self, number: int, window: int | None) -> torch.Tensor:
        """``(num_rows, length)`` bool of one chunk."""
        key = (~number, window)
        mask = self.masks.get(key)
        if mask is None:
            reading = self.readings[number]
            rows = reading.end - reading.start
            row = torch.arange(reading.length - rows, reading.length)[:, None]
            at = torch.arange(reading.length)
            mask = at <= row
            if window is not None:
                mask &= at > row - window
            self.masks[key] = mask
        return mask


def make_plan(batch: Batch, cos_sin: torch.Tensor, num_kv_heads: int) -> StepPlan:
    """Work out what the layers of a step share; ``cos_sin`` is the model's rotary table."""
    rows = cos_sin.index_select(0, batch.positions).float()[:, None]
    cos, sin = rows.chunk(2, dim=-1)
    heads = torch.arange(num_kv_heads) * _BLOCK

    def flat(slots: torch.Tensor) -> torch.Tensor:
        """Rows of slots (block * 64 + offset) for the first KV head."""
        offsets = slots % _BLOCK
        return (slots - offsets) * num_kv_heads + offsets

    def of_contexts(tables: torch.Tensor, lens: torch.Tensor, length: int) -> torch.Tensor:
        at = torch.arange(length)
        first = flat(tables[:, at // _BLOCK].long() * _BLOCK + at % _BLOCK)
        # Beyond its end a sequence reads its own first row again: finite, and masked.
        first = torch.where(at < lens[:, None], first, first[:, :1])
        return (first[:, None] + heads[:, None]).flatten()

    readers: list[Readers] = []
    if batch.decodes is not None:
        lens = batch.decodes.seq_lens.long()
        for which, length in _together(lens.tolist(), num_kv_heads * cos_sin.shape[-1]):
            index = torch.tensor(which)
            tables = batch.decodes.block_tables[index]
            readers.append(
                Readers(index, of_contexts(tables, lens[index], length), lens[index], length)
            )
    readings: list[Reading] = []
    if batch.prefills is not None:
        starts = (batch.prefills.query_start + batch.num_decodes).tolist()
        for number, length in enumerate(batch.prefills.seq_lens.tolist()):
            start, end = starts[number], starts[number + 1]
            cached = None
            if end - start < length:
                tables = batch.prefills.block_tables[number : number + 1]
                cached = of_contexts(tables, torch.tensor([length]), length)
            readings.append(Reading(start, end, length, cached))
    return StepPlan(
        cos=torch.cat([cos, cos], dim=-1),
        sin=torch.cat([-sin, sin], dim=-1),
        written=(flat(batch.slot_mapping)[:, None] + heads).flatten(),
        readers=readers,
        readings=readings,
    )


def _together(lens: list[int], elements: int) -> list[tuple[list[int], int]]:
    """Groups of sequences that attend in one call, with the longest context of each.

    ``elements`` is what one position of all KV heads holds.
    """
    order = sorted(range(len(lens)), key=lens.__getitem__, reverse=True)
    groups: list[tuple[list[int], int]] = []
    total = 0
    for which in order:
        if groups:
            members, length = groups[-1]
            padded = length * (len(members) + 1)
            total += lens[which]
            if padded * elements <= _CACHED_ELEMENTS and padded <= _PADDING * total:
                members.append(which)
                continue
        groups.append(([which], lens[which]))
        total = lens[which]
    return [(sorted(members), length) for members, length in groups]


class CpuTransformer(Transformer):
    """A :class:`Transformer` whose tensors are on a CPU."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: ModelWeights,
        *,
        max_positions: int,
        reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        super().__init__(spec, weights, max_positions=max_positions, reduce=reduce)
        matrices = [matrix for layer in weights.layers for matrix in _matrices(layer)]
        self._widens = all(map(is_suited, matrices))
        self._matrices = {id(matrix): CpuMatrix(matrix) for matrix in matrices if self._widens}
        self._plan: StepPlan | None = None

    def forward(
        self,
        batch: Batch,
        kv_caches: list[tuple[torch.Tensor, torch.Tensor]],
        on_layer: Callable[[int], None] | None = None,
    ) -> torch.Tensor:
        """See :meth:`Transformer.forward`; float32 for many rows of a bfloat16 model."""
        self._plan = make_plan(batch, self._cos_sin, self.spec.num_kv_heads)
        return super().forward(batch, kv_caches, on_layer)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """``(rows, hidden_size)`` to float32 ``(rows, vocab_size)``."""
        head = self.weights.lm_head
        if id(head) not in self._matrices and is_suited(head):
            self._matrices[id(head)] = CpuMatrix(head)
        return super().logits(hidden.to(self.weights.embed.dtype))

    def _linear(self, x: torch.Tensor, weight: Weight, bias: torch.Tensor | None) -> torch.Tensor:
        matrix = self._matrices.get(id(weight))
        return super()._linear(x, weight, bias) if matrix is None else matrix.linear(x, bias)

    def _embedded(self, batch: Batch) -> torch.Tensor:
        hidden = super()._embedded(batch)
        wide = self._widens and prefers_float32(hidden.shape[0])
        return hidden.float() if wide else hidden

    def _attention(
        self,
        index: int,
        layer: LayerWeights,
        normed: torch.Tensor,
        batch: Batch,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
    ) -> torch.Tensor:
        plan, spec = self._plan, self.spec
        assert plan is not None, "forward made it"
        num_q, num_kv, size = spec.num_heads, spec.num_kv_heads, spec.head_dim
        heads = self._linear(normed, layer.qkv, layer.qkv_bias).view(len(normed), -1, size)
        qk = self._turned(layer, heads[:, : num_q + num_kv].float(), plan)
        q, k, v = qk[:, :num_q], qk[:, num_q:], heads[:, num_q + num_kv :]
        # What a quantized cache gives back, so that a prompt's chunks do not decide what is seen.
        k, v = (
            write_rows(cache, plan.written, part.reshape(-1, size)).view(len(normed), num_kv, size)
            for cache, part in ((k_cache, k), (v_cache, v))
        )

        window = spec.sliding_windows[index]
        out = torch.empty((len(normed), num_q * size), dtype=torch.float32)
        for number, readers in enumerate(plan.readers):
            together = (len(readers.which), num_kv, readers.length, size)
            seen = F.scaled_dot_product_attention(
                q[readers.which].view(together[0], num_kv, -1, size),
                read_rows(k_cache, readers.rows).view(together),
                read_rows(v_cache, readers.rows).view(together),
                attn_mask=plan.decode_mask(number, window),
                scale=self._scale,
            )
            out.index_copy_(0, readers.which, seen.reshape(together[0], -1))
        for number, reading in enumerate(plan.readings):
            part = slice(reading.start, reading.end)
            mask = None
            if reading.rows is None:
                own_k, own_v = k[part].transpose(0, 1), v[part].transpose(0, 1)
            else:
                own_k, own_v = (
                    read_rows(cache, reading.rows).view(num_kv, -1, size)
                    for cache in (k_cache, v_cache)
                )
            causal = reading.rows is None and (window is None or reading.length <= window)
            if not causal:
                mask = plan.prompt_mask(number, window)
            shape = (num_kv, num_q // num_kv, reading.length, size)
            seen = F.scaled_dot_product_attention(
                q[part].view(-1, num_kv, shape[1], size).permute(1, 2, 0, 3),
                own_k[:, None].expand(shape),
                own_v[:, None].expand(shape),
                attn_mask=mask,
                is_causal=causal,
                scale=self._scale,
            )
            out[part] = seen.permute(2, 0, 1, 3).reshape(-1, num_q * size)
        return out.to(normed.dtype)

    def _turned(self, layer: LayerWeights, qk: torch.Tensor, plan: StepPlan) -> torch.Tensor:
        """Queries and keys ``(num_tokens, heads, head_dim)``, normalised if the model does."""
        spec = self.spec
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = qk[:, : spec.num_heads], qk[:, spec.num_heads :]
            shape, eps = (spec.head_dim,), spec.rms_norm_eps
            qk = torch.cat(
                [
                    torch.rms_norm(q, shape, layer.q_norm.float(), eps),
                    torch.rms_norm(k, shape, layer.k_norm.float(), eps),
                ],
                dim=1,
            )
        size = plan.cos.shape[-1]
        part = qk[..., :size]
        turned = torch.addcmul(part * plan.cos, part.roll(size // 2, -1), plan.sin)
        if size == spec.head_dim:
            return turned
        return torch.cat([turned, qk[..., size:]], dim=-1)


def _matrices(layer: LayerWeights) -> list[Any]:
    mlp = layer.mlp
    return [layer.qkv, layer.o, mlp.gate_up, mlp.down]
