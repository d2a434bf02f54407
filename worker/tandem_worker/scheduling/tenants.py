"""Whose turn it is at a worker that tenants share, and which of them are about to come back.

Who has used least of the worker's time of late goes first: the time of steps, by their measured
costs, and not tokens, since a token of an answer may cost as much as sixteen of a prompt. What was
used is forgotten within seconds, so that nobody saves up and nobody owes for long. Pure.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

MEMORY_S = 5.0
"""Time that was used this long ago counts for 1/e."""
REMEMBERED_S = 1.0
"""Who was here this long ago counts as if it were: the step that runs when it comes back is not to
be a long one."""
FORGOTTEN_S = 60.0


class StepCosts(NamedTuple):
    """Seconds of a step: of its own, per token of a prompt and its square, per decode and context.

    As `engine.profile` fits them.
    """

    base_s: float
    token_s: float
    square_s: float
    decode_s: float
    context_s: float

    def chunk_s(self, start: int, num_tokens: int, is_decode: bool) -> float:
        """What one chunk adds."""
        if is_decode:
            return self.decode_s + self.context_s * (start + 1)
        return self.token_s * num_tokens + self.square_s * ((start + num_tokens) ** 2 - start**2)

    def tokens_in(self, seconds: float, start: int) -> int:
        """How many tokens of a prompt after `start` others fit into a time."""
        per_token = self.token_s + 2.0 * self.square_s * start
        return int(seconds / per_token + 1e-9) if per_token > 0.0 else 1 << 30


NOMINAL = StepCosts(0.005, 50e-6, 0.0, 100e-6, 0.0)
"""By which turns are taken before a worker has measured its steps."""

ReadCosts = Callable[[], StepCosts | None]


class Usual(NamedTuple):
    """What a request of a tenant takes, alone: until its first token, and in all."""

    first_s: float
    total_s: float


class _Decayed:
    """A sum of what came of late."""

    __slots__ = ("_at_s", "_sum")

    def __init__(self, total: float, now_s: float) -> None:
        self._sum, self._at_s = total, now_s

    def read(self, now_s: float) -> float:
        return self._sum * math.exp(-max(0.0, now_s - self._at_s) / MEMORY_S)

    def add(self, amount: float, now_s: float) -> None:
        self._sum, self._at_s = self.read(now_s) + amount, now_s


@dataclass(slots=True)
class _Tenant:
    """What is known of a tenant; seconds of the worker's time."""

    known_since_s: float
    used: _Decayed
    wanted: _Decayed
    usual: Usual | None = None
    left_at_s: float | None = None


class Turns:
    """Who has used how much, and who is here."""

    def __init__(self) -> None:
        self.here: Counter[str] = Counter()
        """Sequences of each tenant that wait or are computed."""
        self.now_s = 0.0
        self._known: dict[str, _Tenant] = {}

    @property
    def are_shared(self) -> bool:
        """Whether more than one tenant is here."""
        return len(self.here) > 1

    def expected(self) -> Mapping[str, Usual | None]:
        """Tenants that are not here and may come back any moment; what they usually ask for."""
        return {
            name: tenant.usual
            for name, tenant in self._known.items()
            if tenant.left_at_s is not None and self.now_s - tenant.left_at_s <= REMEMBERED_S
        }

    def used(self, tenant: str) -> float:
        """Seconds of the worker's time, of late."""
        known = self._known.get(tenant)
        return known.used.read(self.now_s) if known else 0.0

    def wanted_share(self, tenant: str) -> float:
        """Of the worker's time: what a tenant has asked for, of late or since it is known."""
        if (known := self._known.get(tenant)) is None:
            return 0.0
        span_s = MEMORY_S * (1.0 - math.exp(-(self.now_s - known.known_since_s) / MEMORY_S))
        return known.wanted.read(self.now_s) / (span_s + 1e-9)

    def came(self, tenant: str, prompt_s: float, now_s: float) -> None:
        """One more sequence of a tenant, whose prompt takes so long.

        Somebody new begins where the least of the others stands: it is not to go before all of
        them until it has used as much.
        """
        self.now_s = max(self.now_s, now_s)
        if (known := self._known.get(tenant)) is None:
            others = [self.used(each) for each in {*self.here, *self.expected()}]
            self._make_room()
            used = _Decayed(min(others, default=0.0), self.now_s)
            known = _Tenant(self.now_s, used, _Decayed(0.0, self.now_s))
            self._known[tenant] = known
        known.left_at_s = None
        known.wanted.add(prompt_s, self.now_s)
        self.here[tenant] += 1

    def left(self, tenant: str, usual: Usual | None) -> None:
        """One fewer; the last one ends the tenant's stay.

        usual: what the sequence would have taken alone.
        """
        known = self._known[tenant]
        known.usual = usual or known.usual
        self.here[tenant] -= 1
        if not self.here[tenant]:
            del self.here[tenant]
            known.left_at_s = self.now_s

    def charge(self, tenant: str, seconds: float, answers_s: float) -> None:
        """Time of the worker that was spent on a tenant.

        answers_s: What its answers' tokens would take of full steps.
        """
        known = self._known[tenant]
        known.used.add(seconds, self.now_s)
        known.wanted.add(answers_s, self.now_s)

    def _make_room(self) -> None:
        """Forget those who are long gone."""
        if len(self._known) % 64 == 63:
            for name, tenant in list(self._known.items()):
                left_at_s = tenant.left_at_s
                if left_at_s is not None and self.now_s - left_at_s > FORGOTTEN_S:
                    del self._known[name]


def first_in_turn(
    heads: Iterable[tuple[int, str]], turns: Turns, extra: Mapping[str, float]
) -> str:
    """Of (priority of the first in line, tenant): the lowest number, then who has used least.

    extra: seconds that a tenant has been given meanwhile.
    """
    return min(
        heads,
        key=lambda head: (head[0], turns.used(head[1]) + extra.get(head[1], 0.0)),
    )[1]
