"""Step times of an engine from its measured layers: dense ones by tokens, attention by its batch.

The tables are LLMServingSim's: vLLM 0.19, one layer at a time (`shared/data/perf/vllm_runs`).
Three facts of the engine stand beside them, none of which is fitted to a run:

* a step of decodes is padded to the next captured CUDA graph;
* prompts and decodes of a step share one attention kernel, which takes up to 1.7 times as long as
  the two alone; the table has such mixed batches;
* one context that is longer than the others ends after them. The kernel does not split contexts
  once its blocks fill the device (FlashAttention: four fifths of two blocks a multiprocessor), and
  the longest one's rest then runs alone. The table of unequal batches has what a token of it costs.
"""

from __future__ import annotations

import csv
import heapq
import math
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PER_LAYER = ("qkv_proj", "rotary_emb", "o_proj", "gate_up_proj", "act_fn", "down_proj")
CAPTURED = (1, 2, 4, *range(8, 257, 8), *range(272, 513, 16))
"""Batches that vLLM 0.19 captures as CUDA graphs, as the runs' own configuration lists them."""

Line = tuple[Sequence[float], Sequence[float]]
Axis = tuple[Sequence[float], Sequence[Any]]


@dataclass(frozen=True)
class Device:
    """What a data sheet says of a device.

    Attributes:
        multiprocessors: Streaming multiprocessors.
        bytes_per_s: Memory bandwidth.
        flops: Dense 16-bit matrix rate with 32-bit sums.
    """

    multiprocessors: int
    bytes_per_s: float
    flops: float


DEVICES = {
    "RTXPRO6000": Device(188, 1597e9, 503.8e12),
    "RTX4090": Device(128, 1008e9, 165.2e12),
}
LLAMA_8B = {"qkv_proj": 6144 * 4096, "o_proj": 4096**2, "gate_up_proj": 28672 * 4096,
            "down_proj": 14336 * 4096}  # fmt: skip
"""Weights of a layer's matrices, Llama-3.1-8B."""


class LayerTables:
    """Times of one model's layers on one device, seconds.

    Args:
        folder: With dense.csv, per_sequence.csv, attention.csv and skew_fit.csv.
        device: Where they were measured.
        num_layers: Of the whole model.
        num_kv_heads: Of the whole model.
    """

    link_latency_s = 0.0

    def __init__(
        self, folder: Path, device: Device, *, num_layers: int = 32, num_kv_heads: int = 8
    ) -> None:
        self._num_layers = num_layers
        self._dense = _table(folder / "dense.csv")
        self._per_sequence = _table(folder / "per_sequence.csv")
        grid: dict[int, dict[int, dict[int, list[tuple[float, float]]]]] = {}
        with (folder / "attention.csv").open(newline="") as f:
            for row in csv.DictReader(f):
                chunk, start, decodes, context = (
                    int(row[c]) for c in ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode")
                )
                rows = grid.setdefault(chunk, {}).setdefault(decodes, {}).setdefault(start, [])
                rows.append((context, float(row["time_us"])))
        self._attention: Axis = _axis({
            chunk: _axis({
                decodes: _axis({start: _line(rows) for start, rows in starts.items()})
                for decodes, starts in by_decodes.items()
            })
            for chunk, by_decodes in grid.items()
        })  # fmt: skip
        self._known_us: dict[int, float] = {}
        self._unsplit_from = 0.8 * 2 * device.multiprocessors / num_kv_heads
        self._tails = self._token_costs(folder / "skew_fit.csv")

    # -- the step model --------------------------------------------------------------------------

    def step_s(
        self,
        chunks: Sequence[tuple[int, int]],
        contexts: Sequence[int] = (),
    ) -> float:
        """See `tandem_operator.simulate.profiles.StepModel`."""
        padded = self._padded(len(contexts) + sum(length for _, length in chunks))
        layer = self._dense_us(padded) + self.attention_us(chunks, contexts)
        sequences = len(contexts) + len(chunks)
        ends = self._at("embedding", padded) + self._at("final_layernorm", padded)
        ends += sum(_at(line, sequences) for line in self._per_sequence.values())
        return (self._num_layers * layer + ends) / 1e6

    def decode_line(self, num_decodes: int, decode_context: int) -> None:
        """Steps are not linear in the context."""
        return

    def _padded(self, num_tokens: int) -> int:
        if num_tokens > CAPTURED[-1]:
            return num_tokens
        return CAPTURED[bisect_left(CAPTURED, num_tokens)]

    def _at(self, layer: str, num_tokens: float) -> float:
        return _at(self._dense[layer], num_tokens)

    def _dense_us(self, num_tokens: int) -> float:
        found = self._known_us.get(num_tokens)
        if found is None:
            found = sum(self._at(name, num_tokens) for name in (*PER_LAYER, *["layernorm"] * 2))
            self._known_us[num_tokens] = found
        return found

    # -- attention -------------------------------------------------------------------------------

    def attention_us(self, chunks: Sequence[tuple[int, int]], contexts: Sequence[int]) -> float:
        """One layer's attention over a step's batch."""
        num_decodes = len(contexts)
        context = sum(contexts) / num_decodes if contexts else 0.0
        ordered = sorted(chunks, key=lambda c: c[1], reverse=True)
        start, length = ordered[0] if ordered else (0, 0)
        found = self._batch_us(length, num_decodes, start, context)
        launch = self._batch_us(16, 0, 0, 0.0)
        for start, length in ordered[1:]:
            found += max(0.0, self._batch_us(length, 0, start, 0.0) - launch)
        if num_decodes > 1:
            alone = self._tail_us(sum(c[1] for c in chunks), num_decodes)
            found += _tail(contexts, alone, found / sum(contexts))
        return found

    def _batch_us(self, chunk: float, decodes: float, start: float, context: float) -> float:
        return _between(self._attention, (chunk, decodes, start, context))

    def _token_costs(self, path: Path) -> dict[int, dict[int, float]]:
        """Microseconds that a token of the longest context costs, by (prompt tokens, decodes).

        From batches of one context of 4,096 tokens beside ones of 1,024, with the published share
        of the way from "all as the mean" to "all as the longest".
        """
        found: dict[int, dict[int, float]] = defaultdict(dict)
        with path.open(newline="") as f:
            for row in csv.DictReader(f):
                known = row["skew_rate_label"], row["kv_big_label"], row["kp_label"]
                decodes = int(row["n_label"].lstrip("n<=>"))
                if known != ("sr<=5%", "kvB<=4k", "kp=0") or decodes > 256:
                    continue
                mean = 1024 + 3072 / decodes
                chunk = int(row["pc"])
                wider = self._batch_us(chunk, decodes, 0, 4096)
                wider -= self._batch_us(chunk, decodes, 0, mean)
                found[chunk][decodes] = max(0.0, float(row["alpha"]) * wider / (4096 - mean))
        return dict(found)

    def _tail_us(self, num_prompt_tokens: int, num_decodes: int) -> float:
        if num_prompt_tokens == 0 and num_decodes < self._unsplit_from:
            return 0.0
        chunks = sorted(self._tails)
        chunk = chunks[min(bisect_left(chunks, num_prompt_tokens), len(chunks) - 1)]
        costs = self._tails[chunk]
        first = 64 if num_prompt_tokens == 0 else min(costs)
        return _at(_line(list(costs.items())), max(num_decodes, first))


class OtherDevice(LayerTables):
    """A device that nobody measured: another one's tables and both data sheets.

    What memory bounds takes longer by the ratio of bandwidths; a product takes at least its
    operations at the data sheet's rate.
    """

    def __init__(
        self, folder: Path, measured: Device, wanted: Device, matrices: Mapping[str, int]
    ) -> None:
        self._slower = measured.bytes_per_s / wanted.bytes_per_s
        self._matrices, self._flops = matrices, wanted.flops
        super().__init__(folder, wanted)

    def _at(self, layer: str, num_tokens: float) -> float:
        found = super()._at(layer, num_tokens)
        if layer not in self._matrices:
            return self._slower * found
        # Beyond 1.3 times the weights' own time the measured device was bound by its products.
        memory = min(found, 1.3 * super()._at(layer, 1))
        products = 2e6 * num_tokens * self._matrices[layer] / self._flops
        return max(self._slower * memory, products)

    def attention_us(self, chunks: Sequence[tuple[int, int]], contexts: Sequence[int]) -> float:
        return self._slower * super().attention_us(chunks, contexts)


class TensorParallel(LayerTables):
    """Devices that share each layer and add up what they have twice in it, over a link.

    Args:
        hidden_size: Numbers of a token that are added, of 16 bits.
        link_bytes_per_s: Of the link, with its latency.
    """

    def __init__(
        self, folder: Path, device: Device, *, num_layers: int, num_kv_heads: int,
        hidden_size: int, link_bytes_per_s: float, link_latency_s: float,
    ) -> None:  # fmt: skip
        super().__init__(folder, device, num_layers=num_layers, num_kv_heads=num_kv_heads)
        self._latency_us = 1e6 * link_latency_s
        self._token_us = 1e6 * 2 * hidden_size / link_bytes_per_s

    def _dense_us(self, num_tokens: int) -> float:
        sums = 2.0 * (self._latency_us + self._token_us * num_tokens)
        return super()._dense_us(num_tokens) + self._at("qk_norm", num_tokens) + sums


def _tail(contexts: Sequence[int], alone_us: float, shared_us: float) -> float:
    """What the longest contexts of a batch take beyond their even share of the bandwidth.

    With j contexts left each is read at no more than its own rate, so that a part of the bandwidth
    is idle: all but j shares.

    Args:
        contexts: Tokens.
        alone_us: What a token of one context that is left alone costs beyond its share.
        shared_us: A token's time at full bandwidth.
    """
    if alone_us <= 0.0:
        return 0.0
    own_us = alone_us + shared_us
    longest = heapq.nlargest(1 + math.ceil(own_us / shared_us), contexts)
    return sum(
        (longest[j - 1] - longest[j]) * max(0.0, own_us - j * shared_us)
        for j in range(1, len(longest))
    )


def _axis(table: Mapping[int, Any]) -> Axis:
    return sorted(table), [table[key] for key in sorted(table)]


def _between(axis: Axis, at: Sequence[float]) -> float:
    """Straight lines between the entries around a point, one axis after another.

    Outside the nearest entry counts. The last axis holds numbers, the others axes.
    """
    if len(at) == 1:
        return _at(axis, at[0])
    keys, entries = axis
    x, rest = at[0], at[1:]
    i = bisect_right(keys, x)
    if i == 0 or i == len(keys) or x == keys[i - 1]:
        return _between(entries[max(0, i - 1)], rest)
    part = (x - keys[i - 1]) / (keys[i] - keys[i - 1])
    return (1.0 - part) * _between(entries[i - 1], rest) + part * _between(entries[i], rest)


def _table(path: Path) -> dict[str, Line]:
    rows: dict[str, list[tuple[float, float]]] = defaultdict(list)
    with path.open(newline="") as f:
        for name, x, y in list(csv.reader(f))[1:]:
            rows[name].append((float(x), float(y)))
    return {name: _line(points) for name, points in rows.items()}


def _line(points: Sequence[tuple[float, float]]) -> Line:
    ordered = sorted(points)
    return [x for x, _ in ordered], [y for _, y in ordered]


def _at(line: Line, x: float) -> float:
    xs, ys = line
    i = bisect_right(xs, x)
    if i == 0:
        return ys[0]
    if i == len(xs):
        return ys[-1]
    return ys[i - 1] + (ys[i] - ys[i - 1]) * (x - xs[i - 1]) / (xs[i] - xs[i - 1])
