"""What graded answers say to do with a pair of tiers: one decision and its sentence, from numbers.

Three questions in this order. Is the gap in quality distinguishable from zero? Is it worth its
price? Is *which* prompts need the dearer tier predictable? Training, evaluation, grading and the
Router's status all ask :func:`judge`; nothing else decides. It is pure: the numbers come from
:mod:`.evidence`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np

from tandem_router.predictor.linear_algebra import FloatArray

PREDICTOR = "predictor"
ORACLE = "oracle"
RANDOM = "random"
#: Rows that must grade both tiers of a pair before it is judged.
MIN_ROWS = 5
#: Quality nobody is asked to miss: half a point of a hundred.
TOLERANCE = 0.005
#: What doubling the price has to bring: a point of a hundred. Sixteen times the price is worth four
#: points; who thinks otherwise reads the price of a point in the sentence.
POINT_PER_DOUBLING = 0.01

Report = dict[str, Any]


class Decision(StrEnum):
    """What to do with the requests of a pair of tiers."""

    CHEAP = "all to the cheaper tier"
    DEAR = "all to the dearer tier"
    ROUTE = "route"


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number measured on a sample, with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known of a pair. Money in US dollars per request, None where nobody gave prices.

    `saved` is the share of the dearer tier's cost (of its calls, without money) that routing saves
    at no more than :data:`TOLERANCE` below that tier alone, with a threshold chosen on other rows
    than it is measured on; `mixed` what sending a random share to the cheaper tier saves at the
    same drop. `apgr` and `saved` are None before anything has been predicted.
    """

    cheap: str
    dear: str
    num_rows: int
    cheap_quality: float
    dear_quality: float
    gap: Estimate  # quality of the dearer less that of the cheaper
    usd: tuple[float, float] | None = None
    apgr: Estimate | None = None
    saved: Estimate | None = None
    mixed: float = 0.0

    @property
    def price_share(self) -> float | None:
        """The cheaper tier's cost over the dearer one's."""
        if self.usd is None or self.usd[1] <= 0.0:
            return None
        return self.usd[0] / self.usd[1]


@dataclass(frozen=True, slots=True)
class Verdict:
    """The decision for a pair and its sentence.

    `floors`: what each quality floor saves is worth a table. It is where routing pays, and where
    the ranking is better than chance but saves nothing within half a point: who sets a lower floor
    still saves.
    """

    decision: Decision
    sentence: str
    floors: bool = False

    @property
    def routable(self) -> bool:
        return self.decision is Decision.ROUTE


def judge(evidence: Evidence) -> Verdict:
    """The one place where a pair's fate is decided."""
    e = evidence
    if e.gap.high < 0.0:
        worse = Estimate(-e.gap.value, -e.gap.high, -e.gap.low)
        return Verdict(
            Decision.CHEAP,
            f"send all to {e.cheap}: {e.dear} is worse by {_points(worse)}{_at_price(e)} "
            f"({_levels(e)})",
        )
    if e.gap.low <= 0.0:
        return Verdict(
            Decision.CHEAP,
            f"send all to {e.cheap}: within {_points(e.gap)} of {e.dear}{_at_price(e)}; "
            f"{_count(e)} do not tell the two apart ({_levels(e)})",
        )
    if e.gap.value <= TOLERANCE:
        return Verdict(
            Decision.CHEAP,
            f"send all to {e.cheap}: {e.dear} is better by {_points(e.gap)}, no more than half a "
            f"point{_at_price(e)} ({_levels(e)})",
        )
    if not _worth_its_price(e):
        return Verdict(
            Decision.CHEAP,
            f"send all to {e.cheap}: within {_points(e.gap)} of {e.dear}{_at_price(e)}; a point of "
            f"quality would cost ${_money(_usd_per_point(e))} per 1,000 requests ({_levels(e)})",
        )
    if e.apgr is None or e.saved is None:
        return Verdict(
            Decision.DEAR,
            f"send all to {e.dear} until a predictor is trained: it is better by "
            f"{_points(e.gap)} ({_levels(e)}); {_mixing(e)}",
        )
    if e.apgr.low <= 0.5 or e.saved.low <= e.mixed:
        what = "nothing is" if e.apgr.low <= 0.5 else "too little is"
        return Verdict(
            Decision.DEAR,
            f"send all to {e.dear}: it is better by {_points(e.gap)}, and {what} predictable of "
            f"which prompts need it (APGR {_three(e.apgr)}, chance .500; within half a point "
            f"routing saves {_percent(e.saved)}, mixing {100 * e.mixed:.0f} %); {_mixing(e)} "
            f"({_levels(e)})",
            floors=e.apgr.low > 0.5,
        )
    what = "calls" if e.usd is None else "cost"
    dollars = ""
    if e.usd is not None:
        whole = 1000.0 * e.usd[1]
        dollars = f", ${_money(e.saved.value * whole)} of ${_money(whole)} per 1,000 requests,"
    return Verdict(
        Decision.ROUTE,
        f"route: saves {_percent(e.saved)} of the {what} of {e.dear}{dollars} at no more than half "
        f"a point below all-{e.dear}; mixing at random would save {100 * e.mixed:.0f} % "
        f"({_levels(e)}; APGR {_three(e.apgr)})",
        floors=True,
    )


def _worth_its_price(e: Evidence) -> bool:
    """Whether the gap is a point for every doubling of the price; yes where nobody gave prices."""
    share = e.price_share
    if share is None or share >= 1.0:
        return True
    return e.gap.value >= POINT_PER_DOUBLING * math.log2(1.0 / max(share, 1e-6))


def _usd_per_point(e: Evidence) -> float:
    assert e.usd is not None
    return 1000.0 * (e.usd[1] - e.usd[0]) / (100.0 * e.gap.value)


def rows_needed(evidence: Evidence) -> int | None:
    """Rows in all until the gap is told from zero, as it looks now; None where it already is."""
    gap = evidence.gap
    if gap.low > 0.0 or gap.high < 0.0:
        return None
    half = max(gap.high - gap.low, 1e-9) / 2.0
    # a gap within the tolerance is settled when its interval is
    wanted = max(abs(gap.value), TOLERANCE)
    return math.ceil(evidence.num_rows * (half / wanted) ** 2)


def _points(gap: Estimate) -> str:
    return f"{_short(gap.value)} ({_short(gap.low)} to {_short(gap.high)})"


def _three(value: Estimate) -> str:
    return f"{_short(value.value)}, {_short(value.low)} to {_short(value.high)}"


def _short(value: float) -> str:
    """A quality as people write it: .906, -.004."""
    shown = f"{value:.3f}"
    return shown.replace("0.", ".", 1) if abs(value) < 0.9995 else shown


def _percent(saved: Estimate) -> str:
    return f"{100 * saved.value:.0f} % ({100 * saved.low:.0f} to {100 * saved.high:.0f})"


def _money(usd: float) -> str:
    if usd >= 100.0:
        return f"{usd:,.0f}"
    return f"{usd:.2f}" if usd >= 0.1 else f"{usd:.2g}"


def _levels(e: Evidence) -> str:
    cheap, dear = _short(e.cheap_quality), _short(e.dear_quality)
    return f"{e.cheap} {cheap}, {e.dear} {dear}, {e.num_rows:,} rows"


def _count(e: Evidence) -> str:
    return f"{e.num_rows:,} graded prompts"


def _at_price(e: Evidence) -> str:
    share = e.price_share
    if share is None or e.usd is None:
        return ""
    shown = f"{100 * share:.0f} %" if share >= 0.01 else f"{100 * share:.1f} %"
    cheap, dear = (_money(1000.0 * usd) for usd in e.usd)
    return f" at {shown} of the price (${cheap} against ${dear} per 1,000 requests)"


def _mixing(e: Evidence) -> str:
    return (
        f"mixing costs {_short(e.gap.value / 10.0)} of quality for every tenth of the requests "
        f"sent to {e.cheap}"
    )


def graded_apart(labels: FloatArray, tiers: Sequence[str]) -> list[str]:
    """A sentence per pair of graded tiers that too few rows grade side by side to be judged."""
    known = ~np.isnan(labels)
    return [
        f"{tiers[first]} and {tiers[second]} are graded side by side on {both} rows, fewer than "
        f"{MIN_ROWS}: whether that pair is worth routing cannot be judged; grade both tiers' "
        "answers to the same prompts"
        for first, second in itertools.combinations(range(len(tiers)), 2)
        if known[:, first].any() and known[:, second].any()
        if (both := int((known[:, first] & known[:, second]).sum())) < MIN_ROWS
    ]
