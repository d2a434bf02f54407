"""Who of the waiting is next, and what each tenant may hold: decided over sequences. Pure.

Whose turn it is and what a step costs is in `tenants`, what goes into one in `step_shares`; who is
preempted or admitted by it, the scheduler's.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable

from tandem_worker.scheduling.sequence import Sequence
from tandem_worker.scheduling.tenants import Turns, first_in_turn


class InOrder:
    """As :class:`InTurn` where all are of one tenant: the line itself, nothing copied."""

    def __init__(self, waiting: list[Sequence]) -> None:
        self._waiting = waiting
        self._next = 0

    def first(self) -> Sequence | None:
        """Who is next; until `took` or `skip` the same."""
        return self._waiting[self._next] if self._next < len(self._waiting) else None

    def took(self, seconds: float) -> None:
        """The first has been admitted."""
        self._next += 1

    def skip(self, tenant: str) -> None:
        """Nobody of the tenant can be admitted now."""
        self._next = len(self._waiting)


class InTurn:
    """Waiting sequences in turn: tenants by what they have used, each one's in its order."""

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

    def took(self, seconds: float) -> None:
        """The first has been admitted, and takes so long."""
        tenant = self._current
        self._extra[tenant] = self._extra.get(tenant, 0.0) + seconds
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
