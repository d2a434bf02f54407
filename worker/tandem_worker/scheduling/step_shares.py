"""What one tenant may add to a step that another one waits for, so that none waits twice as long.

Every step takes time of its own and time for each tenant's part. What a tenant's part would have
taken as steps of its own is known by the measured costs; what it did take is known, too. Between
the two lies a request's slack: it may take as many times its own time as tenants share the worker,
the rest of the step that ran when it came included. Whoever has used least of the worker gets all
that it asks for in a step; others fill its slack. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from tandem_worker.scheduling.sequence import Chunk, Sequence, Waited
from tandem_worker.scheduling.tenants import StepCosts, Turns, Usual

MARGIN = 0.95
"""Of the promise: what is left for costs that are not quite as measured."""
MOST_ADDED = 0.9
"""What another tenant may add to a step, of what the step would take without it, slack or not: an
answer's tokens come evenly, too."""
MOST_BEFORE = 0.75
"""The same of the step before a first token, where no request of the tenant is here yet."""
LEAST_ADDED = 0.1
"""What may be added at any rate while nobody is here who waits for it, of a step's own time."""


HARDLY_ANYTHING = 0.02
"""What may always be added, of a step's own time: a few answers' tokens on a GPU."""
MANY_STEPS = 8
"""Who has more than so many full steps of prompts waiting asks for more than its share."""


@dataclass(slots=True)
class _Wish:
    """What a tenant would compute in a step of its own."""

    left_tokens: int
    left_sequences: int
    num_tokens: int = 0
    seconds: float = 0.0
    whole_s: float = 0.0
    slack_s: float = float("inf")
    given_s: float = 0.0
    decodes: list[Sequence] = field(default_factory=list)
    start: int = 1 << 30
    prompts: list[Waited] = field(default_factory=list)
    prompts_s: float = 0.0
    prompts_whole_s: float = 0.0


class StepShares:
    """Keeps the slack of requests, and bounds what of each tenant goes into a step."""

    def __init__(self, turns: Turns, max_batched_tokens: int, max_num_seqs: int) -> None:
        self._turns = turns
        self._max_tokens = max_batched_tokens
        self._max_sequences = max_num_seqs
        self._wishes: dict[str, _Wish] = {}
        self._tenant_s: dict[str, float] = {}
        """What each tenant's steps would have taken alone, since it shares."""
        self._clock_s = 0.0
        """What all steps since then have taken, by their costs."""
        self._looked_at_s = float("-inf")
        self._last_step_s = 0.0

    def bound(
        self,
        selected: list[Sequence],
        waiting: Iterable[Sequence],
        costs: StepCosts,
        has_room: Callable[[Sequence], bool],
        num_cached: Callable[[Sequence], int],
    ) -> dict[str, int]:
        """Leave out of a step what would make it too long for somebody.

        Args:
            selected: Running sequences that take part; those that are left out are removed, and go
                first the next time.
            waiting: Those that may be admitted.
            costs: What a step costs.
            has_room: Whether one that waits could be admitted, were it the only one.
            num_cached: Tokens of one that waits that need not be computed.

        Returns:
            Tokens of prompts that a tenant may still add; absent: no bound.
        """
        turns = self._turns
        expected = turns.expected()
        for tenant in [each for each in self._tenant_s if each not in turns.here]:
            del self._tenant_s[tenant]
        number = len(turns.here) + len(expected)
        if number < 2:
            self._wishes = {}
            self._looked_at_s = turns.now_s
            return {}
        times = MARGIN * number
        wishes = self._wishes = self._wished(selected, waiting, costs, times, has_room, num_cached)
        self._looked_at_s = turns.now_s
        order = sorted((t for t, w in wishes.items() if w.seconds), key=turns.used)
        if not order:
            return {}
        base_s = costs.base_s
        longest_s = min(
            (_longest(usual, base_s, times) for usual in expected.values() if usual is not None),
            default=float("inf"),
        )
        first = wishes[order[0]]
        is_modest = (
            turns.wanted_share(order[0]) * number <= 1.0
            and turns.here[order[0]] * number <= self._max_sequences
            and first.num_tokens <= MANY_STEPS * self._max_tokens
        )
        pace_s = _pace(first, base_s, times) if is_modest else 0.0
        first.given_s = min(first.seconds, max(longest_s - base_s, pace_s))
        gained_s = (base_s + first.whole_s) * first.given_s / first.whole_s
        taken_s = base_s + first.given_s
        left_s = min((number - 1) * MOST_ADDED * gained_s, longest_s - taken_s)
        if is_modest:
            slack_s = first.slack_s + times * gained_s - taken_s
            left_s = min(left_s, max(slack_s, HARDLY_ANYTHING * base_s))
        each_s = left_s / (number - 1)
        for tenant in order[1:]:
            wishes[tenant].given_s = max(0.0, min(each_s, wishes[tenant].seconds))
        out: set[int] = set()
        caps: dict[str, int] = {}
        for tenant in order:
            wish = wishes[tenant]
            if wish.given_s < wish.seconds:
                caps[tenant] = _fit(wish, costs, out, is_first=tenant == order[0])
        if first.given_s == first.seconds:  # its tokens fit into the step, too
            left = self._max_tokens - first.num_tokens
            for tenant in order[1:]:
                left -= sum(id(s) not in out for s in wishes[tenant].decodes)
                caps[tenant] = max(0, min(caps.get(tenant, left), left))
        if out:
            selected[:] = [s for s in selected if id(s) not in out]
        return caps

    def charge(self, chunks: Iterable[Chunk], costs: StepCosts) -> None:
        """Record what a step takes, and whose it is."""
        spent: dict[str, float] = {}
        answers: dict[str, float] = {}
        base_s = costs.base_s
        for sequence, start, num_tokens in chunks:
            is_decode = num_tokens == 1 and start + 1 == len(sequence.token_ids)
            seconds = costs.chunk_s(start, num_tokens, is_decode)
            spent[sequence.tenant] = spent.get(sequence.tenant, 0.0) + seconds
            if is_decode:
                answer_s = seconds + base_s / self._max_sequences
                answers[sequence.tenant] = answers.get(sequence.tenant, 0.0) + answer_s
            waited = sequence.share
            if is_decode and waited is not None:
                if waited.own_s is None:
                    waited.own_s = self._tenant_s.get(sequence.tenant, 0.0) - waited.tenant_s
                waited.own_s += base_s + seconds
        if not spent:
            return
        step_s = self._last_step_s = base_s + sum(spent.values())
        self._clock_s += step_s
        got: dict[str, float] = {}
        for tenant, seconds in spent.items():
            wish = self._wishes.get(tenant)
            whole_s = max(seconds, wish.whole_s) if wish is not None else seconds
            got[tenant] = seconds * (base_s + whole_s) / whole_s if whole_s else base_s
            if wish is not None:
                self._tenant_s[tenant] = self._tenant_s.get(tenant, 0.0) + got[tenant]
        all_s = sum(got.values()) or 1.0
        for tenant, seconds in spent.items():
            used_s = seconds + base_s * got[tenant] / all_s
            self._turns.charge(tenant, used_s, answers.get(tenant, 0.0))

    def resumes(self, sequence: Sequence) -> None:
        """A sequence that was computed elsewhere goes on here: what it waited for is not ours."""
        sequence.share = Waited(self._clock_s, self._tenant_s.get(sequence.tenant, 0.0))

    def _wished(
        self,
        selected: Iterable[Sequence],
        waiting: Iterable[Sequence],
        costs: StepCosts,
        times: float,
        has_room: Callable[[Sequence], bool],
        num_cached: Callable[[Sequence], int],
    ) -> dict[str, _Wish]:
        wishes: dict[str, _Wish] = {}
        for is_here, sequences in ((True, selected), (False, waiting)):
            for sequence in sequences:
                tenant = sequence.tenant
                wish = wishes.get(tenant)
                if wish is None:
                    wish = wishes[tenant] = _Wish(self._max_tokens, self._max_sequences)
                start = sequence.num_computed_tokens
                is_next = not is_here and wish.left_tokens > 0 and wish.left_sequences > 0
                if is_next:
                    start = num_cached(sequence)
                num_tokens = len(sequence.token_ids) - start
                is_decode = num_tokens == 1
                waited = sequence.share
                if waited is None:
                    waited = sequence.share = self._came(sequence)
                if not is_decode and (is_next or not waited.prompt_s):
                    most = min(num_tokens, self._max_tokens)
                    waited.prompt_s = costs.chunk_s(start, most, is_decode)
                own_s = waited.own_s
                if own_s is None:
                    own_s = self._tenant_s.get(tenant, 0.0) - waited.tenant_s
                slack_s = times * own_s - (self._clock_s - waited.since_s)
                if slack_s < wish.slack_s:
                    wish.slack_s = slack_s
                if is_here:
                    if is_decode:
                        wish.decodes.append(sequence)
                    elif start < wish.start:
                        wish.start = start
                wish.num_tokens += num_tokens
                num_tokens = min(wish.left_tokens, num_tokens)
                if not is_here and wish.left_sequences and not has_room(sequence):
                    wish.left_sequences = 0  # nor have those behind it
                if num_tokens and wish.left_sequences:
                    seconds = costs.chunk_s(start, num_tokens, is_decode)
                    wish.seconds += seconds
                    if not is_decode:
                        wish.prompts.append(waited)
                        wish.prompts_s += seconds
                        wish.prompts_whole_s += max(seconds, waited.prompt_s)
                    wish.left_tokens -= num_tokens
                    wish.left_sequences -= 1
        for wish in wishes.values():
            whole_s = 0.0
            for waited in wish.prompts:
                waited.whole_s = max(waited.whole_s, wish.prompts_whole_s)
                whole_s = max(whole_s, waited.whole_s)
            wish.whole_s = wish.seconds - wish.prompts_s + whole_s
        return wishes

    def _came(self, sequence: Sequence) -> Waited:
        """A sequence's first step: it may have waited for the rest of another one."""
        waited_s = 0.0
        if sequence.queued_since_s >= self._looked_at_s:
            waited_s = min(self._last_step_s, self._turns.now_s - sequence.arrival_s)
        tenant_s = self._tenant_s.get(sequence.tenant, 0.0)
        return Waited(self._clock_s - max(0.0, waited_s), tenant_s)


def _longest(usual: Usual, base_s: float, times: float) -> float:
    """The longest step that may run when a request of this kind comes."""
    most_s = min((times - 1.0) * usual.total_s, base_s + MOST_BEFORE * usual.first_s)
    return max(most_s, (1.0 + LEAST_ADDED) * base_s)


def _pace(wish: _Wish, base_s: float, times: float) -> float:
    """What must go into the step for the wish to be done within its slack; steps cost, too."""
    alone_s = wish.seconds * (base_s + wish.whole_s) / wish.whole_s
    num_steps = int((times * alone_s + wish.slack_s - wish.seconds) / base_s) if base_s else 1
    return wish.seconds / max(1, num_steps)


def _fit(wish: _Wish, costs: StepCosts, out: set[int], *, is_first: bool) -> int:
    """Choose decodes that fit, longest left out first; returns tokens of prompts that fit, too."""
    left_s = wish.given_s
    wish.decodes.sort(key=lambda s: -s.num_sat_out)
    for number, sequence in enumerate(wish.decodes):
        cost_s = costs.chunk_s(sequence.num_computed_tokens, 1, is_decode=True)
        if cost_s > left_s + 1e-12 and not (is_first and number == 0):
            sequence.num_sat_out += 1
            out.add(id(sequence))
            continue
        sequence.num_sat_out = 0
        left_s -= cost_s
    num_tokens = costs.tokens_in(max(0.0, left_s), wish.start if wish.start < 1 << 30 else 0)
    return max(num_tokens, 1) if is_first and not wish.decodes else num_tokens
