"""The pair's verdict so far, and about how many more prompts would make it a firm one.

The verdict is that of `tandem train` and `tandem evaluate`, on the evidence of these rows. Whether
it is predictable which prompts need the dearer tier is found by training and judging on parts of
the rows, once there are enough and only where a predictor could change what to do.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tandem_router.predictor.errors import PredictorError
from tandem_router.predictor.evaluation.costs import row_costs
from tandem_router.predictor.evaluation.evidence import PairRows, evidence
from tandem_router.predictor.evaluation.pair_report import in_order
from tandem_router.predictor.evaluation.verdict import (
    Decision,
    Estimate,
    Evidence,
    Verdict,
    judge,
    rows_needed,
)
from tandem_router.predictor.records import dataset
from tandem_router.predictor.training import crossval
from tandem_router.predictor.training.options import Options

MIN_PROMPTS = 20
#: Below this a cross-validated ranking is noise.
MIN_PREDICTED = 100
NUM_FOLDS = 3
#: More prompts than anybody would ask for one verdict.
MANY = 20_000


@dataclass(frozen=True, slots=True)
class PairSoFar:
    """What the rows say of two tiers, the cheaper first.

    `decision` is None before there is one. `more_prompts` is 0 where the evidence is firm, None
    where no sensible number of prompts would make it so.
    """

    cheap: str
    dear: str
    num_prompts: int
    decision: str | None
    sentence: str
    more_prompts: int | None


def verdicts(path: Path, progress: Callable[[str], None]) -> list[PairSoFar]:
    """One for every pair of graded tiers."""
    data = dataset.read_dataset([path])
    labels, groups = data.quality(), data.groups()
    costs = row_costs(data, data.tiers, {})
    gains: dict[tuple[int, int], np.ndarray] | None = None
    found = []
    for one, other in itertools.combinations(range(len(data.tiers)), 2):
        known = np.flatnonzero(~np.isnan(labels[:, one]) & ~np.isnan(labels[:, other]))
        count = len(np.unique(groups[known]))
        if count < MIN_PROMPTS:
            found.append(_too_few(data.tiers[one], data.tiers[other], count))
            continue
        cheap, dear = in_order(labels[known], costs, one, other)
        names = data.tiers[cheap], data.tiers[dear]
        spend = np.tile([0.0, 1.0], (len(known), 1))
        if costs is not None:
            spend = costs[known][:, [cheap, dear]]
        rows = PairRows(labels[known, cheap], labels[known, dear], spend, groups[known])
        seen = evidence(names, rows, costs is not None, None)
        verdict = judge(seen)
        if verdict.decision is Decision.DEAR and count >= MIN_PREDICTED:
            if gains is None:
                gains = _gains(data, progress)
            if (cheap, dear) in gains:
                score = gains[cheap, dear][known]
                seen = evidence(names, rows, costs is not None, score)
                verdict = judge(seen)
        found.append(_so_far(seen, verdict, count))
    return found


def _gains(
    data: dataset.Dataset, progress: Callable[[str], None]
) -> dict[tuple[int, int], np.ndarray]:
    """Per ordered pair of tiers what a predictor that never saw a row says it gains there."""
    progress("judging whether it is predictable which prompts need which tier")
    try:
        predicted = crossval.cross_validate(data, Options(), NUM_FOLDS)
    except PredictorError as error:
        progress(f"that cannot be judged yet: {error}")
        return {}
    order = {tier: predicted.tiers.index(tier) for tier in data.tiers if tier in predicted.tiers}
    return {
        (data.tiers.index(a), data.tiers.index(b)): predicted.gain(order[a], order[b])
        for a, b in itertools.permutations(order, 2)
    }


def _too_few(first: str, second: str, count: int) -> PairSoFar:
    more = MIN_PREDICTED - count
    return PairSoFar(
        first,
        second,
        count,
        None,
        f"{first} and {second}: {count} prompts are graded for both, too few to say anything; "
        f"grade {more} more",
        more,
    )


def _so_far(seen: Evidence, verdict: Verdict, count: int) -> PairSoFar:
    more, open_question = _more(seen, verdict, count)
    sentence = verdict.sentence
    if more:
        sentence += f"; about {more:,} more prompts would say {open_question}"
    elif more is None:
        sentence += f"; no sensible number of prompts would say {open_question}"
    return PairSoFar(seen.cheap, seen.dear, count, verdict.decision.value, sentence, more)


def _more(seen: Evidence, verdict: Verdict, count: int) -> tuple[int | None, str]:
    """About how many more prompts close what is open, as it looks now, and what is open."""
    needed = rows_needed(seen)
    if needed is not None:
        return _rounded(needed - seen.num_rows), "whether the two differ"
    if verdict.decision is not Decision.DEAR:
        return 0, ""
    predictable = "whether routing pays"
    if seen.apgr is None or seen.saved is None:
        return max(0, MIN_PREDICTED - count), predictable
    if seen.apgr.low <= 0.5:
        return _until(seen.apgr, 0.5, seen.num_rows), predictable
    return _until(seen.saved, seen.mixed, seen.num_rows), predictable


def _until(estimate: Estimate, bound: float, num_rows: int) -> int | None:
    """More rows until the interval, shrinking with their root, leaves the bound; 0: it will not."""
    distance = estimate.value - bound
    if distance <= 0:
        return 0
    return _rounded(num_rows * ((estimate.value - estimate.low) / distance) ** 2 - num_rows)


def _rounded(number: float) -> int | None:
    """Two digits say all that such an estimate knows; None beyond what anybody would ask."""
    if number > MANY:
        return None
    whole = max(10, math.ceil(number))
    step = int(10 ** max(1, len(str(whole)) - 2))
    return math.ceil(whole / step) * step
