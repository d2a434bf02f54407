"""What routed answers were worth beside one tier for all: quality, calls, dollars, the floor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tandem_router.grading.errors import GradingError
from tandem_router.grading.progress import dollars
from tandem_router.predictor.evaluation import metrics
from tandem_router.predictor.records.dataset import Dataset, Row

NUM_RESAMPLES = 1000


@dataclass(frozen=True, slots=True)
class Asked:
    """One question that the Router answered: who did, the answer's grade and price."""

    row: Row
    tier: str
    quality: float | None
    cost_usd: float | None


def assess(asked: Sequence[Asked], tiers: Sequence[str], floor: float | None) -> dict[str, Any]:
    """Plain JSON values. Raises GradingError where no question has all the grades it needs.

    The tier with the best mean grade is the yardstick of the floor; intervals are 95 %, from
    resampled groups of questions.
    """
    usable = [tier for tier in tiers if any(tier in each.row.quality for each in asked)]
    whole = [
        each
        for each in asked
        if each.quality is not None and all(tier in each.row.quality for tier in usable)
    ]
    if not whole:
        raise GradingError(
            "no answer could be compared: rows need a grade of every tier, and a reference or the "
            "grade of the tier that answered"
        )
    routed = np.array([each.quality for each in whole], dtype=float)
    grades = {
        tier: np.array([each.row.quality[tier] for each in whole], dtype=float) for tier in usable
    }
    rows = tuple(each.row for each in whole)
    groups = Dataset(rows, tuple(usable), (), "").groups()
    best = max(usable, key=lambda tier: float(grades[tier].mean()))
    drawn = list(metrics.resamples(groups, NUM_RESAMPLES, seed=0))

    def interval(values: np.ndarray) -> list[float] | None:
        found = metrics.interval([float(values[sample].mean()) for sample in drawn])
        return list(found) if found else None

    ratios = [
        float(routed[s].mean() / grades[best][s].mean()) if grades[best][s].mean() > 0 else None
        for s in drawn
    ]
    ratio_interval = metrics.interval(ratios)
    level = float(grades[best].mean())
    costs = _costs(whole, usable)
    calls = Counter(each.tier for each in whole)
    return {
        "questions": len(asked),
        "compared": len(whole),
        "quality": float(routed.mean()),
        "quality_interval": interval(routed),
        "best_tier": best,
        "quality_ratio": float(routed.mean()) / level if level > 0 else None,
        "quality_ratio_interval": list(ratio_interval) if ratio_interval else None,
        "calls": {tier: calls.get(tier, 0) for tier in tiers},
        "calls_saved": len(whole) - calls.get(best, 0),
        "cost_usd": costs["routed"],
        "all": {
            tier: {
                "quality": float(grades[tier].mean()),
                "quality_interval": interval(grades[tier]),
                "cost_usd": costs[tier],
            }
            for tier in usable
        },
        "saved_usd": _difference(costs[best], costs["routed"]),
        "floor": floor,
        "floor_held": _held(floor, ratio_interval),
    }


def _costs(whole: Sequence[Asked], tiers: Sequence[str]) -> dict[str, float | None]:
    """Dollars of the questions whose cost is known for the Router and for every tier alike."""
    known = [
        each
        for each in whole
        if each.cost_usd is not None and all(tier in each.row.cost_usd for tier in tiers)
    ]
    if len(known) < len(whole):
        routed = [each.cost_usd for each in whole if each.cost_usd is not None]
        total = sum(routed) if len(routed) == len(whole) else None
        return {"routed": total, **dict.fromkeys(tiers)}
    found: dict[str, float | None] = {"routed": sum(each.cost_usd or 0.0 for each in known)}
    for tier in tiers:
        found[tier] = sum(each.row.cost_usd[tier] for each in known)
    return found


def _difference(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def _held(floor: float | None, interval: tuple[float, float] | None) -> bool | None:
    """True and False only where the whole interval says so."""
    if floor is None or interval is None:
        return None
    if interval[0] >= floor:
        return True
    return False if interval[1] < floor else None


def lines(found: dict[str, Any]) -> list[str]:
    """The result as a person reads it in a terminal."""
    best, count = found["best_tier"], found["compared"]
    out = [f"{found['router']} answered {found['questions']:,} questions, {count:,} compared"]
    if found["failures"]:
        out.append(f"{found['failures']:,} questions failed, the last: {found['last_failure']}")
    width = max(8, *(len(f"all {tier}") for tier in found["all"]))
    out.append(
        f"{'':<{width}}  {'quality':>7}  {'95 % interval':>14}  {best + ' calls':>14}  {'cost':>9}"
    )
    for name, values, calls in (
        *(
            (f"all {tier}", values, count if tier == best else 0)
            for tier, values in found["all"].items()
        ),
        ("routed", found, found["calls"].get(best, 0)),
    ):
        interval = values["quality_interval"]
        between = f"{interval[0]:.3f} - {interval[1]:.3f}" if interval else "-"
        cost = values["cost_usd"]
        out.append(
            f"{name:<{width}}  {values['quality']:>7.3f}  {between:>14}  {calls / count:>14.1%}  "
            f"{dollars(cost) if cost is not None else 'unknown':>9}"
        )
    saved = f"{found['calls_saved']:,} of {count:,} {best} calls saved"
    if found["saved_usd"] is not None:
        of_all = found["all"][best]["cost_usd"]
        share = f" ({found['saved_usd'] / of_all:.0%})" if of_all else ""
        saved += f", {dollars(found['saved_usd'])}{share} beside all-{best}"
    out.append(saved)
    out.append(_about_floor(found))
    return out


def _about_floor(found: dict[str, Any]) -> str:
    ratio, interval = found["quality_ratio"], found["quality_ratio_interval"]
    best, floor = found["best_tier"], found["floor"]
    if ratio is None:
        return f"{best} answers nothing right, so there is no quality to hold"
    between = f" ({interval[0]:.1%} to {interval[1]:.1%})" if interval else ""
    share = f"{ratio:.1%}{between} of {best}'s quality"
    if floor is None:
        return f"routed answers have {share}; the Router has no quality floor (--floor checks one)"
    if found["floor_held"] is None:
        low = interval[0] if interval else ratio
        more = _more(found["compared"], ratio, low, floor)
        return f"whether the floor of {floor:.1%} held cannot be said yet: {share}{more}"
    held = "held" if found["floor_held"] else "did not hold"
    return f"the floor of {floor:.1%} {held}: {share}"


def _more(count: int, ratio: float, low: float, floor: float) -> str:
    """About how many questions would decide, were the ratio what it looks like."""
    distance, half = abs(ratio - floor), ratio - low
    if distance <= 0 or half <= 0:
        return ""
    needed = count * (half / distance) ** 2
    if needed <= count or needed > 1e6:
        return ""
    return f"; about {int(needed - count) + 1:,} more questions would decide"
