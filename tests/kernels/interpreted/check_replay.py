"""Launches that were captured once are right for other values: what a CUDA graph relies on.

An operation runs once; then its tensors get other lengths, tables and data in place, and the same
launches run again, with the same grids and constants. On a GPU a CUDA graph does this, in the
interpreter a list of launches.
"""

import pytest
import torch

import harness
from tandem_kernels import (
    add_rms_norm,
    kv_block_copy,
    page_list_attention,
    page_scores,
    paged_decode_attention,
    prefill_attention,
    qk_norm_rope_write,
    sample,
    skinny_gemm,
    snapkv_votes,
)

LENS = ((1, 300, 0, 64), (200, 3, 65, 0))


def capture(operation, monkeypatch):
    """Run an operation; returns (its result, a function that repeats its launches)."""
    if harness.DEVICE == "cuda":
        operation()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = operation()
        return result, graph.replay
    from triton.runtime.interpreter import InterpretedFunction

    launches, launch = [], InterpretedFunction.run

    def record(self, *args, grid, warmup, **kwargs):
        launches.append((self, args, grid, kwargs))
        return launch(self, *args, grid=grid, warmup=warmup, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(InterpretedFunction, "run", record)
        result = operation()

    def replay():
        for function, args, grid, kwargs in launches:
            launch(function, *args, grid=grid, warmup=False, **kwargs)

    return result, replay


def paged(lens, seed):
    """Caches of one size whatever the lengths: 12 blocks, tables of 5."""
    k, v, tables, seq_lens = harness.paged_cache(lens, 2, 64, torch.float32, seed=seed)
    blocks = [torch.nn.functional.pad(c, (0, 0) * 3 + (0, 12 - len(c))) for c in (k, v)]
    return (*blocks, torch.nn.functional.pad(tables, (0, 5 - tables.shape[1])), seq_lens)


def rows(seed, *shape):
    return harness.randn(*shape, seed=seed)


def decode(which):
    return paged_decode_attention, (rows(which, 4, 2, 4, 64), *paged(LENS[which], which))


def prefill(which):
    starts = torch.tensor([[0, 1, 30, 30, 32], [0, 20, 23, 32, 32]][which], dtype=torch.int32)
    k, v, tables, lens = paged(LENS[which], which)
    return prefill_attention, (rows(which, 32, 4, 64), k, v, tables, starts.to(k.device), lens)


def pages(which):
    listed = torch.tensor([[[0, -1, 3], [4, 2, 0]], [[1, 0, -1], [3, 2, 1]]][which])
    listed = listed[[0, 1, 0, 1]][:, None].expand(-1, 2, -1).to(harness.DEVICE, torch.int32)
    return page_list_attention, (rows(which, 4, 4, 64), *paged(LENS[which], which), listed.clone())


def scores(which):
    _, _, tables, lens = paged(LENS[which], which)
    low, high = rows(which, 12, 2, 64), rows(which + 2, 12, 2, 64)
    return page_scores, (rows(which, 4, 4, 64), low, high, tables, lens)


def votes(which):
    k, _, tables, lens = paged(LENS[which], which)
    return snapkv_votes, (rows(which, 4, 5, 4, 64), k, tables, lens)


@pytest.mark.parametrize("make", [decode, prefill, pages, scores, votes])
def check_attention_replays_with_other_lengths(make, monkeypatch):
    options = {} if make is scores else {"scale": 0.1}
    operation, tensors = make(0)
    _, others = make(1)
    result, replay = capture(lambda: operation(*tensors, **options), monkeypatch)

    for tensor, other in zip(tensors, others, strict=True):
        tensor.copy_(other)
    replay()

    assert torch.equal(result, operation(*others, **options))


def check_sampling_replays_with_other_parameters(monkeypatch):
    def parameters(seed):
        generator = torch.Generator().manual_seed(seed)
        uniform = torch.rand(3, 300, generator=generator)
        return {
            "temperature": uniform[:, 0] * (seed > 0), "seeds": torch.arange(3) + seed,
            "positions": torch.arange(3) * 7 + seed, "top_k": (uniform[:, 1] * 20).long(),
            "top_p": uniform[:, 2], "min_p": uniform[:, 3] / 3,
            "presence_penalty": uniform[:, 4], "output_counts": (uniform * 3).int(),
        }  # fmt: skip

    options, others = (
        {name: value.to(harness.DEVICE) for name, value in parameters(seed).items()}
        for seed in (0, 1)
    )
    logits, other_logits = rows(0, 3, 300), rows(1, 3, 300)
    result, replay = capture(lambda: sample(logits, **options), monkeypatch)

    logits.copy_(other_logits)
    for name, value in others.items():
        options[name].copy_(value)
    replay()

    assert torch.equal(result.token_ids, sample(other_logits, **others).token_ids)


def check_cache_writes_and_copies_replay_with_other_slots(monkeypatch):
    caches = [torch.zeros(6, 2, 64, 64, device=harness.DEVICE) for _ in range(2)]
    fused, table = rows(0, 4, 8, 64), rows(1, 100, 64)
    slots = torch.tensor([3, -1, 64, 130], device=harness.DEVICE)
    sources = torch.tensor([0, -1], device=harness.DEVICE)
    targets = torch.tensor([3, 4], device=harness.DEVICE)

    def operation():
        q, k, v = fused.split([4, 2, 2], dim=1)
        qk_norm_rope_write(
            q, k, v, positions=slots.clamp(0, 99), cos_sin_cache=table, slot_mapping=slots,
            k_cache=caches[0], v_cache=caches[1],
        )  # fmt: skip
        kv_block_copy(caches[1], sources, targets)

    _, replay = capture(operation, monkeypatch)
    slots.copy_(torch.tensor([-1, 70, 5, 191]))
    sources.copy_(torch.tensor([1, 2]))
    for cache in caches:
        cache.zero_()
    replay()

    values = fused[:, 6:]
    assert torch.equal(caches[1][1, :, 6], values[1])
    assert torch.equal(caches[1][0, :, 5], values[2])
    assert torch.equal(caches[1][2, :, 63], values[3])
    assert torch.equal(caches[1][3:5], caches[1][1:3])
    assert int((caches[1][:3] != 0).any(-1).any(1).sum()) == 3


def check_linear_layers_replay_with_other_rows(monkeypatch):
    x, weight = rows(0, 5, 128), rows(1, 70, 128)
    operation = lambda: skinny_gemm(add_rms_norm(x, x, weight[0], 1e-6)[0], weight)  # noqa: E731
    result, replay = capture(operation, monkeypatch)

    x.copy_(rows(2, 5, 128))
    replay()

    assert torch.equal(result, operation())
