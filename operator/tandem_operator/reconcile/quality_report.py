"""What router pods report of quality in `GET /admin/state`, as the facts of a status."""

from __future__ import annotations

import math
from collections.abc import Iterable

from tandem_operator.plan.router_facts import QualityFacts, RetrainingFacts
from tandem_operator.resources.base import Object
from tandem_operator.resources.timestamps import timestamp


def quality_facts(states: list[Object]) -> QualityFacts | None:
    """What the pod says that knows most labels, and what is wrong with any.

    None where none learns or has labels.
    """
    known = [state for state in states if isinstance(state.get("quality"), dict)]
    if not known:
        return None
    most = max(known, key=lambda state: int(state["quality"].get("num_labels") or 0))
    quality, learning = most["quality"], most.get("learning") or {}
    if not learning.get("shadow_share") and not quality.get("labels_by_source"):
        return None
    changes = quality.get("changes") or []
    change = changes[-1] if changes else None
    closed = learning.get("closed") or {}
    judges = [(s.get("learning") or {}).get("judge") or {} for s in (most, *known)]
    return QualityFacts(
        measured=_number(quality.get("measured")),
        low=_number(quality.get("low")),
        high=_number(quality.get("high")),
        num_labels=int(quality.get("num_labels") or 0),
        since=_number(quality.get("since")),
        cost_usd=max(_number((s.get("learning") or {}).get("cost_usd")) or 0.0 for s in known),
        drift=_drift(change) if change is not None else "",
        rose=change is not None and change.get("rose") is True,
        drifted_at=_number(change.get("at")) if change is not None else None,
        disagreement=_disagreement([s["quality"] for s in known]),
        judge_error=_first(judge.get("error") for judge in judges),
        labels_error=_first(s["quality"].get("error") for s in (most, *known)),
        cap_error=_cap_error(learning),
        paused="; ".join(dict.fromkeys(map(str, closed.values())))[:900],
    )


def retraining_facts(states: list[Object]) -> RetrainingFacts | None:
    """What the pod says that decides about predictors trained from labels; else any that can."""
    found = [s["retraining"] for s in states if isinstance(s.get("retraining"), dict)]
    if not found:
        return None
    state = next((one for one in found if one.get("leads")), found[0])
    test = state.get("comparison") or {}
    comparison = ""
    if test:
        # Rounded, so that not every label writes the status.
        tens = int(test.get("num_labels") or 0) // 10 * 10
        other = state.get("candidate") or state.get("predecessor")
        smaller = _number(test.get("smaller_error")) or 0.0
        size = f"{abs(smaller):.3f} {'larger' if smaller < 0.0 else 'smaller'}"
        comparison = f"{other}: squared error {size} over {tens}+ labels"
    return RetrainingFacts(
        str(state.get("candidate") or ""),
        comparison,
        _changes(found),
        str(state.get("problem") or ""),
        str(state.get("run") or "")[:32],
    )


def _changes(retrainings: list[Object]) -> tuple[str, ...]:
    """What happened by the word of every pod, oldest first: one may not know yet what one did."""
    steps = [step for one in retrainings for step in one.get("steps") or []]
    steps.sort(key=lambda step: _number(step.get("at")) or 0.0)
    texts = (
        f"{timestamp(_number(step.get('at')) or 0.0)} {step.get('kind')} {step.get('version')}: "
        f"{step.get('why')}"[:1024]
        for step in steps
    )
    return tuple(dict.fromkeys(texts))


def _first(texts: Iterable[object]) -> str:
    return next((str(text) for text in texts if text), "")[:900]


def _disagreement(qualities: list[Object]) -> str:
    """In words, where what one pod measured is surely not what another did."""
    found = []
    for quality in qualities:
        ratio, low, high = (_number(quality.get(name)) for name in ("measured", "low", "high"))
        if ratio is not None and low is not None and high is not None:
            found.append((ratio, low, high, int(quality.get("num_labels") or 0)))
    if not found:
        return ""
    worst, best = min(found, key=lambda one: one[2]), max(found, key=lambda one: one[1])
    if worst[2] >= best[1]:
        return ""
    said = [f"{r:.3f} ({lo:.3f}-{hi:.3f}, {num} labels)" for r, lo, hi, num in (worst, best)]
    return f"one router pod measured {said[0]}, another {said[1]}"


def _drift(change: Object) -> str:
    return (
        f"tier {change.get('tier')}: quality of about {change.get('before', 0.0):.2f} became "
        f"{change.get('after', 0.0):.2f}; log of capital {change.get('statistic', 0.0):.1f} "
        f"after {change.get('num_labels')} labels; what was learned before is forgotten"
    )


def _cap_error(learning: Object) -> str:
    spent, cap = _number(learning.get("spent_today_usd")), _number(learning.get("daily_usd"))
    if spent is None or cap is None or not cap > 0.0 or spent < 0.98 * cap:
        return ""
    return f"${spent:.4f} of today's ${cap:.4f} is spent; more tomorrow (UTC)"


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None
