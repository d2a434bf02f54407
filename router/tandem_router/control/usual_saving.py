"""What the dearest tier usually costs more than the cheapest, so that a request's own can be told
as a multiple of it: its stake."""

from __future__ import annotations

from collections.abc import Callable

from msgspec.structs import replace

from tandem_router.control.floor_limit import FloorLimit
from tandem_router.policy import Decision, PolicySetPoints, in_proportion

# The mean of about so many requests; in force from so many on, changed where it moved by a share.
WINDOW, NEEDED, STEP = 256, 16, 0.1
#: How many times the threshold a request is asked for, at most.
MOST_STAKE = 50.0


class UsualSaving:
    """Pure; `usd` is 0 until enough is known."""

    def __init__(self) -> None:
        self.usd = 0.0
        self._mean_usd, self._num_seen = 0.0, 0

    def observe(self, decision: Decision) -> float:
        """Count one decision; returns its stake, 1 where nothing is known yet."""
        verdicts, num, usd = decision.verdicts, self._num_seen, self.usd
        saving = verdicts[-1].expected_cost_usd - verdicts[0].expected_cost_usd
        if num < WINDOW:
            num = self._num_seen = num + 1
        mean = self._mean_usd
        mean = self._mean_usd = mean + (saving - mean) / num
        if num >= NEEDED and abs(mean - usd) > STEP * usd:
            usd = self.usd = max(0.0, mean)
        return in_proportion(saving, usd, MOST_STAKE) if usd > 0.0 else 1.0

    def in_force(
        self,
        base: PolicySetPoints,
        threshold: Callable[[], float],
        floor: FloorLimit | None,
        is_free: bool,
    ) -> PolicySetPoints:
        """Set-points with the threshold that then holds, which under a floor loses quality where
        most is saved.

        is_free: nobody asks for a threshold, and money has no price of its own. Under a floor, one
        that is asked for or that rests on labels means gain: asked of a request once at most.
        """
        weighs = floor is not None and floor.weigh(is_free)
        return replace(
            base,
            gain_threshold=threshold(),
            usual_saving_usd=self.usd if weighs else 0.0,
            most_stake=MOST_STAKE if weighs or floor is None else 1.0,
        )
