"""The pair's verdict so far, and about how many more prompts a verdict needs.

Three questions in this order: can the tiers' qualities be told apart; and if they can, is it
predictable which prompts need the better one. The second is answered by training and judging on
parts of these very rows, as `tandem train --cross-validate` does.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tandem_router.predictor.errors import PredictorError
from tandem_router.predictor.evaluation.report import make_report
from tandem_router.predictor.training import crossval, dataset
from tandem_router.predictor.training.options import Options

MIN_PROMPTS = 20
#: Below this a cross-validated ranking is noise.
MIN_PREDICTED = 100
NUM_FOLDS = 3
#: An effect is found in four of five repetitions of a study of that size.
_POWER = 1.96 + 0.84
MANY = 20_000


@dataclass(frozen=True, slots=True)
class PairSoFar:
    """What the rows say of two tiers: quality, their gap with interval, and what is still needed.

    `more_prompts` is 0 where the evidence decides, None where no sensible number would.
    """

    first: str
    second: str
    num_prompts: int
    gap: float
    low: float
    high: float
    more_prompts: int | None
    sentence: str


def verdicts(path: Path, progress: Callable[[str], None]) -> list[PairSoFar]:
    """Every pair of graded tiers, the weaker one first."""
    data = dataset.read_dataset([path])
    labels, groups = data.quality(), data.groups()
    found = []
    for one, other in itertools.combinations(range(len(data.tiers)), 2):
        known = ~np.isnan(labels[:, one]) & ~np.isnan(labels[:, other])
        means = labels[known][:, [one, other]].mean(axis=0) if known.any() else (0.0, 0.0)
        first, second = (one, other) if means[0] <= means[1] else (other, one)
        gains = (labels[:, second] - labels[:, first])[known]
        found.append(
            _pair(data.tiers[first], data.tiers[second], gains, groups[known], float(min(means)))
        )
    open_pairs = [pair for pair in found if pair.more_prompts == 0]
    if open_pairs and len(data.rows) >= MIN_PREDICTED:
        found = _with_predictions(data, found, progress)
    return found


def _pair(
    first: str, second: str, gains: np.ndarray, groups: np.ndarray, lower: float
) -> PairSoFar:
    numbers = np.unique(groups, return_inverse=True)[1]
    count = int(numbers.max()) + 1 if len(numbers) else 0
    if count < MIN_PROMPTS:
        return PairSoFar(
            first, second, count, 0.0, -1.0, 1.0, MIN_PREDICTED - count,
            f"{first} and {second}: {count} prompts graded for both, too few to say anything; "
            f"grade {MIN_PREDICTED - count} more",
        )  # fmt: skip
    sizes = np.bincount(numbers)
    gap = float(gains.mean())
    # Rows of a group are one piece of evidence: the spread is of group sums around their share.
    sums = np.bincount(numbers, gains) - gap * sizes
    spread = float(np.sqrt((sums**2).sum() * count / (count - 1)) / len(gains))
    low, high = gap - 1.96 * spread, gap + 1.96 * spread
    levels = (
        f"{second} is better than {first} by {gap:.3f} ({low:.3f} to {high:.3f}) on {count:,} "
        f"prompts, {first} {lower:.3f}, {second} {lower + gap:.3f}"
    )
    if low > 0:
        return PairSoFar(first, second, count, gap, low, high, 0, levels)
    needed = math.inf if gap <= 0 else count * (_POWER * spread / gap) ** 2
    more = _rounded(needed - count)
    if more is None:
        say = f"no sensible number of prompts will tell them apart: take the cheaper one ({levels})"
    else:
        say = (
            f"not told apart yet ({levels}); about {more:,} more prompts would, if the gap is real"
        )
    return PairSoFar(first, second, count, gap, low, high, more, f"{first} and {second}: {say}")


def _rounded(number: float) -> int | None:
    """Two digits say all that such an estimate knows; None beyond what anybody would ask."""
    if number > MANY:
        return None
    whole = max(10, math.ceil(number))
    step = int(10 ** max(1, len(str(whole)) - 2))
    return math.ceil(whole / step) * step


def _with_predictions(
    data: dataset.Dataset, found: list[PairSoFar], progress: Callable[[str], None]
) -> list[PairSoFar]:
    try:
        predictions = crossval.cross_validate(data, Options(), NUM_FOLDS, progress)
        judged = make_report(data, predictions, curves=False)["pairs"]
    except PredictorError as error:
        progress(f"which prompts need which tier could not be judged yet: {error}")
        return found
    told = []
    for pair in found:
        names = (f"{pair.first} -> {pair.second}", f"{pair.second} -> {pair.first}")
        values = next((judged[name] for name in names if name in judged), None)
        told.append(_told(pair, values) if pair.more_prompts == 0 and values else pair)
    return told


def _told(pair: PairSoFar, values: dict[str, object]) -> PairSoFar:
    """The report's sentence; where it is open, about how many prompts would close it."""
    more: int | None = 0
    sentence = f"{values['sentence']} ({pair.sentence})"
    if not values["routable"]:
        own = values["methods"]["predictor"]  # type: ignore[index]
        interval, apgr = own["apgr_interval"], own["apgr"]
        half = (interval[1] - interval[0]) / 2 if interval else 0.0
        if apgr is not None and half > 0:
            excess = apgr - 0.5
            needed = pair.num_prompts * (half / 1.96 * _POWER / excess) ** 2 if excess > 0 else 1e9
            more = _rounded(needed - pair.num_prompts) if needed > pair.num_prompts else 10
            sentence += (
                f"; about {more:,} more prompts would decide it, if the ranking is as good as it "
                "looks"
                if more is not None
                else "; more prompts are not likely to change that"
            )
    return PairSoFar(
        pair.first, pair.second, pair.num_prompts, pair.gap, pair.low, pair.high, more, sentence
    )
