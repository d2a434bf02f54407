"""How close each kernel comes to what the device can do.

    python benchmarks/kernels.py                    every operation, on the GPU
    python benchmarks/kernels.py --only decode,gemm a few of them
    python benchmarks/kernels.py --toy              tiny shapes, Triton's interpreter, no GPU

First the ceilings are measured: copy bandwidth (torch's copy_, bytes read plus written) and matrix
rate (torch's bf16 matmul). Then each kernel runs over a grid of sizes; a row shows its time, its
rate, that rate as a fraction of the ceiling that bounds it, and the times of torch's own operation
and of flash-attn where installed. Inputs rotate through more memory than the L2 cache holds, and
launches are replayed from a CUDA graph, so launch overhead is not measured. Results go to
benchmarks/results/kernels-<device>-<date>.json. Toy runs check the script, not the kernels: their
times mean nothing, and they write a file only into a folder given with --results.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if "--toy" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # must precede the first import of triton

import torch
from torch.nn import functional

from tandem_kernels import (
    add_rms_norm,
    centroid_weights,
    key_list_attention,
    kv_block_copy,
    kv_block_gather,
    kv_block_scatter,
    page_list_attention,
    page_scores,
    paged_decode_attention,
    prefill_attention,
    qk_norm_rope_write,
    quantize_fp8,
    quantize_int4,
    quantize_int8,
    rope_table,
    sample,
    skinny_gemm,
    snapkv_votes,
    swiglu,
)
from tandem_kernels.kv_blocks import PROGRAMS

Call = Callable[[], object]
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Case:
    """One measurement: `ours` and `others` do the same work on rotating inputs."""

    kernel: str
    size: str
    ours: list[Call]
    others: dict[str, list[Call]]
    num_bytes: float = 0.0
    num_flops: float = 0.0


@dataclass(frozen=True)
class Row:
    """A measured case; rates are GB/s where memory bounds it, else TFLOP/s."""

    kernel: str
    size: str
    time_us: float
    rate: float
    unit: str
    fraction_of_ceiling: float
    others_us: dict[str, float]


class Bench:
    """Device, scale and timing of one run."""

    def __init__(self, toy: bool) -> None:
        self.toy = toy
        self.device = "cpu" if toy else "cuda"
        self.dtype = torch.bfloat16
        self.cache_bytes = 0 if toy else 4 * torch.cuda.get_device_properties(0).L2_cache_size

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Normal values on the device."""
        return torch.randn(shape, device=self.device).to(dtype or self.dtype)

    def copies(self, num_bytes: float) -> int:
        """How many input sets of this size overflow the L2 cache four times."""
        return 1 if self.toy else max(1, min(64, -(-self.cache_bytes // max(1, int(num_bytes)))))

    def time_us(self, calls: list[Call], repeats: int = 20) -> float:
        """Median time of one call in microseconds."""
        if self.toy:
            start = time.perf_counter()
            calls[0]()
            return (time.perf_counter() - start) * 1e6
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls[:2]:
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        times = []
        for _ in range(3):
            graph.replay()
        for _ in range(repeats):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e3 / len(calls))
        return statistics.median(times)

    def copy_bandwidth(self) -> float:
        """Bytes per second that torch's copy reads and writes."""
        count = 2**10 if self.toy else 2**31
        source = torch.zeros(count, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * count / (self.time_us([lambda: target.copy_(source)]) * 1e-6)

    def matrix_rate(self) -> float:
        """Multiply-adds, counted as two operations, per second of a large bf16 matmul."""
        n = 32 if self.toy else 8192
        a, b = self.randn(n, n), self.randn(n, n)
        return 2 * n**3 / (self.time_us([lambda: a @ b]) * 1e-6)


def paged(bench: Bench, num_seqs: int, length: int, kv_heads: int, head_dim: int) -> Any:
    """(k_cache, v_cache, block_tables, seq_lens) with shuffled blocks."""
    blocks = -(-length // 64)
    cache = [bench.randn(num_seqs * blocks, kv_heads, 64, head_dim) for _ in range(2)]
    order = torch.randperm(num_seqs * blocks, device=bench.device)
    tables = order.view(num_seqs, blocks).to(torch.int32)
    lens = torch.full((num_seqs,), length, dtype=torch.int32, device=bench.device)
    return (*cache, tables, lens)


def decode_cases(bench: Bench) -> Iterator[Case]:
    grid = [(1, 8192), (8, 8192), (64, 1024), (64, 4096), (1, 65536), (16, 32768), (128, 2048)]
    heads, kv_heads, dim = (32, 8, 128)
    if bench.toy:
        grid, heads, kv_heads, dim = [(2, 65)], 4, 2, 32
    for num_seqs, length in grid:
        num_bytes = 2 * num_seqs * length * kv_heads * dim * 2
        ours, torchs, flash = [], [], []
        for _ in range(bench.copies(num_bytes)):
            q = bench.randn(num_seqs, 1, heads, dim)
            cache = paged(bench, num_seqs, length, kv_heads, dim)
            ours.append(lambda q=q, c=cache: paged_decode_attention(q, *c, scale=dim**-0.5))
            k, v = (bench.randn(num_seqs, kv_heads, length, dim) for _ in range(2))
            torchs.append(lambda q=q, k=k, v=v: functional.scaled_dot_product_attention(
                q.transpose(1, 2), k, v, enable_gqa=True
            ))  # fmt: skip
            flash.append(lambda q=q, k=k, v=v: _flash()(
                q, k.transpose(1, 2), v.transpose(1, 2)
            ))  # fmt: skip
        others = {"torch sdpa, contiguous": torchs} | ({"flash-attn": flash} if _flash() else {})
        yield Case("decode", f"{num_seqs} x {length}", ours, others, num_bytes=num_bytes)


def prefill_cases(bench: Bench) -> Iterator[Case]:
    grid = [(1, 2048), (1, 8192), (4, 4096), (1, 32768)]
    heads, kv_heads, dim = (32, 8, 128)
    if bench.toy:
        grid, heads, kv_heads, dim = [(2, 40)], 2, 1, 32
    for num_seqs, length in grid:
        q = bench.randn(num_seqs * length, heads, dim)
        cache = paged(bench, num_seqs, length, kv_heads, dim)
        starts = torch.arange(
            0, num_seqs * length + 1, length, dtype=torch.int32, device=bench.device
        )
        full = [bench.randn(num_seqs, heads, length, dim) for _ in range(3)]
        others: dict[str, list[Call]] = {
            "torch sdpa": [
                lambda f=full: functional.scaled_dot_product_attention(*f, is_causal=True)
            ]
        }
        if _flash():
            others["flash-attn"] = [
                lambda f=full: _flash()(*(t.transpose(1, 2) for t in f), causal=True)
            ]
        yield Case(
            "prefill",
            f"{num_seqs} x {length}",
            [lambda q=q, c=cache, s=starts: prefill_attention(
                q, *c[:3], s, c[3], scale=dim**-0.5
            )],
            others,
            num_flops=4 * dim * heads * num_seqs * length * (length + 1) / 2,
        )  # fmt: skip


def elementwise_cases(bench: Bench) -> Iterator[Case]:
    hidden, inner, heads, kv_heads, dim = (4096, 14336, 32, 8, 128)
    rows_grid = [1, 64, 2048, 16384]
    if bench.toy:
        hidden, inner, heads, kv_heads, dim, rows_grid = 64, 96, 4, 2, 32, [3]
    weight = bench.randn(hidden)
    table = rope_table(dim, 16384, device=bench.device)
    for rows in rows_grid:
        num_bytes = 4 * rows * hidden * 2
        pairs = [
            (bench.randn(rows, hidden), bench.randn(rows, hidden))
            for _ in range(bench.copies(num_bytes))
        ]
        yield Case(
            "add_rms_norm", str(rows),
            [lambda p=p: add_rms_norm(*p, weight, 1e-6) for p in pairs],
            {"torch add, rms_norm": [
                lambda p=p: functional.rms_norm(p[0] + p[1], (hidden,), weight) for p in pairs
            ]},
            num_bytes=num_bytes,
        )  # fmt: skip
        num_bytes = 3 * rows * inner * 2
        inputs = [bench.randn(rows, 2 * inner) for _ in range(bench.copies(num_bytes))]
        yield Case(
            "swiglu", str(rows), [lambda x=x: swiglu(x) for x in inputs],
            {"torch silu, mul": [
                lambda x=x: functional.silu(x[:, :inner]) * x[:, inner:] for x in inputs
            ]},
            num_bytes=num_bytes,
        )  # fmt: skip
        num_bytes = 2 * rows * (heads + 2 * kv_heads) * dim * 2
        cache = [bench.randn(-(-rows // 64), kv_heads, 64, dim) for _ in range(2)]
        slots = torch.arange(rows, device=bench.device)
        fused = [
            torch.split(
                bench.randn(rows, heads + 2 * kv_heads, dim), [heads, kv_heads, kv_heads], dim=1
            )
            for _ in range(bench.copies(num_bytes))
        ]
        yield Case(
            "qk_norm_rope_write", str(rows),
            [lambda f=f, s=slots, c=cache: qk_norm_rope_write(
                *f, positions=s, cos_sin_cache=table, slot_mapping=s, k_cache=c[0], v_cache=c[1],
                q_weight=weight[:dim], k_weight=weight[:dim],
            ) for f in fused],
            {}, num_bytes=num_bytes,
        )  # fmt: skip


def sampler_cases(bench: Bench) -> Iterator[Case]:
    for rows, vocab in [(2, 100)] if bench.toy else [(1, 131072), (64, 131072), (256, 32768)]:
        num_bytes = rows * vocab * 2
        inputs = [bench.randn(rows, vocab) for _ in range(bench.copies(num_bytes))]
        ones = torch.ones(rows, device=bench.device)
        options: dict[str, Any] = {
            "temperature": ones,
            "seeds": ones.long(),
            "positions": ones.long(),
        }
        filters = {"top_k": ones.long() * 50, "top_p": ones * 0.9}
        yield Case(
            "sample", f"{rows} x {vocab}", [lambda x=x, o=options: sample(x, **o) for x in inputs],
            {"torch softmax, multinomial": [
                lambda x=x: torch.multinomial(torch.softmax(x.float(), -1), 1) for x in inputs
            ]},
            num_bytes=num_bytes,
        )  # fmt: skip
        yield Case(
            "sample top-k top-p", f"{rows} x {vocab}",
            [lambda x=x, o=options | filters: sample(x, **o) for x in inputs],
            {"torch sort": [lambda x=x: torch.sort(x, descending=True) for x in inputs]},
            num_bytes=num_bytes,
        )  # fmt: skip


def gemm_cases(bench: Bench) -> Iterator[Case]:
    shapes = [(4096, 4096), (28672, 4096), (4096, 14336)]
    rows_grid = [1, 16, 64]
    if bench.toy:
        shapes, rows_grid = [(40, 128)], [3]
    formats: dict[str, tuple[Any, float]] = {
        "bf16": (None, 2),
        "int8": (quantize_int8, 1),
        "fp8": (quantize_fp8, 1),
        "int4": (quantize_int4, 0.5 + 8 / 128),
    }
    if not bench.toy and torch.cuda.get_device_capability() < (8, 9):
        del formats["fp8"]
    for n, k in shapes:
        for name, (quantize, width) in formats.items():
            num_bytes = n * k * width
            dense = [bench.randn(n, k) for _ in range(bench.copies(num_bytes))]
            weights = dense if quantize is None else [quantize(w) for w in dense]
            for rows in rows_grid:
                x = bench.randn(rows, k)
                yield Case(
                    f"skinny_gemm {name}", f"{rows} x {n} x {k}",
                    [lambda w=w, x=x: _gemm(x, w) for w in weights],
                    {"torch linear, bf16": [
                        lambda w=w, x=x: functional.linear(x, w) for w in dense
                    ]},
                    num_bytes=num_bytes,
                )  # fmt: skip


def block_cases(bench: Bench) -> Iterator[Case]:
    count, shape = (2, (2, 64, 16)) if bench.toy else (1024, (8, 64, 128))
    cache = bench.randn(2 * count, *shape)
    ids = torch.randperm(2 * count, device=bench.device)[:count]
    num_bytes = 2 * count * cache[0].numel() * 2
    taken = cache[:count].clone()
    others = torch.ones(2 * count, dtype=torch.bool, device=bench.device)
    others[ids] = False
    free = torch.arange(2 * count, device=bench.device)[others]
    size = f"{count} blocks, {PROGRAMS} programs"
    yield Case(
        "kv_block_gather", size, [lambda: kv_block_gather(cache, ids)],
        {"torch index": [lambda: cache[ids]]}, num_bytes=num_bytes,
    )  # fmt: skip
    yield Case(
        "kv_block_scatter", size, [lambda: kv_block_scatter(taken, cache, ids)],
        {"torch index_copy_": [lambda: cache.index_copy_(0, ids, taken)]}, num_bytes=num_bytes,
    )  # fmt: skip
    yield Case(
        "kv_block_copy", size, [lambda: kv_block_copy(cache, ids, free)], {}, num_bytes=num_bytes,
    )  # fmt: skip


def sparse_cases(bench: Bench) -> Iterator[Case]:
    num_seqs, length, heads, kv_heads, dim, kept = (8, 32768, 32, 8, 128, 64)
    if bench.toy:
        num_seqs, length, heads, kv_heads, dim, kept = 2, 130, 4, 2, 32, 2
    cache = paged(bench, num_seqs, length, kv_heads, dim)
    q = bench.randn(num_seqs, heads, dim)
    blocks = cache[0].shape[0]
    low = bench.randn(blocks, kv_heads, dim, dtype=torch.float32)
    size = f"{num_seqs} x {length}"
    yield Case(
        "page_scores", size, [lambda: page_scores(q, low, low, *cache[2:])], {},
        num_bytes=2 * blocks * kv_heads * dim * 4,
    )  # fmt: skip
    pages = torch.stack([
        torch.randperm(cache[2].shape[1], device=bench.device)[:kept]
        for _ in range(num_seqs * kv_heads)
    ]).view(num_seqs, kv_heads, kept).to(torch.int32)  # fmt: skip
    yield Case(
        "page_list_attention", f"{size}, {kept} pages",
        [lambda: page_list_attention(q, *cache, pages, scale=dim**-0.5)], {},
        num_bytes=2 * num_seqs * kept * 64 * kv_heads * dim * 2,
    )  # fmt: skip
    clusters = max(4, length // 20)
    centroids = bench.randn(kv_heads, clusters, dim)
    sizes = torch.ones(kv_heads, clusters, dtype=torch.int32, device=bench.device)
    yield Case(
        "centroid_weights", f"{num_seqs} x {clusters} clusters",
        [lambda: centroid_weights(q, centroids, sizes, scale=dim**-0.5)], {},
        num_bytes=kv_heads * clusters * dim * 2,
    )  # fmt: skip
    listed = kept * 64 if not bench.toy else 70
    keys = torch.randint(0, length, (num_seqs, kv_heads, listed), device=bench.device).int()
    counts = torch.full((num_seqs, kv_heads), listed, dtype=torch.int32, device=bench.device)
    yield Case(
        "key_list_attention", f"{size}, {listed} keys",
        [lambda: key_list_attention(q, *cache, keys, counts, scale=dim**-0.5)], {},
        num_bytes=2 * num_seqs * listed * kv_heads * dim * 2,
    )  # fmt: skip
    window = bench.randn(num_seqs, 4 if bench.toy else 32, heads, dim)
    yield Case(
        "snapkv_votes", size,
        [lambda: snapkv_votes(window, cache[0], *cache[2:], scale=dim**-0.5)], {},
        num_bytes=2 * num_seqs * length * kv_heads * dim * 2,
    )  # fmt: skip


FAMILIES: dict[str, Callable[[Bench], Iterator[Case]]] = {
    "decode": decode_cases,
    "prefill": prefill_cases,
    "elementwise": elementwise_cases,
    "sampler": sampler_cases,
    "gemm": gemm_cases,
    "blocks": block_cases,
    "sparse": sparse_cases,
}


def _flash() -> Any:
    """flash_attn_func where flash-attn is installed, else None."""
    try:
        from flash_attn import flash_attn_func
    except ImportError:
        return None
    return flash_attn_func


def _gemm(x: torch.Tensor, weight: Any) -> torch.Tensor:
    if torch.is_tensor(weight):
        return skinny_gemm(x, weight)
    return skinny_gemm(
        x, weight.data, scales=weight.scales, zeros=weight.zeros, group_size=weight.group_size
    )


def measure(bench: Bench, case: Case, bandwidth: float, matrix_rate: float) -> Row:
    """Time a case and relate it to the ceiling that bounds it."""
    time_us = bench.time_us(case.ours)
    others = {name: bench.time_us(calls) for name, calls in case.others.items()}
    if case.num_flops:
        rate = case.num_flops / (time_us * 1e-6)
        return Row(
            case.kernel, case.size, time_us, rate / 1e12, "TFLOP/s", rate / matrix_rate, others
        )
    rate = case.num_bytes / (time_us * 1e-6)
    return Row(case.kernel, case.size, time_us, rate / 1e9, "GB/s", rate / bandwidth, others)


def main() -> None:
    """Measure, print the table, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--toy", action="store_true", help="tiny shapes in Triton's interpreter")
    parser.add_argument("--only", default=",".join(FAMILIES), help="families, comma-separated")
    parser.add_argument("--results", type=Path, help=f"folder of the JSON file ({RESULTS})")
    arguments = parser.parse_args()
    chosen = arguments.only.split(",")
    unknown = sorted(set(chosen) - set(FAMILIES))
    if unknown:
        parser.error(f"--only names {unknown}; families are {', '.join(FAMILIES)}")
    if not arguments.toy and not torch.cuda.is_available():
        parser.error("no GPU is visible; use --toy to try the script in Triton's interpreter")

    torch.manual_seed(0)
    bench = Bench(arguments.toy)
    bandwidth, matrix_rate = bench.copy_bandwidth(), bench.matrix_rate()
    device = "interpreter" if arguments.toy else torch.cuda.get_device_name()
    print(
        f"{device}: copy {bandwidth / 1e9:.0f} GB/s, bf16 matmul {matrix_rate / 1e12:.1f} TFLOP/s"
    )
    header = f"{'kernel':<30}{'size':<24}{'us':>10}{'rate':>16}{'of ceiling':>12}  others (us)"
    print(header + "\n" + "-" * len(header))
    rows = []
    for family in chosen:
        for case in FAMILIES[family](bench):
            row = measure(bench, case, bandwidth, matrix_rate)
            rows.append(row)
            others = ", ".join(f"{name} {value:.1f}" for name, value in row.others_us.items())
            print(
                f"{row.kernel:<30}{row.size:<24}{row.time_us:>10.1f}"
                f"{row.rate:>9.1f} {row.unit:<7}{row.fraction_of_ceiling:>11.0%}  {others}"
            )
    if arguments.toy:
        print("toy run: the script works; these times say nothing about the kernels")
    folder = arguments.results or (None if arguments.toy else RESULTS)
    if folder is None:
        return
    import triton

    date = datetime.date.today().isoformat()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"kernels-{device.replace(' ', '-').lower()}-{date}.json"
    report = {
        "device": device,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "copy_bytes_per_s": bandwidth,
        "matmul_flops_per_s": matrix_rate,
        "rows": [asdict(row) for row in rows],
    }
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
