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
# Lengths differ by their own mean and more from request to request.
REQUESTS_OF_A_MEAN = 200.0


@dataclass(frozen=True, slots=True)
class Traffic:
    """What routers were asked since the last reading.

    Attributes:
        load: All arrivals, with the shape of recent requests.
        arrived: Requests by the tier that they wanted, ready or not.
        held: Requests that wait at the routers for a worker now, by tier.
        num_refused: Requests sent away for want of capacity.
    """

    load: Load
    arrived: Mapping[str, float]
    held: Mapping[str, float]
    num_refused: float = 0.0


@dataclass(frozen=True, slots=True)
class _Totals:
    arrived: Mapping[str, float]
    prompt_tokens: float  # of arrivals
    refused: float
    served: float
    output_tokens: float  # of what was served


class TrafficMeter:
    """Turns running totals of router pods into what was asked of them.

    Arrivals are counted, never completions: a pool that cannot keep up completes what it can,
    whatever is asked of it. Totals are kept per pod, so that a pod that comes, goes or restarts is
    not read as traffic.
    """

    def __init__(self) -> None:
        self._before: dict[str, _Totals] = {}
        self._at_s: float | None = None
        self._prompt = self._output = 0.0

    def read(self, now: float, states: Mapping[str, Any]) -> Traffic | None:
        """Traffic since the last reading; None for the first one, or when no router answers.

        Args:
            now: clock, seconds.
            states: `/admin/state` by pod name and start, so that a restarted pod is another key.
        """
        totals = {pod: found for pod, s in states.items() if (found := _totals(s)) is not None}
        before, at_s = self._before, self._at_s
        self._before, self._at_s = totals, now
        if not totals or at_s is None or now <= at_s:
            return None
        # A pod seen for the first time may have served long before: it counts from here on.
        grown = [(new, before.get(pod, new)) for pod, new in totals.items()]
        pairs = [(new, old) for new, old in grown if _went_on(new, old)]
        arrived: dict[str, float] = {}
        for new, old in pairs:
            for tier, count in new.arrived.items():
                more = count - old.arrived.get(tier, 0.0)
                arrived[tier] = arrived.get(tier, 0.0) + max(0.0, more)
        requests = sum(arrived.values())
        if requests > 0.0:
            prompt = sum(new.prompt_tokens - old.prompt_tokens for new, old in pairs)
            self._prompt = _mixed(self._prompt, max(0.0, prompt) / requests, requests)
        served = sum(new.served - old.served for new, old in pairs)
        if served > 0.0:
            output = sum(new.output_tokens - old.output_tokens for new, old in pairs)
            self._output = _mixed(self._output, max(0.0, output) / served, served)
        held: dict[str, float] = {}
        for state in states.values():
            for tier, row in _tiers(state).items():
                held[tier] = held.get(tier, 0.0) + (_number(row.get("num_held")) or 0.0)
        mean = self._prompt
        load = Load(requests / (now - at_s), mean, PROMPT_SPREAD * mean * mean, self._output)
        refused = sum(max(0.0, new.refused - old.refused) for new, old in pairs)
        return Traffic(load, arrived, held, refused)


def _mixed(before: float, mean: float, count: float) -> float:
    """A mean length over some hundred requests: that of a few seconds is mostly chance."""
    if before <= 0.0:
        return mean
    return before + (1.0 - math.exp(-count / REQUESTS_OF_A_MEAN)) * (mean - before)


def _went_on(new: _Totals, old: _Totals) -> bool:
    return new.served >= old.served and sum(new.arrived.values()) >= sum(old.arrived.values())


def _tiers(state: Any) -> dict[str, Mapping[str, Any]]:
    arrivals = state.get("arrivals") if isinstance(state, dict) else None
    tiers = arrivals.get("tiers") if isinstance(arrivals, dict) else None
    if not isinstance(tiers, dict):
        return {}
    return {str(name): row for name, row in tiers.items() if isinstance(row, dict)}


def _totals(state: Any) -> _Totals | None:
    tiers = state.get("tiers") if isinstance(state, dict) else None
    arrivals = state.get("arrivals") if isinstance(state, dict) else None
    if not isinstance(tiers, list) or not isinstance(arrivals, dict):
        return None
    rows = _tiers(state)
    served = output = 0.0
    for tier in tiers:
        if isinstance(tier, dict):
            served += _number(tier.get("num_requests")) or 0.0
            output += _number(tier.get("output_tokens")) or 0.0
    return _Totals(
        arrived={name: _number(row.get("num_arrived")) or 0.0 for name, row in rows.items()},
        prompt_tokens=sum(_number(row.get("prompt_tokens")) or 0.0 for row in rows.values()),
        refused=_number(arrivals.get("num_refused")) or 0.0,
        served=served,
        output_tokens=output,
    )


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


def asked_threshold(state: Any) -> float | None:
    """The gain threshold that a router was asked for last; its quality floor may hold a lower."""
    return _threshold_part(state, "asked")


def threshold_limit(states: Iterable[Any]) -> float | None:
    """The highest gain threshold that the routers' quality floor lets through; None without one."""
    found = (_threshold_part(state, "limit") for state in states)
    return next((limit for limit in found if limit is not None), None)


def _threshold_part(state: Any, part: str) -> float | None:
    parts = state.get("threshold") if isinstance(state, dict) else None
    return _number(parts.get(part)) if isinstance(parts, dict) else None


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


def num_waiting(loads: Iterable[Any]) -> float:
    """Requests that wait in the queues of these workers."""
    bodies = [load for load in loads if isinstance(load, dict)]
    return sum(_number(load.get("num_waiting")) or 0.0 for load in bodies)


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
    try:
        number = float(value)
    except OverflowError:  # JSON's whole numbers have any length
        return None
    return number if math.isfinite(number) else None
