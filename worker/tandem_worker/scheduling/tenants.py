"""How a worker is shared between tenants: whose turn it is, and what one may hold of a step.

Turns are virtual token counters (VTC, Sheng et al., OSDI 2024): who has been served least goes
first, and who comes back from a pause is lifted to those who are here, so that nobody saves up.
Slots, blocks and steps have shares: what one tenant may hold while others want it. Pure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

PROMPT_WEIGHT, ANSWER_WEIGHT = 1.0, 2.0
"""VTC's: a token of an answer takes a step of its own."""
REMEMBERED = 4096
SHARE_OF_CHEAPEST = 0.75
"""What another tenant may add to a step, of what the step would cost without it. Below one, so
that what stands before an answer (the rest of a step, once) keeps within twice its time, too."""
REMEMBERED_S = 1.0
"""A tenant that was here this long ago counts as if it were: the step that runs when it comes back
is not to be a long one."""


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
        """How many tokens of a prompt after `start` others fit into a time; at least one."""
        per_token = self.token_s + 2.0 * self.square_s * start
        return max(1, int(seconds / per_token)) if per_token > 0.0 else 1 << 30


ReadCosts = Callable[[], StepCosts | None]


class Turns:
    """Who has been served how much, and who is here."""

    def __init__(self) -> None:
        self.here: Counter[str] = Counter()
        """Sequences of each tenant that wait or are computed."""
        self._served: dict[str, float] = {}
        self._floor = 0.0
        self._last_cost: dict[str, float] = {}
        self._left_at: dict[str, float] = {}

    @property
    def are_shared(self) -> bool:
        """Whether more than one tenant is here."""
        return len(self.here) > 1

    def were_shared(self, now_s: float) -> bool:
        """Whether another tenant was here a moment ago."""
        return any(now_s - left_at <= REMEMBERED_S for left_at in self._left_at.values())

    def served(self, tenant: str) -> float:
        """Weighted tokens; comparable between those who are here."""
        return self._served.get(tenant, 0.0)

    def came(self, tenant: str) -> None:
        """One more sequence of a tenant."""
        if tenant not in self.here:
            lowest = min((self.served(each) for each in self.here), default=self._floor)
            self._served[tenant] = max(self.served(tenant), lowest)
            self._left_at.pop(tenant, None)
        self.here[tenant] += 1

    def left(self, tenant: str, now_s: float) -> None:
        """One fewer; the last one ends the tenant's stay."""
        self.here[tenant] -= 1
        if self.here[tenant] > 0:
            return
        del self.here[tenant]
        others = [self.served(each) for each in self.here]
        self._floor = max(self._floor, min(others, default=self.served(tenant)))
        self._left_at[tenant] = now_s
        if len(self._served) > REMEMBERED:
            for each in [each for each in self._served if each not in self.here]:
                del self._served[each]
                self._last_cost.pop(each, None)
                self._left_at.pop(each, None)

    def charge(self, tenant: str, num_tokens: int, is_decode: bool) -> None:
        """Tokens were computed."""
        weight = ANSWER_WEIGHT if is_decode else PROMPT_WEIGHT
        self._served[tenant] = self.served(tenant) + weight * num_tokens

    def allowance_s(self, own_s: Mapping[str, float], now_s: float) -> tuple[str, float] | None:
        """The tenant that asks for least of the next step, and what each other one may add to it.

        own_s: what each tenant's part would cost as a step of its own. None where nobody shares.
        """
        self._last_cost.update(own_s)
        wanted = dict(own_s)
        for tenant, left_at in list(self._left_at.items()):
            if now_s - left_at > REMEMBERED_S:
                del self._left_at[tenant]
            elif tenant in self._last_cost:
                wanted.setdefault(tenant, self._last_cost[tenant])
        if len(wanted) < 2:
            return None
        least = min(wanted, key=lambda tenant: (wanted[tenant], self.served(tenant)))
        return least, SHARE_OF_CHEAPEST * wanted[least]


def first_in_turn(
    heads: Iterable[tuple[int, str]], turns: Turns, extra: Mapping[str, float]
) -> str:
    """Of (priority of the first in line, tenant): the lowest number, then the least served.

    extra: tokens that a tenant has been given meanwhile.
    """
    return min(
        heads,
        key=lambda head: (head[0], turns.served(head[1]) + extra.get(head[1], 0.0)),
    )[1]
