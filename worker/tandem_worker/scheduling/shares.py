"""What each tenant gets of a step, and what it may hold: decided over sequences. Pure.

Whose turn it is and what a step costs is in `tenants`; who is preempted or admitted by it, the
scheduler's.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Iterable

from tandem_worker.scheduling.sequence import Sequence
from tandem_worker.scheduling.tenants import StepCosts, Turns, first_in_turn


class InOrder:
    """As :class:`InTurn` where all are of one tenant: the line itself, nothing copied."""

    def __init__(self, waiting: list[Sequence]) -> None:
        self._waiting = waiting
        self._next = 0

    def first(self) -> Sequence | None:
        """Who is next; until `took` or `skip` the same."""
        return self._waiting[self._next] if self._next < len(self._waiting) else None

    def took(self, num_tokens: int) -> None:
        """The first has been admitted."""
        self._next += 1

    def skip(self, tenant: str) -> None:
        """Nobody of the tenant can be admitted now."""
        self._next = len(self._waiting)


class InTurn:
    """Waiting sequences in turn: tenants by what they have been served, each one's in its order."""

    def __init__(self, waiting: list[Sequence], turns: Turns) -> None:
        self._turns = turns
        self._lines: dict[str, deque[Sequence]] = {}
        self._extra: dict[str, float] = {}
        self._current = ""
        for sequence in waiting:
            self._lines.setdefault(sequence.tenant, deque()).append(sequence)

    def first(self) -> Sequence | None:
        """Who is next; until `took` or `skip` the same."""
        if not self._lines:
            return None
        heads = [(line[0].priority, tenant) for tenant, line in self._lines.items()]
        self._current = first_in_turn(heads, self._turns, self._extra)
        return self._lines[self._current][0]

    def took(self, num_tokens: int) -> None:
        """The first has been admitted, with so many tokens to compute."""
        tenant = self._current
        self._extra[tenant] = self._extra.get(tenant, 0.0) + num_tokens
        self._lines[tenant].popleft()
        if not self._lines[tenant]:
            del self._lines[tenant]

    def skip(self, tenant: str) -> None:
        """Nobody of this tenant can be admitted now."""
        del self._lines[tenant]


def one_by_one(sequences: list[Sequence]) -> list[Sequence]:
    """Each tenant's first, then each one's second, ..."""
    places: Counter[str] = Counter()
    order: list[tuple[int, int]] = []
    for number, sequence in enumerate(sequences):
        order.append((places[sequence.tenant], number))
        places[sequence.tenant] += 1
    return [sequences[number] for _, number in sorted(order)]


def blocks_by_tenant(sequences: Iterable[Sequence]) -> Counter[str]:
    """How many blocks each tenant holds; one that two sequences share counts twice."""
    blocks: Counter[str] = Counter()
    for each in sequences:
        blocks[each.tenant] += len(each.block_ids)
    return blocks


def above_share(
    held: Counter[str], share: int, sequence: Sequence, running: list[Sequence]
) -> list[Sequence]:
    """Those one of which may give its place up for a sequence.

    Of the tenant that holds most, of those that hold more than a share and have one to give; empty
    where there is none.
    """
    for tenant, number in held.most_common():
        if number <= share or tenant == sequence.tenant:
            continue
        own = [
            s
            for s in running
            if s.tenant == tenant and not s.pinned and s.priority >= sequence.priority
        ]
        if own:
            return own
    return []


def of_who_holds_most(candidates: list[Sequence], running: list[Sequence]) -> list[Sequence]:
    """Of the last in priority, those of the tenant with the most blocks."""
    last = max(s.priority for s in candidates)
    candidates = [s for s in candidates if s.priority == last]
    blocks = blocks_by_tenant(running)
    most = max((s.tenant for s in candidates), key=lambda tenant: blocks[tenant])
    return [s for s in candidates if s.tenant == most]


def may_keep(tenant: str, held: Iterable[Sequence], slots: int, needed: int, free: int) -> bool:
    """Whether a tenant may hold one more that cannot be preempted.

    It may hold as much as it leaves free (a dynamic threshold, Choudhury and Hahne 1998), so that
    there is room for whoever comes.

    Args:
        tenant: Empty: nobody's in particular, who always may.
        held: What cannot be preempted, of all tenants.
        slots: Free ones.
        needed: Blocks that the one more takes.
        free: Blocks that could be had.
    """
    if not tenant:
        return True
    kept = [s for s in held if s.tenant == tenant]
    if not kept:
        return True
    num_blocks = sum(len(s.block_ids) for s in kept) + needed
    return len(kept) < slots and num_blocks <= free - needed


def share_step(
    selected: list[Sequence],
    waiting: Collection[Sequence],
    turns: Turns,
    costs: StepCosts,
    max_batched_tokens: int,
    now_s: float,
) -> dict[str, int]:
    """Leave out of a step what of one tenant would make it too long for another.

    While several tenants are here, none adds more to a step than a share of what the step would
    cost for the one that asks for least. Decodes that are left out (taken from ``selected``) go
    first the next time.

    Returns:
        Tokens of prompts that a tenant may still add; absent: no bound.
    """
    parts: dict[str, list[Sequence]] = {}
    for sequence in selected:
        parts.setdefault(sequence.tenant, []).append(sequence)
    own_s = _costs_alone((*selected, *waiting), costs, max_batched_tokens)
    found = turns.allowance_s(own_s, now_s)
    if found is None:
        return {}
    least, allowance_s = found
    caps: dict[str, int] = {}
    out: set[int] = set()
    for tenant in own_s:
        if tenant == least:
            continue
        left_s = allowance_s
        decodes = [s for s in parts.get(tenant, ()) if s.num_uncomputed_tokens == 1]
        decodes.sort(key=lambda s: -s.num_sat_out)
        for number, sequence in enumerate(decodes):
            cost_s = costs.chunk_s(sequence.num_computed_tokens, 1, is_decode=True)
            if number and cost_s > left_s:
                sequence.num_sat_out += 1
                out.add(id(sequence))
                continue
            sequence.num_sat_out = 0
            left_s -= cost_s
        starts = [s.num_computed_tokens for s in parts.get(tenant, ())]
        caps[tenant] = costs.tokens_in(left_s, min(starts, default=0)) if left_s > 0 else 0
        if not decodes:
            caps[tenant] = max(1, caps[tenant])
    selected[:] = [s for s in selected if id(s) not in out]
    return caps


def _costs_alone(
    sequences: Iterable[Sequence], costs: StepCosts, max_batched_tokens: int
) -> dict[str, float]:
    """Seconds of a step of each tenant's alone."""
    own_s: dict[str, float] = {}
    left: dict[str, int] = {}
    for sequence in sequences:
        tenant = sequence.tenant
        room = left.get(tenant, max_batched_tokens)
        num_tokens = min(room, sequence.num_uncomputed_tokens)
        if num_tokens:
            cost_s = costs.chunk_s(sequence.num_computed_tokens, num_tokens, num_tokens == 1)
            own_s[tenant] = own_s.get(tenant, costs.base_s) + cost_s
            left[tenant] = room - num_tokens
    return own_s
