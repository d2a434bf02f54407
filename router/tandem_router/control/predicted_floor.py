"""Turn a quality floor into a gain threshold from what the predictor expects.

The predictor's qualities are calibrated, so over many requests their mean is what will be
measured. With gain g = p_large - p_small and requests with g <= theta sent to the small tier, the
quality expected is mean(p_large) - mean(g * 1[g <= theta]); the floor allows a loss of
(1 - floor) * mean(p_large). The largest theta within it saves most. Recent requests are the
sample, so the threshold follows the traffic; the training data's gains stand in until there are
enough. Labels correct it, threshold by threshold: to the loss predicted below theta comes what
labelled requests below theta lost beyond their prediction. `control.QualityFloor` replaces this
estimate by a certificate where labels allow.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Iterable, Sequence

from tandem_router.policy import weighed

WINDOW = 512
# Without training gains, the given threshold stands until so many requests have been seen.
MIN_OBSERVED = 64
#: Labels at which what they say beyond predictions counts half.
HALF_BELIEVED = 50.0
RECOMPUTE_EVERY = 16
# Requests from which on their stakes may count, and after which that is judged again.
MIN_STAKES = 128
# What asking each request in proportion to its stake has to save of the dearest tier's cost at the
# same expected quality; half of it where that is done already. Little is not worth sending more
# short prompts there: predictions of small gains and of costs are not that good.
WORTH_WEIGHING = 0.1


def threshold_for_floor(
    pairs: Collection[tuple[float, float]],
    floor: float,
    beyond: Sequence[tuple[float, float]] = (),
    better: float = 0.0,
    stakes: Iterable[float] | None = None,
    kept_back: float = 0.0,
) -> float:
    """Largest gain threshold that keeps the expected quality at `floor` of the dearest tier's.

    pairs: (gain of the dearest tier, quality of the dearest tier) per request, both finite. stakes:
    how many times the threshold each of them is asked for; once where absent.
    beyond: (gain, what was lost beyond it) of labelled requests, by gain; better: by how much the
    dearest tier is than predicted. kept_back: share of what may be lost that is not used.
    """
    gains = [gain for gain, _ in pairs]
    compared = gains if stakes is None else map(weighed, gains, stakes)
    ordered = sorted(zip(compared, gains, strict=True))
    total = sum([quality for _, quality in pairs]) + better * len(pairs)
    allowed = (1.0 - kept_back) * (1.0 - floor) * total + 1e-9
    scale = len(pairs) / (len(beyond) + HALF_BELIEVED) if beyond else 0.0
    place, corrected = 0, 0.0
    # Just below the smallest gain everything goes to the dearest tier: always within the floor.
    best = ordered[0][0] - 1e-6
    lost = 0.0
    for index, (level, gain) in enumerate(ordered):
        lost += gain
        while place < len(beyond) and beyond[place][0] <= level:
            corrected += scale * beyond[place][1]
            place += 1
        last_of_equals = index + 1 == len(ordered) or ordered[index + 1][0] > level
        if last_of_equals and lost + corrected <= allowed:
            best = level
    return min(1.0, max(-1.0, best))


class PredictedFloor:
    """The threshold for a floor, kept up to date; pure.

    training: (gain, quality of the dearest tier) pairs that stand for traffic at the start.
    margin: share of what may be lost that is kept back while no label has come; less and less
    with each.
    """

    def __init__(
        self,
        floor: float,
        initial_threshold: float,
        training: Iterable[tuple[float, float]] = (),
        window: int = WINDOW,
        margin: float = 0.0,
    ) -> None:
        self._margin = margin
        self._floor = floor
        self._beyond: list[tuple[float, float]] = []
        self._better = 0.0
        self._recent: deque[tuple[float, float, float]] = deque(
            ((1.0, gain, quality) for gain, quality in training), maxlen=window
        )
        self._num_seen = self._judged_at = 0
        self._weighs = False
        #: Whether asking each request in proportion to its stake would save enough.
        self.stakes_pay = False
        self._since = 0
        self.threshold = initial_threshold
        if self._recent:
            self._compute()

    def _compute(self) -> None:
        """Choose anew, on losses as they are measured where they are."""
        # What stands in for traffic says nothing of what is at stake.
        seen = list(self._recent)[max(0, len(self._recent) - self._num_seen) :]
        if self._num_seen >= self._judged_at + MIN_STAKES:
            self._judged_at = self._num_seen
            least = WORTH_WEIGHING / 2.0 if self._weighs else WORTH_WEIGHING
            self.stakes_pay = self._spent(seen, True) <= (1.0 - least) * self._spent(seen, False)
        requests = seen if self._weighs else list(self._recent)
        self.threshold = self._allowed(requests, self._weighs)

    def _allowed(self, requests: Collection[tuple[float, float, float]], weighs: bool) -> float:
        # What labels do not know yet falls with the square root of their number.
        kept_back = self._margin * math.sqrt(HALF_BELIEVED / (HALF_BELIEVED + len(self._beyond)))
        return threshold_for_floor(
            [(gain, quality) for _, gain, quality in requests],
            self._floor,
            self._beyond,
            self._better,
            [stake for stake, *_ in requests] if weighs else None,
            kept_back,
        )

    def _spent(self, requests: Collection[tuple[float, float, float]], weighs: bool) -> float:
        """What the dearest tier would cost more for those that it would get, in usual stakes."""
        threshold = self._allowed(requests, weighs)
        return sum(
            stake
            for stake, gain, _ in requests
            if (weighed(gain, stake) if weighs else gain) > threshold
        )

    def weigh(self, stakes: bool) -> None:
        """Whether from now on each request is asked for the threshold times its stake."""
        if stakes != self._weighs:
            self._weighs = stakes
            if self._recent:
                self._compute()

    def correct(self, labels: Iterable[tuple[float, float, float]]) -> None:
        """(gain, measured beyond predicted quality of the cheapest and of the dearest tier)."""
        found = sorted(labels)
        self._beyond = [(gain, dearest - cheapest) for gain, cheapest, dearest in found]
        self._better = sum(dearest for _, _, dearest in found) / (len(found) + HALF_BELIEVED)

    def clip(self, asked: float | None) -> float:
        """The threshold where somebody asks for another: no more than what holds the floor."""
        return self.threshold if asked is None else min(asked, self.threshold)

    def set_floor(self, floor: float) -> None:
        """Another floor for the same traffic."""
        self._floor = floor
        if self._recent:
            self._compute()

    def observe(self, gain: float, dearest_quality: float, stake: float = 1.0) -> bool:
        """One scored request; True when the threshold was computed anew.

        stake: what the dearest tier costs more for it, in units of the usual.
        """
        if not (math.isfinite(gain) and math.isfinite(dearest_quality) and math.isfinite(stake)):
            return False
        self._recent.append((stake, gain, dearest_quality))
        self._num_seen += 1
        self._since += 1
        if self._since < RECOMPUTE_EVERY or len(self._recent) < MIN_OBSERVED:
            return False
        self._since = 0
        self._compute()
        return True
