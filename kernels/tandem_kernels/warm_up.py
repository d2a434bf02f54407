"""Compile every kernel variant an engine will launch, before it takes requests.

Triton compiles on first use; a compilation inside a request would cost it seconds. warm_up runs
each operation once per variant on tiny tensors of the engine's shapes and dtypes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from . import kv_blocks, quest
from .checks import BLOCK_SIZE
from .paged_decode import paged_decode_attention
from .prefill import prefill_attention
from .qk_norm_rope import qk_norm_rope_write
from .rms_norm import add_rms_norm
from .sampler import sample
from .skinny_gemm import skinny_gemm
from .swiglu import swiglu


@dataclass(frozen=True, slots=True)
class EngineShapes:
    """What decides which variants an engine compiles; one rank's share under tensor parallelism.

    kv_dtype None means dtype. query_rows lists the rows per sequence of the decode kernel: 1, and
    1 + draft length for verification. skinny_linears lists (out_features, in_features) of bf16 or
    fp16 layers served by skinny_gemm. page_scoring includes Quest's two kernels.
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
    sliding_window: int | None = None
    soft_cap: float | None = None
    query_rows: tuple[int, ...] = (1,)
    max_num_seqs: int = 64
    skinny_linears: tuple[tuple[int, int], ...] = ()
    page_scoring: bool = False
    device: str = "cuda"


def warm_up(config: EngineShapes) -> dict[str, float]:
    """Run every variant once; return seconds per variant, in order. A CPU device runs references.

    Call it on the stream and device that will serve, before CUDA graphs are captured.
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
    def zeros(*shape: int, dtype: torch.dtype = config.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=config.device)

    kv_dtype = config.kv_dtype or config.dtype
    fp8 = kv_dtype in (torch.float8_e4m3fn, torch.float8_e5m2)
    heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
    cache_shape = (2, kv_heads, BLOCK_SIZE, dim)
    k_cache, v_cache = zeros(*cache_shape, dtype=kv_dtype), zeros(*cache_shape, dtype=kv_dtype)
    scales = zeros(kv_heads, dtype=torch.float32) + 1 if fp8 else None
    scale = dim**-0.5

    # 1, 2 and many rows: Triton specialises a kernel for an integer argument equal to 1.
    for rows in (1, 2, 16):
        x = zeros(rows, config.hidden_size)
        weight = zeros(config.hidden_size)
        yield f"add_rms_norm rows={rows}", lambda x=x, w=weight: add_rms_norm(x, None, w, 1e-6)
        yield f"add_rms_norm residual rows={rows}", lambda x=x, w=weight: (
            add_rms_norm(x, x, w, 1e-6)
        )
        gate_up = zeros(rows, 2 * config.intermediate_size)
        yield f"swiglu rows={rows}", lambda g=gate_up: swiglu(g)

    rotary = config.rotary_dim or dim
    norm_weight = zeros(dim) if config.qk_norm else None
    bounds = zeros(2, kv_heads, dim, dtype=torch.float32) if config.page_scoring else None
    for tokens in (1, 2, 16):
        yield f"qk_norm_rope_write tokens={tokens}", lambda tokens=tokens: qk_norm_rope_write(
            zeros(tokens, heads, dim),
            zeros(tokens, kv_heads, dim),
            zeros(tokens, kv_heads, dim),
            positions=zeros(tokens, dtype=torch.int64),
            cos_sin_cache=zeros(16, rotary, dtype=torch.float32),
            slot_mapping=torch.arange(tokens, device=config.device),
            k_cache=k_cache,
            v_cache=v_cache,
            q_weight=norm_weight,
            k_weight=norm_weight,
            k_scale=scales,
            v_scale=scales,
            key_min=bounds,
            key_max=bounds,
        )

    for num_seqs in (1, 2, 16):
        tables = zeros(num_seqs, 2, dtype=torch.int32)
        lens = zeros(num_seqs, dtype=torch.int32) + 32
        for rows in config.query_rows:
            yield f"paged_decode rows={rows} seqs={num_seqs}", lambda n=num_seqs, r=rows, t=tables, lens=lens: (
                paged_decode_attention(
                    zeros(n, r, heads, dim), k_cache, v_cache, t, lens, scale=scale,
                    sliding_window=config.sliding_window, soft_cap=config.soft_cap,
                    k_scale=scales, v_scale=scales,
                )
            )  # fmt: skip
        starts = torch.arange(0, 4 * num_seqs + 1, 4, dtype=torch.int32, device=config.device)
        yield f"prefill seqs={num_seqs}", lambda n=num_seqs, s=starts, t=tables, lens=lens: (
            prefill_attention(
                zeros(4 * n, heads, dim), k_cache, v_cache, t, s, lens, scale=scale,
                sliding_window=config.sliding_window, soft_cap=config.soft_cap,
                k_scale=scales, v_scale=scales,
            )
        )  # fmt: skip
        if config.page_scoring:
            q = zeros(num_seqs, heads, dim)
            pages = zeros(num_seqs, kv_heads, 1, dtype=torch.int32)
            yield f"page_scores seqs={num_seqs}", lambda q=q, t=tables, lens=lens: (
                quest.page_scores(q, bounds, bounds, t, lens)
            )
            yield f"page_list_attention seqs={num_seqs}", lambda q=q, t=tables, lens=lens, p=pages: (
                quest.page_list_attention(q, k_cache, v_cache, t, lens, p, scale=scale)
            )

    yield from _sampler_variants(config)
    for n, k in config.skinny_linears:
        weight = zeros(n, k)
        for rows in (1, 16, 32, 64):
            yield f"skinny_gemm {n}x{k} rows={rows}", lambda w=weight, r=rows, k=k: (
                skinny_gemm(zeros(r, k), w)
            )
    ids = torch.zeros(1, dtype=torch.int64, device=config.device)
    yield "kv_block_gather", lambda: kv_blocks.kv_block_gather(k_cache, ids)
    yield "kv_block_scatter", lambda: kv_blocks.kv_block_scatter(
        kv_blocks.kv_block_gather(k_cache, ids), k_cache, ids
    )
    yield "kv_block_copy", lambda: kv_blocks.kv_block_copy(k_cache, ids, ids + 1)


def _sampler_variants(config: EngineShapes) -> Iterator[tuple[str, Callable[[], object]]]:
    for rows in (1, 2, 16):
        logits = torch.zeros(rows, config.vocab_size, dtype=config.dtype, device=config.device)
        row = torch.ones(rows, dtype=torch.float32, device=config.device)
        seeds = torch.zeros(rows, dtype=torch.int64, device=config.device)
        counts = torch.zeros(rows, config.vocab_size, dtype=torch.int32, device=config.device)
        penalties = {
            "repetition_penalty": row,
            "frequency_penalty": row,
            "presence_penalty": row,
            "output_counts": counts,
            "prompt_mask": counts.bool(),
        }
        filters = {"top_k": seeds + 5, "top_p": row, "min_p": row}
        for name, options in (("plain", {}), ("filters", filters), ("all", filters | penalties)):
            for logprobs in (False, True):
                yield f"sample {name} rows={rows} logprobs={logprobs}", lambda o=options, x=logits, t=row, s=seeds, want=logprobs: (
                    sample(x, temperature=t, seeds=s, positions=s, return_logprobs=want, **o)
                )  # fmt: skip
