# mypy: disable-error-code="no-untyped-def,no-untyped-call,no-any-return"
"""Penalties, temperature, min-p, top-k, top-p and a Gumbel-max draw from each row of logits.

Per row, in this order:

1. repetition penalty on tokens seen in prompt or output (divide positive logits, multiply negative
   ones), frequency penalty * count and presence penalty * [count > 0] on output tokens, then the
   additive `logit_bias` (-inf forbids a token);
2. temperature 0 takes the highest logit, lowest index first; otherwise x = logits / temperature;
3. min-p keeps x >= max(x) + log(min_p);
4. top-k keeps x >= the k-th largest x (equal values stay);
5. top-p keeps x >= t for the largest t whose kept probability mass, relative to what steps 3 and 4
   left, reaches top_p (equal values stay);
6. token = argmax over kept tokens of x + gumbel(seed, position, token).

The noise is a counter hash, so it depends on nothing but seed, position and token: a resumed or
moved stream draws the same tokens. Its integer part is bit-identical in torch and Triton; the
logarithms agree to float32 rounding.
Shapes: logits `(num_rows, vocab)`; parameters `(num_rows,)`. Log-probabilities are of the raw
logits (before step 1), as OpenAI's API reports them.
Bytes moved: the logits once without filters; with top-k or top-p the later passes hit L2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .checks import (
    FLOAT_DTYPES,
    KernelArgumentError,
    check,
    check_dtype,
    check_last_contiguous,
    check_same_device,
    check_shape,
    compute_dtype_of,
)
from .dispatch import runs_on_triton, tl, triton
from .noise import gumbel, gumbel_noise
from .online_softmax import padded
from .sampler_threshold import load_logits, threshold_kernel


@dataclass(frozen=True, slots=True)
class SampleOutput:
    """Chosen tokens `(num_rows,)` int64, and log-probabilities where asked for.

    logprobs `(num_rows,)` float32 of the chosen tokens; top_token_ids and top_logprobs `(num_rows,
    num_top_logprobs)`, most likely first.
    """

    token_ids: torch.Tensor
    logprobs: torch.Tensor | None = None
    top_token_ids: torch.Tensor | None = None
    top_logprobs: torch.Tensor | None = None


def sample(
    logits: torch.Tensor,
    *,
    temperature: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    top_k: torch.Tensor | None = None,
    top_p: torch.Tensor | None = None,
    min_p: torch.Tensor | None = None,
    repetition_penalty: torch.Tensor | None = None,
    frequency_penalty: torch.Tensor | None = None,
    presence_penalty: torch.Tensor | None = None,
    prompt_mask: torch.Tensor | None = None,
    output_counts: torch.Tensor | None = None,
    logit_bias: torch.Tensor | None = None,
    return_logprobs: bool = False,
    num_top_logprobs: int = 0,
) -> SampleOutput:
    """Draw one token per row; see the module for the order of the steps.

    temperature, top_p, min_p and the penalties are `(num_rows,)` float32; top_k `(num_rows,)`
    int32 or int64, where 0 or less means all; top_p 1 and min_p 0 switch off; seeds and positions
    `(num_rows,)` int64 (position: absolute index of the token being generated). Penalties need
    output_counts `(num_rows, vocab)` int32 and, for repetition, prompt_mask `(num_rows, vocab)`
    bool; logit_bias is `(num_rows, vocab)`. None switches a step off for the whole batch.
    `num_top_logprobs` implies `return_logprobs`. Raises KernelArgumentError.
    """
    check_shape("logits", logits, (None, None), "(num_rows, vocab)")
    check_dtype("logits", logits, FLOAT_DTYPES)
    num_rows, vocab = logits.shape
    check(vocab > 0, "logits has an empty vocabulary")
    rows: dict[str, Any] = {
        "temperature": temperature,
        "seeds": seeds,
        "positions": positions,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "frequency_penalty": frequency_penalty,
        "presence_penalty": presence_penalty,
    }
    planes: dict[str, Any] = {
        "prompt_mask": prompt_mask,
        "output_counts": output_counts,
        "logit_bias": logit_bias,
    }
    for name, tensor in rows.items():
        if tensor is not None:
            check_shape(name, tensor, (num_rows,), "(num_rows,)")
    for name, tensor in planes.items():
        if tensor is not None:
            check_shape(name, tensor, (num_rows, vocab), "(num_rows, vocab)")
    check_dtype("seeds", seeds, (torch.int64,))
    check_dtype("positions", positions, (torch.int64,))
    check_same_device("logits", logits, **rows, **planes)
    penalised = (repetition_penalty, frequency_penalty, presence_penalty)
    if any(tensor is not None for tensor in penalised) and output_counts is None:
        raise KernelArgumentError("output_counts is None; penalties need (num_rows, vocab) counts")
    check(
        0 <= num_top_logprobs <= vocab,
        f"num_top_logprobs={num_top_logprobs} is outside 0..vocab={vocab}",
    )
    if runs_on_triton(logits):
        token_ids, logprobs = _launch(logits, **rows, **planes, return_logprobs=return_logprobs)
    else:
        token_ids = sample_reference(logits, **rows, **planes)
        logprobs = None
    if not (return_logprobs or num_top_logprobs):
        return SampleOutput(token_ids)
    return _with_logprobs(logits, token_ids, logprobs, num_top_logprobs)


def _with_logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, logprobs: torch.Tensor | None, num_top: int
) -> SampleOutput:
    """Fill in what the launch did not compute; top log-probabilities are torch on any device."""
    if logprobs is not None and not num_top:
        return SampleOutput(token_ids, logprobs)
    every = torch.log_softmax(logits.to(compute_dtype_of(logits)), dim=-1)
    if logprobs is None:
        logprobs = every.gather(-1, token_ids[:, None]).squeeze(-1)
    if not num_top:
        return SampleOutput(token_ids, logprobs)
    values, indices = torch.topk(every, num_top, dim=-1)
    return SampleOutput(token_ids, logprobs, indices, values)


def sample_reference(
    logits: torch.Tensor,
    *,
    temperature: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    top_k: torch.Tensor | None = None,
    top_p: torch.Tensor | None = None,
    min_p: torch.Tensor | None = None,
    repetition_penalty: torch.Tensor | None = None,
    frequency_penalty: torch.Tensor | None = None,
    presence_penalty: torch.Tensor | None = None,
    prompt_mask: torch.Tensor | None = None,
    output_counts: torch.Tensor | None = None,
    logit_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Token ids `(num_rows,)` int64 by the module's six steps, with a sort for top-k and top-p."""
    x = apply_penalties(
        logits,
        repetition_penalty=repetition_penalty,
        frequency_penalty=frequency_penalty,
        presence_penalty=presence_penalty,
        prompt_mask=prompt_mask,
        output_counts=output_counts,
        logit_bias=logit_bias,
    )
    greedy_ids = x.argmax(-1)
    random_rows = (temperature > 0).nonzero().squeeze(-1)
    if random_rows.numel() == 0:
        return greedy_ids
    x = x[random_rows] / temperature[random_rows, None].to(x.dtype)
    x = _filter(
        x,
        None if top_k is None else top_k[random_rows],
        None if top_p is None else top_p[random_rows],
        None if min_p is None else min_p[random_rows],
    )
    noise = gumbel_noise(seeds[random_rows], positions[random_rows], x.shape[1], dtype=x.dtype)
    return greedy_ids.index_copy(0, random_rows, (x + noise).argmax(-1))


def apply_penalties(
    logits: torch.Tensor,
    *,
    repetition_penalty: torch.Tensor | None = None,
    frequency_penalty: torch.Tensor | None = None,
    presence_penalty: torch.Tensor | None = None,
    prompt_mask: torch.Tensor | None = None,
    output_counts: torch.Tensor | None = None,
    logit_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Step 1: penalised logits in float32 (float64 for float64 logits)."""
    x = logits.to(compute_dtype_of(logits))
    if output_counts is not None:
        if repetition_penalty is not None:
            seen = output_counts > 0
            if prompt_mask is not None:
                seen = seen | prompt_mask.bool()
            factor = repetition_penalty.to(x.dtype)[:, None]
            x = torch.where(seen, torch.where(x > 0, x / factor, x * factor), x)
        if frequency_penalty is not None:
            x = x - frequency_penalty.to(x.dtype)[:, None] * output_counts
        if presence_penalty is not None:
            x = x - presence_penalty.to(x.dtype)[:, None] * (output_counts > 0)
    return x if logit_bias is None else x + logit_bias.to(x.dtype)


def _filter(
    x: torch.Tensor,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
    min_p: torch.Tensor | None,
) -> torch.Tensor:
    """Steps 3 to 5: the tokens not kept become -inf."""
    dropped = float("-inf")
    vocab = x.shape[1]
    if min_p is not None:
        floor = x.amax(-1, keepdim=True) + torch.log(min_p.to(x.dtype))[:, None]
        x = x.masked_fill(x < floor, dropped)
    # A filter that no row wants costs no sort.
    top_k = top_k if top_k is not None and bool((top_k > 0).any()) else None
    top_p = top_p if top_p is not None and bool((top_p < 1).any()) else None
    if top_k is None and top_p is None:
        return x
    ordered = torch.sort(x, dim=-1, descending=True).values
    if top_k is not None:
        rank = torch.where(top_k > 0, top_k, vocab).clamp(1, vocab).long() - 1
        floor = ordered.gather(-1, rank[:, None])
        x = x.masked_fill(x < floor, dropped)
        ordered = ordered.masked_fill(ordered < floor, dropped)
    if top_p is not None:
        before = torch.softmax(ordered, dim=-1)
        before = before.cumsum(-1) - before  # mass of what precedes each token
        kept = (before < top_p.to(x.dtype)[:, None]).sum(-1).clamp(min=1)
        floor = ordered.gather(-1, kept[:, None] - 1)
        floor = torch.where(top_p[:, None] >= 1, dropped, floor)
        x = x.masked_fill(x < floor, dropped)
    return x


# Tokens per program of the draw, tokens per step of the threshold search (8192 spilled 8 times on
# sm_80), warps. Otherwise untuned.
_CHUNK = 4096
_SEARCH_BLOCK = 4096
_DRAW_WARPS = 8
_SEARCH_WARPS = 16


@triton.jit
def _draw_kernel(
    logits_ptr, stride, temperature_ptr, seeds_ptr, positions_ptr, threshold_ptr,
    repetition_ptr, frequency_ptr, presence_ptr, prompt_ptr, counts_ptr, bias_ptr,
    best_ptr, index_ptr, raw_ptr, highest_ptr, total_ptr, vocab,
    HAS_THRESHOLD: tl.constexpr, HAS_REPETITION: tl.constexpr, HAS_FREQUENCY: tl.constexpr,
    HAS_PRESENCE: tl.constexpr, HAS_PROMPT: tl.constexpr, HAS_BIAS: tl.constexpr,
    LOGPROBS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Best candidate of one chunk of one row, and the chunk's part of the raw log-sum-exp."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    mask = token < vocab
    raw, x = load_logits(
        logits_ptr, stride, row, token, mask, repetition_ptr, frequency_ptr, presence_ptr,
        prompt_ptr, counts_ptr, bias_ptr, vocab,
        HAS_REPETITION, HAS_FREQUENCY, HAS_PRESENCE, HAS_PROMPT, HAS_BIAS,
    )  # fmt: skip
    temperature = tl.load(temperature_ptr + row).to(tl.float32)
    if temperature > 0:
        x = x / temperature
        if HAS_THRESHOLD:
            x = tl.where(x >= tl.load(threshold_ptr + row), x, float("-inf"))
        x += gumbel(tl.load(seeds_ptr + row), tl.load(positions_ptr + row), token)
    best = tl.max(x, 0)
    index = tl.min(tl.where((x == best) & mask, token, 2147483647), 0)
    at = row * tl.num_programs(1) + chunk
    tl.store(best_ptr + at, best)
    tl.store(index_ptr + at, index)
    if LOGPROBS:
        tl.store(raw_ptr + at, tl.max(tl.where(token == index, raw, float("-inf")), 0))
        highest = tl.max(raw, 0)
        base = tl.where(highest == float("-inf"), 0.0, highest)
        tl.store(highest_ptr + at, highest)
        tl.store(total_ptr + at, tl.sum(tl.exp(raw - base), 0))


@triton.jit(do_not_specialize=["num_chunks"])
def _pick_kernel(
    best_ptr, index_ptr, raw_ptr, highest_ptr, total_ptr, token_ptr, logprob_ptr, num_chunks,
    LOGPROBS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Reduce the chunks of one row; among equal candidates the lowest token wins."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    mask = lanes < num_chunks
    at = row * num_chunks + lanes
    best = tl.load(best_ptr + at, mask=mask, other=float("-inf"))
    index = tl.load(index_ptr + at, mask=mask, other=2147483647)
    token = tl.min(tl.where(best == tl.max(best, 0), index, 2147483647), 0)
    tl.store(token_ptr + row, token.to(tl.int64))
    if LOGPROBS:
        highest = tl.load(highest_ptr + at, mask=mask, other=float("-inf"))
        total = tl.load(total_ptr + at, mask=mask, other=0.0)
        raw = tl.load(raw_ptr + at, mask=mask, other=float("-inf"))
        top = tl.max(highest, 0)
        base = tl.where(top == float("-inf"), 0.0, top)
        whole = tl.sum(total * tl.exp(highest - base), 0)
        chosen = tl.max(tl.where(index == token, raw, float("-inf")), 0)
        tl.store(logprob_ptr + row, chosen - base - tl.log(whole))


def _launch(
    logits, *, temperature, seeds, positions, top_k, top_p, min_p, repetition_penalty,
    frequency_penalty, presence_penalty, prompt_mask, output_counts, logit_bias, return_logprobs,
):  # fmt: skip
    check_last_contiguous("logits", logits)
    planes = (("prompt_mask", prompt_mask), ("output_counts", output_counts),
              ("logit_bias", logit_bias))  # fmt: skip
    for name, plane in planes:
        check(plane is None or plane.is_contiguous(), f"{name} must be contiguous")
    num_rows, vocab = logits.shape
    device = logits.device
    token_ids = torch.empty(num_rows, dtype=torch.int64, device=device)
    logprobs = torch.empty(num_rows, dtype=torch.float32, device=device)
    if num_rows == 0:
        return token_ids, logprobs
    if prompt_mask is not None and prompt_mask.dtype == torch.bool:
        prompt_mask = prompt_mask.view(torch.uint8)
    penalties = (
        repetition_penalty, frequency_penalty, presence_penalty, prompt_mask, output_counts,
        logit_bias,
    )  # fmt: skip
    has = {
        "HAS_REPETITION": repetition_penalty is not None,
        "HAS_FREQUENCY": frequency_penalty is not None,
        "HAS_PRESENCE": presence_penalty is not None,
        "HAS_PROMPT": prompt_mask is not None,
        "HAS_BIAS": logit_bias is not None,
    }
    threshold = None
    if top_k is not None or top_p is not None or min_p is not None:
        threshold = torch.empty(num_rows, dtype=torch.float32, device=device)
        block = min(_SEARCH_BLOCK, padded(vocab))
        threshold_kernel[(num_rows,)](
            logits, logits.stride(0), temperature, top_k, top_p, min_p, *penalties, threshold,
            vocab, HAS_TOP_K=top_k is not None, HAS_TOP_P=top_p is not None,
            HAS_MIN_P=min_p is not None, **has, BLOCK=block,
            num_warps=_SEARCH_WARPS if block == _SEARCH_BLOCK else 4,
        )  # fmt: skip
    chunk = min(_CHUNK, padded(vocab))
    num_chunks = -(-vocab // chunk)
    # Rounded up to 16 bytes: a misaligned part would compile a variant of its own.
    parts = torch.empty((4, -(-num_rows * num_chunks // 4) * 4), dtype=torch.float32, device=device)
    index = torch.empty((num_rows, num_chunks), dtype=torch.int32, device=device)
    best, raw, highest, total = parts
    _draw_kernel[(num_rows, num_chunks)](
        logits, logits.stride(0), temperature, seeds, positions, threshold, *penalties,
        best, index, raw, highest, total, vocab, HAS_THRESHOLD=threshold is not None, **has,
        LOGPROBS=return_logprobs, CHUNK=chunk, num_warps=_DRAW_WARPS,
    )  # fmt: skip
    _pick_kernel[(num_rows,)](
        best, index, raw, highest, total, token_ids, logprobs, num_chunks,
        LOGPROBS=return_logprobs, BLOCK=padded(num_chunks), num_warps=1,
    )  # fmt: skip
    return token_ids, logprobs if return_logprobs else None
