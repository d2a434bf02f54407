"""Compile every kernel variant an engine will launch, before it takes requests.

Triton compiles on first use; a compilation inside a request would cost it seconds. warm_up runs
each operation once per variant on tiny tensors of the engine's shapes and dtypes. The sampler's
steps make a variant per combination: to stay within those compiled here, give top_k, top_p and
min_p together or not at all, and likewise the penalties.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch

from . import kv_blocks, quest
from .checks import BLOCK_SIZE
from .grouped_gemm import ROWS_PER_TILE, grouped_gemm
from .int8_kv import SCALE_BYTES, codes_and_scales
from .paged_decode import paged_decode_attention
from .prefill import prefill_attention
from .qk_norm_rope import qk_norm_rope_write
from .rms_norm import add_rms_norm
from .sampler import sample
from .skinny_gemm import skinny_gemm
from .swiglu import swiglu


@dataclass(frozen=True, slots=True)
class QuantizedLinear:
    """A layer's format: the codes' dtype (uint8: packed int4); group_size None: a scale per row."""

    out_features: int
    in_features: int
    dtype: torch.dtype
    group_size: int | None
    has_bias: bool


@dataclass(frozen=True, slots=True)
class ExpertLayers:
    """A mixture's sizes; width is that of one expert's MLP."""

    num_experts: int
    width: int


@dataclass(frozen=True, slots=True)
class EngineShapes:
    """What decides which variants an engine compiles; one rank's share under tensor parallelism.

    kv_dtype None means dtype; an fp8 cache is taken without scales. sliding_windows lists those of
    the layers, None for full attention. query_rows lists the rows per sequence of the decode
    kernel: 1, and 1 + draft length for
    verification. logits_dtype is that of the logits given to sample. skinny_linears lists
    (out_features, in_features) of bf16 or fp16 layers served by skinny_gemm, quantized_linears the
    quantized layers. experts are those of layers that are mixtures. page_scoring includes Quest's
    two kernels.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    dtype: torch.dtype = torch.bfloat16
    kv_dtype: torch.dtype | None = None
    rotary_dim: int | None = None
    qk_norm: bool = False
    sliding_windows: tuple[int | None, ...] = (None,)
    soft_cap: float | None = None
    query_rows: tuple[int, ...] = (1,)
    logits_dtype: torch.dtype = torch.float32
    skinny_linears: tuple[tuple[int, int], ...] = ()
    quantized_linears: tuple[QuantizedLinear, ...] = ()
    experts: ExpertLayers | None = None
    page_scoring: bool = False
    device: str = "cuda"


def warm_up(config: EngineShapes) -> dict[str, float]:
    """Run every variant once; return seconds per variant, in order. A CPU device runs references.

    Call it on the stream and device that will serve, before CUDA graphs are captured. Batch sizes
    and table widths do not make variants (the kernels do not specialise on them); tensors that
    do not start on 16 bytes do, so an engine should slice its buffers at such boundaries.
    """
    seconds: dict[str, float] = {}
    for name, launch in _variants(config):
        start = time.perf_counter()
        launch()
        if config.device.startswith("cuda"):
            torch.cuda.synchronize(config.device)
        seconds[name] = time.perf_counter() - start
    return seconds


def _variants(config: EngineShapes) -> Iterator[tuple[str, Callable[[], object]]]:
    yield from _elementwise_variants(config)
    yield from _attention_variants(config)
    yield from _sampler_variants(config)
    for n, k in config.skinny_linears:
        weight = _zeros(config, n, k)
        for rows in (16, 32, 64):
            x = _zeros(config, rows, k)
            yield f"skinny_gemm {n}x{k} rows={rows}", partial(skinny_gemm, x, weight)
    if config.experts is not None:
        yield from _expert_variants(config, config.experts)
    for layer in config.quantized_linears:
        yield from _quantized_variants(config, layer)
    cache = _zeros(config, *_cache_shape(config), dtype=config.kv_dtype or config.dtype)
    ids = torch.zeros(1, dtype=torch.int64, device=config.device)
    yield "kv_block_gather", partial(kv_blocks.kv_block_gather, cache, ids)
    yield "kv_block_scatter", partial(kv_blocks.kv_block_scatter, cache[:1].clone(), cache, ids)
    yield "kv_block_copy", partial(kv_blocks.kv_block_copy, cache, ids, ids + 1)


def _expert_variants(
    config: EngineShapes, experts: ExpertLayers
) -> Iterator[tuple[str, Callable[[], object]]]:
    """One weight stands for all: what a group's rows are is not looked at."""
    num, width = experts.num_experts, experts.width
    starts = _zeros(config, num + 1, dtype=torch.int32)
    gate_up = _zeros(config, 1, 2 * width, config.hidden_size).expand(num, -1, -1)
    down = _zeros(config, 1, config.hidden_size, width).expand(num, -1, -1)
    for tile in ROWS_PER_TILE:
        rows = torch.zeros(tile * num // 2, dtype=torch.int64, device=config.device)
        x, inner = _zeros(config, 1, config.hidden_size), _zeros(config, len(rows), width)
        yield f"grouped_gemm up tile={tile}", partial(grouped_gemm, x, gate_up, starts, rows=rows)
        yield f"grouped_gemm down tile={tile}", partial(grouped_gemm, inner, down, starts)
    yield "swiglu experts", partial(swiglu, _zeros(config, 2, 2 * width))


def _quantized_variants(
    config: EngineShapes, layer: QuantizedLinear
) -> Iterator[tuple[str, Callable[[], object]]]:
    n, k = layer.out_features, layer.in_features
    packed = layer.dtype == torch.uint8
    groups = () if layer.group_size is None else (k // layer.group_size,)
    scales = _zeros(config, n, *groups, dtype=torch.float32)
    options: dict[str, Any] = {
        "bias": _zeros(config, n) if layer.has_bias else None,
        "scales": scales,
        "zeros": scales if packed else None,
        "group_size": layer.group_size,
    }
    weight = _zeros(config, n, k // 2 if packed else k, dtype=layer.dtype)
    for rows in (16, 32, 64):
        launch = partial(skinny_gemm, _zeros(config, rows, k), weight, **options)
        yield f"skinny_gemm {layer} rows={rows}", launch


def _zeros(config: EngineShapes, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype or config.dtype, device=config.device)


def _cache_shape(config: EngineShapes) -> tuple[int, int, int, int]:
    beside = SCALE_BYTES if config.kv_dtype == torch.int8 else 0
    return (2, config.num_kv_heads, BLOCK_SIZE, config.head_dim + beside)


def _elementwise_variants(config: EngineShapes) -> Iterator[tuple[str, Callable[[], object]]]:
    x, weight = _zeros(config, 2, config.hidden_size), _zeros(config, config.hidden_size)
    yield "add_rms_norm", partial(add_rms_norm, x, None, weight, 1e-6)
    yield "add_rms_norm residual", partial(add_rms_norm, x, x, weight, 1e-6)
    yield "swiglu", partial(swiglu, _zeros(config, 2, 2 * config.intermediate_size))


def _attention_variants(config: EngineShapes) -> Iterator[tuple[str, Callable[[], object]]]:
    heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
    int32, float32 = torch.int32, torch.float32
    kv_dtype = config.kv_dtype or config.dtype
    k_cache = _zeros(config, *_cache_shape(config), dtype=kv_dtype)
    scales = None
    if kv_dtype == torch.int8:
        k_cache, scales = codes_and_scales(k_cache)
    v_cache = k_cache
    norm = _zeros(config, dim) if config.qk_norm else None
    bounds = _zeros(config, 2, kv_heads, dim, dtype=float32)
    kept_bounds = bounds if config.page_scoring else None

    fused = _zeros(config, 2, heads + 2 * kv_heads, dim)
    q, k, v = torch.split(fused, [heads, kv_heads, kv_heads], dim=1)
    yield "qk_norm_rope_write", partial(
        qk_norm_rope_write, q, k, v,
        positions=_zeros(config, 2, dtype=torch.int64),
        cos_sin_cache=_zeros(config, 16, config.rotary_dim or dim, dtype=float32),
        slot_mapping=torch.arange(2, device=config.device),
        k_cache=k_cache, v_cache=v_cache, q_weight=norm, k_weight=norm,
        k_scale=scales, v_scale=scales, key_min=kept_bounds, key_max=kept_bounds,
    )  # fmt: skip

    tables = _zeros(config, 2, 2, dtype=int32)
    lens = _zeros(config, 2, dtype=int32) + 32
    starts = torch.tensor([0, 4, 8], dtype=int32, device=config.device)
    prompt = _zeros(config, 8, heads, dim)
    for window in dict.fromkeys(config.sliding_windows):
        options: dict[str, Any] = {
            "scale": dim**-0.5,
            "sliding_window": window,
            "soft_cap": config.soft_cap,
            "k_scale": scales,
            "v_scale": scales,
        }
        for rows in config.query_rows:
            q = _zeros(config, 2, rows, heads, dim)
            launch = partial(paged_decode_attention, q, k_cache, v_cache, tables, lens, **options)
            yield f"paged_decode_attention rows={rows} window={window}", launch
        yield (
            f"prefill_attention window={window}",
            partial(prefill_attention, prompt, k_cache, v_cache, tables, starts, lens, **options),
        )
    if config.page_scoring:
        q = _zeros(config, 2, heads, dim)
        pages = _zeros(config, 2, kv_heads, 1, dtype=int32)
        yield "page_scores", partial(quest.page_scores, q, bounds, bounds, tables, lens)
        yield (
            "page_list_attention",
            partial(
                quest.page_list_attention, q, k_cache, v_cache, tables, lens, pages, scale=dim**-0.5
            ),
        )


def _sampler_variants(config: EngineShapes) -> Iterator[tuple[str, Callable[[], object]]]:
    """Filters, penalties and bias come and go with the requests of a batch; each is one switch."""
    logits = _zeros(config, 2, config.vocab_size, dtype=config.logits_dtype)
    row = torch.ones(2, dtype=torch.float32, device=config.device)
    ids = torch.zeros(2, dtype=torch.int64, device=config.device)
    counts = _zeros(config, 2, config.vocab_size, dtype=torch.int32)
    penalties = {
        "repetition_penalty": row,
        "frequency_penalty": row,
        "presence_penalty": row,
        "output_counts": counts,
        "prompt_mask": counts.bool(),
    }
    filters = {"top_k": ids + 5, "top_p": row, "min_p": row}
    bias = {"logit_bias": _zeros(config, 2, config.vocab_size, dtype=torch.float32)}
    switches = {"filters": filters, "penalties": penalties, "bias": bias}
    for chosen in product((False, True), repeat=len(switches)):
        names = [name for name, wanted in zip(switches, chosen, strict=True) if wanted]
        options: dict[str, Any] = {}
        for name in names:
            options |= switches[name]
        for logprobs in (False, True):
            yield f"sample {'+'.join(names) or 'plain'} logprobs={logprobs}", partial(
                sample, logits, temperature=row, seeds=ids, positions=ids,
                return_logprobs=logprobs, **options,
            )  # fmt: skip
