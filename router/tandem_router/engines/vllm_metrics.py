"""vLLM's `/metrics` read as a load report, and its histograms as a step profile."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_RUNNING, _WAITING = "vllm:num_requests_running", "vllm:num_requests_waiting"
_KV_USE = "vllm:kv_cache_usage_perc"
_KV_USE_V0 = "vllm:gpu_cache_usage_perc"  # up to 0.9
_CONFIG = "vllm:cache_config_info"
_ITL = "vllm:inter_token_latency_seconds"
_TPOT_V0 = "vllm:time_per_output_token_seconds"  # up to 0.10
_PREFILL = "vllm:request_prefill_time_seconds"
_COMPUTED = "vllm:request_prefill_kv_computed_tokens"
_PROMPT = "vllm:request_prompt_tokens"
_TTFT = "vllm:time_to_first_token_seconds"
# Something of these moves while the engine makes progress.
PROGRESS = (
    "vllm:iteration_tokens_total_count",
    "vllm:generation_tokens_total",
    "vllm:prompt_tokens_total",
)
_SUMS = tuple(
    f"{name}{end}"
    for name in (_ITL, _TPOT_V0, _PREFILL, _COMPUTED, _PROMPT, _TTFT)
    for end in ("_sum", "_count")
)
_EXTERNAL = "vllm:external_prefix_cache_hits_total"
_HITS, _QUERIES = "vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total"
_WANTED = frozenset((_RUNNING, _WAITING, _KV_USE, _KV_USE_V0, _CONFIG)) | frozenset(
    (_HITS, _QUERIES, _EXTERNAL, *PROGRESS, *_SUMS)
)
_LABEL = re.compile(r'(\w+)="([^"]*)"')


@dataclass(frozen=True)
class Sample:
    """The wanted values of one reading, summed over engines; absent where the server has none."""

    values: Mapping[str, float]
    block_size: int = 16
    num_blocks: int = 0

    @classmethod
    def parse(cls, text: str) -> Sample:
        """From Prometheus text; lines that cannot be read are left out."""
        values: dict[str, float] = {}
        block_size, num_blocks = 16, 0
        for line in text.splitlines():
            if not line.startswith("vllm:"):
                continue
            name = line[: min(at for at in (line.find("{"), line.find(" "), 1 << 20) if at > 0)]
            if name not in _WANTED:
                continue
            if name == _CONFIG:
                labels = dict(_LABEL.findall(line))
                block_size = _count(labels.get("block_size")) or block_size
                num_blocks += _count(labels.get("num_gpu_blocks"))
                continue
            try:
                value = float(line.rsplit(" ", 1)[-1])
            except ValueError:
                continue
            if math.isfinite(value):
                values[name] = values.get(name, 0.0) + value
        return cls(values, block_size, num_blocks)

    def get(self, name: str) -> float:
        return self.values.get(name, 0.0)

    @property
    def running(self) -> float:
        return self.get(_RUNNING)

    @property
    def missing(self) -> list[str]:
        """What a load report needs and this server does not count, as after a renaming."""
        needed = ((_RUNNING,), (_WAITING,), (_KV_USE, _KV_USE_V0), PROGRESS)
        return [names[0] for names in needed if not any(name in self.values for name in names)]

    @property
    def external_hits(self) -> float:
        """Prompt tokens whose KV came from another server."""
        return self.get(_EXTERNAL)

    @property
    def progress(self) -> float | None:
        """Rises with every step; None where the server counts none of it."""
        found = [self.values[name] for name in PROGRESS if name in self.values]
        return sum(found) if found else None


def _count(text: str | None) -> int:
    return int(text) if text and text.isdigit() else 0


@dataclass
class _Line:
    """Least squares of y over x whose old samples fade."""

    keep: float = 0.98
    sums: list[float] = field(default_factory=lambda: [0.0] * 5)

    def add(self, x: float, y: float, weight: float) -> None:
        new = (weight, weight * x, weight * y, weight * x * x, weight * x * y)
        self.sums = [self.keep * old + add for old, add in zip(self.sums, new, strict=True)]

    def fit(self, through_origin: bool) -> tuple[float, float] | None:
        """(constant, slope), neither below zero; of one x only, `through_origin` says which."""
        n, x, y, xx, xy = self.sums
        if n <= 0.0:
            return None
        spread = n * xx - x * x
        if spread > 1e-6 * n * xx:
            slope = max(0.0, (n * xy - x * y) / spread)
            constant = (y - slope * x) / n
            if constant >= 0.0:
                return constant, slope
            return 0.0, max(0.0, xy / xx)
        return (0.0, xy / xx) if through_origin and xx > 0.0 else (y / n, 0.0)


class StepProfile:
    """Fits `docs/contract.md`'s profile from how vLLM's histograms grow between readings.

    A decode step's time is the time between two tokens of a request, over the requests that ran;
    prefill's is what it took per request, over the tokens computed. Neither tells the part of the
    context, so that coefficient is 0.
    """

    def __init__(self) -> None:
        self._before: Sample | None = None
        self._decode = _Line()
        self._prefill = _Line()
        self.step_time_s: float | None = None

    def add(self, now: Sample) -> None:
        before, self._before = self._before, now
        if before is None:
            return
        itl = _ITL if f"{_ITL}_count" in now.values else _TPOT_V0
        num, time_s = _grown(before, now, itl)
        if num > 0:
            self.step_time_s = time_s / num
            batch = max(1.0, (before.running + now.running) / 2)
            self._decode.add(batch, time_s / num, num)
        num, time_s = _grown(before, now, _PREFILL)
        length = _COMPUTED if f"{_COMPUTED}_count" in now.values else _PROMPT
        num_lengths, tokens = _grown(before, now, length)
        if num > 0 and num_lengths > 0 and tokens > 0:
            self._prefill.add(tokens / num_lengths, time_s / num, num)

    def report(self) -> dict[str, list[float] | None] | None:
        prefill = self._prefill.fit(through_origin=True)
        decode = self._decode.fit(through_origin=False)
        if prefill is None and decode is None:
            return None
        return {
            "prefill": None if prefill is None else [prefill[0], prefill[1], 0.0],
            "decode": None if decode is None else [decode[0], 0.0, decode[1]],
        }


def _grown(before: Sample, now: Sample, name: str) -> tuple[float, float]:
    """(count, sum) by which a histogram grew; (0, 0) where it restarted or is gone."""
    count = now.get(f"{name}_count") - before.get(f"{name}_count")
    total = now.get(f"{name}_sum") - before.get(f"{name}_sum")
    known = f"{name}_count" in before.values
    return (count, total) if known and count > 0 and total >= 0 else (0.0, 0.0)


def load_of(sample: Sample, profile: StepProfile) -> dict[str, Any]:
    """The numbers of a load report."""
    waiting = sample.get(_WAITING)
    num_prompts = sample.get(f"{_PROMPT}_count")
    mean_prompt = sample.get(f"{_PROMPT}_sum") / num_prompts if num_prompts else 0.0
    use = sample.values.get(_KV_USE, sample.values.get(_KV_USE_V0, 0.0))
    # A server that does not say how many blocks it has still says which part of them is used.
    total = sample.num_blocks or 1000
    used = min(total, round(total * min(1.0, max(0.0, use))))
    report: dict[str, Any] = {
        "num_running": int(sample.running),
        "num_waiting": int(waiting),
        "pending_prefill_tokens": int(waiting * mean_prompt),
        "kv_blocks": {"total": total, "free": total - used, "cached": 0, "used": used},
        "block_size": sample.block_size,
        "step_time_s": profile.step_time_s,
        "profile": profile.report(),
    }
    if queries := sample.get(_QUERIES):
        report["prefix_hit_rate"] = sample.get(_HITS) / queries
    if num_first := sample.get(f"{_TTFT}_count"):
        report["mean_ttft_s"] = sample.get(f"{_TTFT}_sum") / num_first
    return report
