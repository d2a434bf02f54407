"""From what routers and workers report to what the control loop reads.

Input is decoded JSON of other processes (`GET /admin/state` of router pods, `GET /v1/load` of
worker pods), so nothing in it is trusted: a part that is missing or odd reads as not measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tandem_operator.autoscale.profile import Load, PerformanceProfile
from tandem_operator.autoscale.sizing import Operating, Role

# E[L^2] over E[L]^2 where only means are counted: between Azure's conversations (2.5) and code
# (1.9), 2023.
PROMPT_SPREAD = 2.2
DEFAULT_MAX_NUM_SEQS = 256
# A request that is held counts as one arrival in this time, seconds.
HELD_S = 60.0


@dataclass(frozen=True, slots=True)
class _Totals:
    num_requests: float
    prompt_tokens: float
    output_tokens: float


class TrafficMeter:
    """Turns running totals of router pods into rates.

    Totals are kept per pod, so that a pod that comes, goes or restarts is not read as traffic.
    """

    def __init__(self) -> None:
        self._before: dict[str, _Totals] = {}
        self._at_s: float | None = None
        self._shape = (0.0, 0.0)
        self._held = 0.0

    def read(self, now: float, states: Mapping[str, Any]) -> Load | None:
        """Load since the last reading; None for the first one, or when no router answers.

        Args:
            now: clock, seconds.
            states: `/admin/state` by pod name and start, so that a restarted pod is another key.
        """
        totals = {pod: found for pod, s in states.items() if (found := _totals(s)) is not None}
        before, at_s = self._before, self._at_s
        self._before, self._at_s = totals, now
        if not totals or at_s is None or now <= at_s:
            return None
        grown = [
            (new, before.get(pod, new))
            for pod, new in totals.items()
            if pod not in before or new.num_requests >= before[pod].num_requests
        ]
        requests = sum(new.num_requests - old.num_requests for new, old in grown)
        if requests > 0.0:
            prompt = sum(new.prompt_tokens - old.prompt_tokens for new, old in grown)
            output = sum(new.output_tokens - old.output_tokens for new, old in grown)
            self._shape = (max(0.0, prompt) / requests, max(0.0, output) / requests)
        # Nothing finished, yet requests are held: a pool that sleeps has to wake for them. Each is
        # an arrival once; as long as it waits it is a trace of one.
        held, known = sum(_waiting(state) for state in states.values()), self._held
        self._held = held
        if requests <= 0.0 and held > 0.0:
            requests = max(held - known, held * (now - at_s) / HELD_S)
        mean, answer = self._shape
        return Load(requests / (now - at_s), mean, PROMPT_SPREAD * mean * mean, answer)


def _waiting(state: Any) -> float:
    return (_number(state.get("num_inflight")) or 0.0) if isinstance(state, dict) else 0.0


def _totals(state: Any) -> _Totals | None:
    tiers = state.get("tiers") if isinstance(state, dict) else None
    if not isinstance(tiers, list):
        return None
    sums = [0.0, 0.0, 0.0]
    for tier in tiers:
        for i, name in enumerate(("num_requests", "prompt_tokens", "output_tokens")):
            sums[i] += _number(tier.get(name) if isinstance(tier, dict) else None) or 0.0
    return _Totals(*sums)


def routing_curve(states: Iterable[Any], floor_quality: float = 0.0) -> tuple[Operating, ...]:
    """Operating points of the router pod that has seen most; empty where none has scores."""
    for state in states:
        raw = state.get("curve") if isinstance(state, dict) else None
        points = [_point(entry) for entry in raw] if isinstance(raw, list) else []
        known = tuple(p for p in points if p is not None and p.quality_ratio >= floor_quality)
        if known:
            return known
    return ()


def _point(entry: Any) -> Operating | None:
    if not isinstance(entry, dict) or not isinstance(entry.get("shares"), dict):
        return None
    threshold, ratio = _number(entry.get("threshold")), _number(entry.get("quality_ratio"))
    shares = {str(tier): _number(share) for tier, share in entry["shares"].items()}
    if threshold is None or ratio is None or not shares:
        return None
    known = {tier: share for tier, share in shares.items() if share is not None and share >= 0.0}
    if len(known) < len(shares):
        return None
    return Operating(threshold, known, ratio)


def current_threshold(states: Iterable[Any]) -> float | None:
    """The gain threshold in force at the routers."""
    for state in states:
        points = state.get("set_points") if isinstance(state, dict) else None
        value = _number(points.get("gain_threshold")) if isinstance(points, dict) else None
        if value is not None:
            return value
    return None


def performance_profile(
    loads: Iterable[Any], max_num_seqs: int = DEFAULT_MAX_NUM_SEQS
) -> PerformanceProfile | None:
    """Mean profile of a tier's workers (`/v1/load` bodies); None until one of each kind reports.

    Prefill and decode workers each know one half of it.
    """
    halves: dict[str, list[tuple[float, float, float]]] = {"prefill": [], "decode": []}
    kv_tokens: list[float] = []
    for load in loads:
        if not isinstance(load, dict):
            continue
        profile = load.get("profile")
        for half, found in halves.items():
            numbers = profile.get(half) if isinstance(profile, dict) else None
            if isinstance(numbers, list) and len(numbers) == 3:
                values = [_number(value) for value in numbers]
                if all(value is not None and value >= 0.0 for value in values):
                    found.append((values[0] or 0.0, values[1] or 0.0, values[2] or 0.0))
        blocks = load.get("kv_blocks")
        total = _number(blocks.get("total")) if isinstance(blocks, dict) else None
        if total and load.get("role") != "prefill":
            kv_tokens.append(total * (_number(load.get("block_size")) or 64.0))
    if not halves["prefill"] or not halves["decode"] or not kv_tokens:
        return None
    prefill, decode = (_mean(halves[half]) for half in ("prefill", "decode"))
    return PerformanceProfile(prefill, decode, int(min(kv_tokens)), max_num_seqs)


def pool_signals(loads: Iterable[Any]) -> dict[str, float]:
    """Means per worker of the signals an AutoscalingPolicy may name; absent where unmeasured."""
    sums: dict[str, list[float]] = {}
    for load in loads:
        if not isinstance(load, dict):
            continue
        running, pending = (
            _number(load.get("num_running")),
            _number(load.get("pending_prefill_tokens")),
        )
        blocks = load.get("kv_blocks")
        total = _number(blocks.get("total")) if isinstance(blocks, dict) else None
        used = _number(blocks.get("used")) if isinstance(blocks, dict) else None
        if running is not None:
            sums.setdefault("RunningRequests", []).append(running)
        if pending is not None:
            sums.setdefault("PendingPrefillTokens", []).append(pending)
        if total and used is not None:
            sums.setdefault("KVUtilization", []).append(used / total)
    return {name: sum(values) / len(values) for name, values in sums.items()}


def by_pool(
    loads: Iterable[tuple[str, Any]],
) -> dict[tuple[str, Role], list[Any]]:
    """Worker loads grouped by (tier, role); `loads` pairs each body with its tier's name."""
    found: dict[tuple[str, Role], list[Any]] = {}
    for tier, load in loads:
        role = load.get("role") if isinstance(load, dict) else None
        if role == "prefill" or role == "decode" or role == "unified":
            found.setdefault((tier, role), []).append(load)
    return found


def _mean(rows: list[tuple[float, float, float]]) -> tuple[float, float, float]:
    a, b, c = (sum(column) / len(rows) for column in zip(*rows, strict=True))
    return a, b, c


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None
