"""Which workers answer badly although they say they are well: ejected by outcomes of requests.

As Envoy's outlier detection: so many failures in a row eject a worker, for longer each time, and
never more than a share of a tier's workers. Load reports have no say here; an answer has. A worker
that is back from its ejection is on probation: one more failure ejects it again. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tandem_router.config import OutlierConfig


@dataclass(slots=True)
class Outcomes:
    """What one worker's last requests came to."""

    num_failures: int = 0  # in a row
    num_ejections: int = 0  # in a row, without an answer between them
    ejected_until: float = 0.0

    def ejected(self, now: float) -> bool:
        return now < self.ejected_until

    def succeeded(self) -> None:
        """An answer ends the row of failures, and an ejection that is still on."""
        self.num_failures = 0
        self.num_ejections = 0
        self.ejected_until = 0.0

    def failed(
        self,
        now: float,
        config: OutlierConfig,
        others: Sequence[Outcomes],
        hangs: bool = False,
    ) -> bool:
        """Count a failure; True when it ejects the worker, as one that hangs does at once.

        others: outcomes of the tier's other workers, which bound how many may be out at once.
        """
        self.num_failures += 1
        sure = hangs or self.num_ejections > 0
        if self.ejected(now) or (self.num_failures < config.consecutive_failures and not sure):
            return False
        num_out = sum(other.ejected(now) for other in others)
        if num_out > 0 and num_out + 1 > config.max_ejected_share * (len(others) + 1):
            return False
        self.num_ejections += 1
        duration = min(
            config.max_ejection_s, config.base_ejection_s * 2.0 ** min(20, self.num_ejections - 1)
        )
        self.ejected_until = now + duration
        return True
