"""What the next step computes: every sequence is tokens computed catching up with tokens wanted.

Prefill, chunked prefill, prefix hits, resumption after preemption and decoding are the same thing
here: a sequence wants all its tokens computed, some already are, and a step computes more of them.
A sequence whose last token is computed in a step gets a new token sampled.

Pure: plain values in, a :class:`Step` out, the clock passed in. The live engine, the simulator and
the tests drive this same object.
"""

from __future__ import annotations

import bisect
import enum
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from tandem_worker.scheduling.kv_blocks import ROOT, BlockManager, hash_block
from tandem_worker.scheduling.tenants import ReadCosts, Turns, first_in_turn

Order = Literal["fcfs", "mlfq", "sjf", "edf"]


class State(enum.Enum):
    """Where a sequence stands."""

    WAITING = "waiting"
    RUNNING = "running"
    AWAITING_KV = "awaiting_kv"
    """Blocks are reserved and a prefill worker is filling them."""
    HOLDING = "holding"
    """Finished computing; its blocks are still being read (a push to a decode worker)."""
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """One sequence of tokens being computed.

    Attributes:
        request_id: Unique among live sequences.
        token_ids: Prompt and generated tokens so far; grows.
        num_prompt_tokens: Tokens the client sent; the rest was generated (here or before a resume).
        arrival_s: Clock reading on arrival, seconds.
        deadline_s: Clock reading by which the answer is wanted, or None.
        priority: Lower goes first.
        predicted_output_tokens: Expected length of the answer, for the orders that use it and for
            whoever picks a worker.
        remote_prefill: A prefill worker may fill the blocks.
        reuse_prefix: False where every position must really be computed (prompt log-probabilities).
        pinned: Never paused or preempted: a push is reading its blocks.
        salt: Keeps prefixes of different owners apart in the cache.
        tenant: Whose it is; tenants share the worker in turns. Empty: nobody's in particular.
        num_computed_tokens: Positions whose keys and values are in ``block_ids``.
    """

    request_id: str
    token_ids: list[int]
    num_prompt_tokens: int
    arrival_s: float = 0.0
    deadline_s: float | None = None
    priority: int = 0
    predicted_output_tokens: int = 128
    remote_prefill: bool = False
    reuse_prefix: bool = True
    pinned: bool = False
    salt: bytes = b""
    tenant: str = ""
    state: State = State.WAITING
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    block_ids: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    num_published: int = 0
    level: int = 0
    served_tokens: int = 0
    queued_since_s: float = 0.0
    num_sat_out: int = 0

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens that the next steps have to compute."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def remaining_output_tokens(self) -> int:
        """Tokens of the answer that are still expected, at least one.

        An answer that has grown beyond its prediction is put into the next bin, twice as long.
        """
        generated = len(self.token_ids) - self.num_prompt_tokens
        expected = max(1, self.predicted_output_tokens)
        while expected <= generated:
            expected *= 2
        return expected - generated


class Chunk(NamedTuple):
    """Positions ``start .. start + num_tokens`` of one sequence, computed in one step.

    A tuple, because a step of 256 sequences makes 256 of them: a frozen dataclass takes three
    times as long.
    """

    sequence: Sequence
    start: int
    num_tokens: int

    @property
    def samples(self) -> bool:
        """Whether this chunk reaches the last token, so that the next one can be sampled."""
        return self.start + self.num_tokens == len(self.sequence.token_ids)


@dataclass(slots=True)
class Step:
    """One step's work: decodes first, then prefill chunks; plus sequences whose state changed."""

    chunks: list[Chunk] = field(default_factory=list)
    num_decodes: int = 0
    reserved: list[Sequence] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens computed in this step."""
        return sum(chunk.num_tokens for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """What one step may hold.

    Attributes:
        max_num_seqs: Sequences with blocks at the same time.
        max_batched_tokens: Tokens computed in one step.
        mlfq_quantum_tokens: Service that the highest MLFQ level gives before demotion; doubles
            with each level.
        mlfq_starvation_s: A sequence waiting this long goes back to the highest level.
    """

    max_num_seqs: int = 64
    max_batched_tokens: int = 1024
    mlfq_quantum_tokens: int = 256
    mlfq_starvation_s: float = 10.0


PrefillChoice = Callable[[Sequence, int], bool]
"""(sequence, uncached tokens) -> True to prefill remotely."""

ServiceTime = Callable[[Sequence], float]
"""sequence -> seconds that its tokens, predicted ones included, still take."""

_MOVING_ORDERS = ("mlfq", "edf")
"""Ranks change while waiting: by starvation, and with what the measured steps take."""
_NUM_LEVELS = 8
_NOMINAL_TOKEN_S = 1e-3


def _nominal_time(sequence: Sequence) -> float:
    return _NOMINAL_TOKEN_S * (sequence.num_uncomputed_tokens + sequence.remaining_output_tokens)


class _Queue:
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


class Scheduler:
    """Chooses each step's chunks and gives sequences their blocks.

    Args:
        blocks: The block manager; shared with nobody else but the caller's own releases.
        limits: Bounds of a step.
        order: fcfs; sjf (shortest prompt + predicted answer); edf (least slack to the deadline);
            mlfq (skip-join multi-level feedback queue, FastServe, Wu et al. 2023: a long prompt
            joins at the level that its first step would use up).
        service_time: For edf, from measured steps; absent: a millisecond per token.
        choose_remote: Decides at admission whether a sequence that may be prefilled remotely is.
        step_costs: What a step costs, for tenants' shares of it; absent: a step is not shared.
    """

    def __init__(
        self,
        blocks: BlockManager,
        limits: SchedulerLimits,
        *,
        order: Order = "fcfs",
        service_time: ServiceTime = _nominal_time,
        choose_remote: PrefillChoice | None = None,
        step_costs: ReadCosts = lambda: None,
    ) -> None:
        self.blocks = blocks
        self.limits = limits
        self.order = order
        self._service_time = service_time
        self._choose_remote = choose_remote or (lambda sequence, uncached: True)
        self._step_costs = step_costs
        self._now_s = 0.0
        self.turns = Turns()
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.awaiting_kv: dict[str, Sequence] = {}
        self.holding: dict[str, Sequence] = {}
        self.num_prefix_queries = 0
        self.num_prefix_hits = 0

    # -- what callers do -------------------------------------------------------------------------

    def add(self, sequence: Sequence, now_s: float) -> None:
        """Take a new sequence into the waiting queue."""
        sequence.state = State.WAITING
        sequence.queued_since_s = now_s
        sequence.level = self._join_level(len(sequence.token_ids))
        self._now_s = now_s
        self.turns.came(sequence.tenant)
        self._enqueue(sequence, now_s)

    def finish(self, sequence: Sequence, *, hold: bool = False) -> None:
        """Stop computing a sequence; frees its blocks unless ``hold`` (see :meth:`let_go`)."""
        self._detach(sequence)
        self.turns.left(sequence.tenant, self._now_s)
        if hold:
            sequence.state = State.HOLDING
            self.holding[sequence.request_id] = sequence
        else:
            sequence.state = State.FINISHED
            self._release(sequence)

    def let_go(self, request_id: str) -> None:
        """Free the blocks of a held sequence; unknown ids are ignored."""
        sequence = self.holding.pop(request_id, None)
        if sequence is not None:
            sequence.state = State.FINISHED
            self._release(sequence)

    def remote_done(self, sequence: Sequence, first_token: int) -> None:
        """The prefill worker has filled the reserved blocks and sampled the first token."""
        del self.awaiting_kv[sequence.request_id]
        sequence.num_computed_tokens = len(sequence.token_ids)
        self._publish(sequence)
        sequence.token_ids.append(first_token)
        sequence.state = State.RUNNING
        self.running.append(sequence)

    def remote_failed(self, sequence: Sequence, now_s: float) -> list[int]:
        """Back to the queue, to be prefilled here.

        Returns:
            The blocks a late write may still hit; the caller releases them once none can come.
        """
        del self.awaiting_kv[sequence.request_id]
        num_shared = sequence.num_computed_tokens // self.blocks.block_size
        shared, exposed = sequence.block_ids[:num_shared], sequence.block_ids[num_shared:]
        self.blocks.release(shared)
        sequence.block_ids = []
        self._reset(sequence)
        sequence.remote_prefill = False
        sequence.state = State.WAITING
        sequence.queued_since_s = now_s
        self._enqueue(sequence, now_s)
        return exposed

    def remote_abandoned(self, sequence: Sequence) -> list[int]:
        """Like :meth:`remote_failed` for a sequence nobody wants any more."""
        exposed = self.remote_failed(sequence, 0.0)
        self.waiting.remove(sequence)
        self.turns.left(sequence.tenant, self._now_s)
        sequence.state = State.FINISHED
        return exposed

    @property
    def num_pending_prefill_tokens(self) -> int:
        """Prompt tokens not yet computed, over all sequences not yet decoding."""
        waiting = sum(sequence.num_uncomputed_tokens for sequence in self.waiting)
        running = sum(max(0, sequence.num_uncomputed_tokens - 1) for sequence in self.running)
        return waiting + running

    @property
    def num_expected_tokens(self) -> int:
        """Tokens still expected of all answers here, begun or not."""
        here = (self.waiting, self.running, self.awaiting_kv.values())
        return sum(sequence.remaining_output_tokens for group in here for sequence in group)

    @property
    def has_work(self) -> bool:
        """Whether a step could have something to compute."""
        return bool(self.running or self.waiting)

    # -- one step --------------------------------------------------------------------------------

    def schedule(self, now_s: float) -> Step:
        """Choose the next step's chunks and allocate their blocks."""
        step = Step()
        self._now_s = now_s
        budget = self.limits.max_batched_tokens
        self._claim(step, now_s)
        num_claimed = len(step.preempted)
        selected, paused = self._select(now_s)
        caps = self._share(selected, now_s)
        size = self.blocks.block_size
        chunks = step.chunks
        prefills: list[Sequence] = []
        running = State.RUNNING
        # This loop and the one of `advance` are the cost of a step of many decodes: no call for a
        # sequence that has room in its last block, and tuples made by C.
        take, make, kind = chunks.append, tuple.__new__, Chunk
        for sequence in selected:
            computed = sequence.num_computed_tokens
            if len(sequence.token_ids) - computed > 1:
                prefills.append(sequence)
            elif computed < len(sequence.block_ids) * size:
                if budget:
                    take(make(kind, (sequence, computed, 1)))
                    budget -= 1
            elif budget and sequence.state is running and self._grow(sequence, 1, step, now_s):
                take(make(kind, (sequence, computed, 1)))
                budget -= 1
        if step.preempted:
            chunks = step.chunks = [c for c in chunks if c.sequence.state is State.RUNNING]
        step.num_decodes = len(chunks)

        if self.turns.are_shared:
            prefills.sort(key=lambda s: (s.priority, self.turns.served(s.tenant)))
        for sequence in prefills:
            cap = caps.get(sequence.tenant, budget)
            if sequence.state is not State.RUNNING or budget == 0 or cap <= 0:
                continue
            num_tokens = min(budget, cap, sequence.num_uncomputed_tokens)
            if self._grow(sequence, num_tokens, step, now_s):
                chunks.append(Chunk(sequence, sequence.num_computed_tokens, num_tokens))
                budget -= num_tokens
                caps[sequence.tenant] = cap - num_tokens
        if len(step.preempted) > num_claimed:
            # A later sequence's growth may have preempted one that was already given a chunk.
            decodes = chunks[: step.num_decodes]
            step.num_decodes = sum(c.sequence.state is State.RUNNING for c in decodes)
            step.chunks = [c for c in chunks if c.sequence.state is State.RUNNING]

        if len(step.preempted) == num_claimed:
            self._admit(step, budget, paused, caps, now_s)
        return step

    def advance(self, step: Step) -> None:
        """Record that a step's chunks are computed; sampled tokens are appended by the caller."""
        size = self.blocks.block_size
        caches = self.blocks.prefix_cache
        is_mlfq = self.order == "mlfq"
        is_shared = self.turns.are_shared
        running = State.RUNNING
        for sequence, start, num_tokens in step.chunks:
            if sequence.state is not running:
                continue
            computed = sequence.num_computed_tokens = start + num_tokens
            if is_shared:
                is_decode = num_tokens == 1 and computed == len(sequence.token_ids)
                self.turns.charge(sequence.tenant, num_tokens, is_decode)
            if is_mlfq:
                sequence.served_tokens += num_tokens
                quantum = self.limits.mlfq_quantum_tokens << sequence.level
                if sequence.served_tokens >= quantum and sequence.level < _NUM_LEVELS - 1:
                    sequence.level += 1
                    sequence.served_tokens = 0
            if caches and computed // size > sequence.num_published:
                self._publish(sequence)

    def num_quiet_steps(self, most: int) -> int:
        """How many coming steps, at most ``most``, would only decode every running sequence once.

        0 where a step could do anything else: admit, prefill, preempt, or change an order. A
        caller that knows no request arrives or finishes meanwhile may take them at once with
        :meth:`advance_quiet` instead of one by one.
        """
        running = self.running
        if (
            self.turns.are_shared
            or self.order == "mlfq"
            or not running
            or len(running) > self.limits.max_batched_tokens
        ):
            return 0
        if self.waiting and len(running) + len(self.awaiting_kv) < self.limits.max_num_seqs:
            return 0
        if any(len(s.token_ids) - s.num_computed_tokens != 1 for s in running):
            return 0
        low, high = 0, most
        while low < high:  # almost always the first guess fits
            steps = high if low == 0 and high == most else (low + high + 1) // 2
            if self._blocks_for(steps) <= self.blocks.num_available:
                low = steps
            else:
                high = steps - 1
        return low

    def advance_quiet(self, num_steps: int) -> None:
        """Record so many quiet steps; the caller has appended the token that each one sampled."""
        size = self.blocks.block_size
        for sequence in self.running:
            computed = sequence.num_computed_tokens + num_steps
            missing = -(-computed // size) - len(sequence.block_ids)
            if missing > 0:
                fresh = self.blocks.allocate(missing)
                assert fresh is not None, "num_quiet_steps counted the blocks"
                sequence.block_ids += fresh
            sequence.num_computed_tokens = computed
            self._publish(sequence)

    def _blocks_for(self, num_steps: int) -> int:
        size = self.blocks.block_size
        return sum(
            max(0, -(-(s.num_computed_tokens + num_steps) // size) - len(s.block_ids))
            for s in self.running
        )

    # -- the parts of a step ---------------------------------------------------------------------

    def _select(self, now_s: float) -> tuple[list[Sequence], list[Sequence]]:
        """Running sequences that take part in this step, and those that sit it out, best first."""
        if self.order != "mlfq":
            return list(self.running), []
        # Under MLFQ a waiting sequence of a higher level pauses running ones: they keep their
        # blocks (unless memory is needed) and simply sit out. A pinned one cannot give its blocks
        # up, so sitting out would only hold up who needs them.
        for sequence in self.waiting:
            if now_s - sequence.queued_since_s > self.limits.mlfq_starvation_s:
                sequence.level = 0
                sequence.queued_since_s = now_s
        everyone = sorted(self.running + self.waiting, key=lambda s: self._rank(s, now_s))
        best = everyone
        if self.turns.are_shared:  # each tenant's first, then each one's second, ...
            places: Counter[str] = Counter()
            order: list[tuple[int, int]] = []
            for number, sequence in enumerate(everyone):
                order.append((places[sequence.tenant], number))
                places[sequence.tenant] += 1
            best = [everyone[number] for _, number in sorted(order)]
        chosen = {id(s) for s in best[: self.limits.max_num_seqs]}
        running: list[Sequence] = []
        paused: list[Sequence] = []
        for sequence in everyone:
            if sequence.state is State.RUNNING:
                takes_part = sequence.pinned or id(sequence) in chosen
                (running if takes_part else paused).append(sequence)
        return running, paused

    def _rank(self, sequence: Sequence, now_s: float) -> tuple[float, ...]:
        """Sort key; the smallest goes first."""
        arrival = sequence.arrival_s
        if self.order == "sjf":
            length = sequence.num_uncomputed_tokens + sequence.remaining_output_tokens
            return (sequence.priority, length, arrival)
        if self.order == "edf":
            if sequence.deadline_s is None:
                return (sequence.priority, float("inf"), arrival)
            slack = sequence.deadline_s - self._service_time(sequence)
            return (sequence.priority, slack, arrival)
        if self.order == "mlfq":
            return (sequence.priority, sequence.level, arrival)
        return (sequence.priority, arrival)

    def _admit(
        self,
        step: Step,
        budget: int,
        paused: list[Sequence],
        caps: dict[str, int],
        now_s: float,
    ) -> None:
        """Move waiting sequences in while blocks, slots and budget last."""
        if not self.waiting:
            return
        in_use = len(self.running) - len(paused) + len(self.awaiting_kv)
        slots = self.limits.max_num_seqs - in_use
        if slots <= 0:
            return
        if self.order in _MOVING_ORDERS:
            self.waiting.sort(key=lambda s: self._rank(s, now_s))
        taken: list[Sequence] = []
        queue = _Queue(self.waiting, self.turns)
        while slots > 0 and (sequence := queue.first()) is not None:
            tenant = sequence.tenant
            hits = self._lookup(sequence)
            needed = self._num_blocks(len(sequence.token_ids)) - len(hits)
            while paused and not self._fits(needed, hits):
                # Those that sit out hold the blocks; the last in rank gives its own up.
                self._preempt(paused.pop(), step, now_s)
            if not self._fits(needed, hits):
                break  # in order: a later, smaller one must not starve this one
            num_cached = len(hits) * self.blocks.block_size
            uncached = len(sequence.token_ids) - num_cached
            remote = sequence.remote_prefill and self._choose_remote(sequence, uncached)
            if (remote or sequence.pinned) and not self._may_keep(sequence, slots, needed):
                queue.skip(tenant)
                continue
            cap = min(budget, caps.get(tenant, budget))
            if cap <= 0 and not remote:
                if budget == 0:
                    break
                queue.skip(tenant)
                continue
            self.blocks.acquire(hits)
            fresh = self.blocks.allocate(needed)
            assert fresh is not None, "availability was checked above"
            sequence.block_ids = hits + fresh
            sequence.num_computed_tokens = num_cached
            sequence.num_cached_tokens = max(sequence.num_cached_tokens, num_cached)
            sequence.num_published = len(hits)
            self.num_prefix_queries += len(sequence.token_ids)
            self.num_prefix_hits += num_cached
            taken.append(sequence)
            queue.took(uncached)
            slots -= 1
            if remote:
                sequence.state = State.AWAITING_KV
                self.awaiting_kv[sequence.request_id] = sequence
                step.reserved.append(sequence)
                continue
            sequence.state = State.RUNNING
            sequence.remote_prefill = False
            self.running.append(sequence)
            num_tokens = min(cap, uncached)
            step.chunks.append(Chunk(sequence, num_cached, num_tokens))
            budget -= num_tokens
            if tenant in caps:
                caps[tenant] -= num_tokens
        if taken:
            admitted = set(map(id, taken))
            self.waiting = [s for s in self.waiting if id(s) not in admitted]

    # -- shares of tenants -----------------------------------------------------------------------

    def _claim(self, step: Step, now_s: float) -> None:
        """Take room for the first in turn from a tenant that holds more than its share of it.

        Slots and blocks have equal shares; whoever is below its own takes from who is furthest
        above. Nothing is taken that leaves the other one with less.
        """
        if not self.turns.are_shared or not self.waiting:
            return
        sequence = _Queue(self.waiting, self.turns).first()
        assert sequence is not None
        num_tenants = len(self.turns.here)
        held = [*self.running, *self.awaiting_kv.values()]
        hits = self._lookup(sequence)
        needed = self._num_blocks(len(sequence.token_ids)) - len(hits)
        share = max(1, self.limits.max_num_seqs // num_tenants)
        if sum(s.tenant == sequence.tenant for s in held) < share:
            while len(self.running) + len(self.awaiting_kv) >= self.limits.max_num_seqs:
                slots = Counter(s.tenant for s in (*self.running, *self.awaiting_kv.values()))
                if not self._take_from(slots, share, sequence, step, now_s):
                    break
        share = self.blocks.num_blocks // num_tenants
        own = sum(len(s.block_ids) for s in held if s.tenant == sequence.tenant)
        if own + needed <= share:
            while not self._fits(needed, hits):
                blocks: Counter[str] = Counter()
                for each in (*self.running, *self.awaiting_kv.values()):
                    blocks[each.tenant] += len(each.block_ids)
                if not self._take_from(blocks, share, sequence, step, now_s):
                    break

    def _take_from(
        self, held: Counter[str], share: int, sequence: Sequence, step: Step, now_s: float
    ) -> bool:
        """Preempt one of the tenant that holds most; False where nobody has more than a share."""
        for tenant, number in held.most_common():
            if number <= share or tenant == sequence.tenant:
                continue
            own = [
                s
                for s in self.running
                if s.tenant == tenant and not s.pinned and s.priority >= sequence.priority
            ]
            if own:
                self._preempt(max(own, key=lambda s: self._rank(s, now_s)), step, now_s)
                return True
        return False

    def _may_keep(self, sequence: Sequence, slots: int, needed: int) -> bool:
        """Whether a tenant may hold one more that cannot be preempted.

        It may hold as much as it leaves free (a dynamic threshold, Choudhury and Hahne 1998), so
        that there is room for whoever comes.
        """
        tenant = sequence.tenant
        if not tenant:
            return True
        kept = [s for s in self.awaiting_kv.values() if s.tenant == tenant]
        kept += [s for s in self.running if s.pinned and s.tenant == tenant]
        if not kept:
            return True
        num_blocks = sum(len(s.block_ids) for s in kept) + needed
        return len(kept) < slots and num_blocks <= self.blocks.num_available - needed

    def _share(self, selected: list[Sequence], now_s: float) -> dict[str, int]:
        """Leave out of a step what of one tenant would make it too long for another.

        While several tenants are here, none adds more to a step than a share of what the step would
        cost for the one that asks for least. Decodes that are left out go first the next time.

        Returns:
            Tokens of prompts that a tenant may still add; absent: no bound.
        """
        if not (self.turns.are_shared or self.turns.were_shared(now_s)):
            return {}
        if (costs := self._step_costs()) is None:
            return {}
        size = self.limits.max_batched_tokens
        parts: dict[str, list[Sequence]] = {}
        for sequence in selected:
            parts.setdefault(sequence.tenant, []).append(sequence)
        own_s: dict[str, float] = {}
        left: dict[str, int] = {}
        for sequence in (*selected, *self.waiting):  # as a step of the tenant's alone would be
            tenant = sequence.tenant
            num_tokens = min(left.get(tenant, size), sequence.num_uncomputed_tokens)
            if num_tokens:
                start, is_decode = sequence.num_computed_tokens, num_tokens == 1
                cost_s = costs.chunk_s(start, num_tokens, is_decode)
                own_s[tenant] = own_s.get(tenant, costs.base_s) + cost_s
                left[tenant] = left.get(tenant, size) - num_tokens
        found = self.turns.allowance_s(own_s, now_s)
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

    def _enqueue(self, sequence: Sequence, now_s: float) -> None:
        """Into the waiting queue, at its place."""
        bisect.insort_right(self.waiting, sequence, key=lambda s: self._rank(s, now_s))

    def _fits(self, needed: int, hits: list[int]) -> bool:
        """Whether these cached blocks and that many fresh ones could be had now."""
        return needed + self.blocks.num_idle(hits) <= self.blocks.num_available

    def _lookup(self, sequence: Sequence) -> list[int]:
        """Cached blocks of the sequence's prefix; always leaves one token to compute."""
        if not sequence.reuse_prefix or not self.blocks.prefix_cache:
            return []
        self._extend_hashes(sequence, len(sequence.token_ids))
        limit = (len(sequence.token_ids) - 1) // self.blocks.block_size
        return self.blocks.lookup(sequence.hashes[:limit])

    def _grow(self, sequence: Sequence, num_tokens: int, step: Step, now_s: float) -> bool:
        """Make room for ``num_tokens`` more; preempts others, at last the sequence itself."""
        wanted = self._num_blocks(sequence.num_computed_tokens + num_tokens)
        missing = wanted - len(sequence.block_ids)
        while missing > 0:
            fresh = self.blocks.allocate(missing)
            if fresh is not None:
                sequence.block_ids += fresh
                return True
            candidates = [s for s in self.running if not s.pinned]
            if not candidates:
                return False
            if self.turns.are_shared:
                candidates = self._of_who_holds_most(candidates)
            # Of equals the last to come: max keeps the first it sees.
            victim = max(reversed(candidates), key=lambda s: self._rank(s, now_s))
            self._preempt(victim, step, now_s)
            if victim is sequence:
                return False
        return True

    def _of_who_holds_most(self, candidates: list[Sequence]) -> list[Sequence]:
        """Of the last in priority, those of the tenant with the most blocks."""
        last = max(s.priority for s in candidates)
        candidates = [s for s in candidates if s.priority == last]
        blocks: Counter[str] = Counter()
        for each in self.running:
            blocks[each.tenant] += len(each.block_ids)
        most = max((s.tenant for s in candidates), key=lambda tenant: blocks[tenant])
        return [s for s in candidates if s.tenant == most]

    def _preempt(self, sequence: Sequence, step: Step, now_s: float) -> None:
        """Take a sequence's blocks away; it recomputes later, helped by the prefix cache."""
        self.running.remove(sequence)
        self._release(sequence)
        self._reset(sequence)
        sequence.num_preemptions += 1
        sequence.state = State.WAITING
        sequence.queued_since_s = now_s
        self._enqueue(sequence, now_s)
        step.preempted.append(sequence)

    def _publish(self, sequence: Sequence) -> None:
        """Make blocks that became full known to the prefix cache."""
        if not self.blocks.prefix_cache:
            return
        num_full = sequence.num_computed_tokens // self.blocks.block_size
        if num_full <= sequence.num_published:
            return
        self._extend_hashes(sequence, num_full * self.blocks.block_size)
        for index in range(sequence.num_published, num_full):
            parent = sequence.hashes[index - 1] if index else ROOT
            self.blocks.publish(sequence.block_ids[index], sequence.hashes[index], parent)
        sequence.num_published = num_full

    def _extend_hashes(self, sequence: Sequence, num_tokens: int) -> None:
        size = self.blocks.block_size
        while (len(sequence.hashes) + 1) * size <= num_tokens:
            index = len(sequence.hashes)
            parent = sequence.hashes[-1] if index else ROOT
            tokens = sequence.token_ids[index * size : (index + 1) * size]
            sequence.hashes.append(hash_block(parent, tokens, sequence.salt))

    def _detach(self, sequence: Sequence) -> None:
        if sequence.state is State.RUNNING:
            self.running.remove(sequence)
        elif sequence.state is State.WAITING:
            self.waiting.remove(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.blocks.release(sequence.block_ids)
        sequence.block_ids = []

    def _reset(self, sequence: Sequence) -> None:
        sequence.num_computed_tokens = 0
        sequence.num_published = 0
        sequence.served_tokens = 0

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.blocks.block_size)

    def _join_level(self, num_tokens: int) -> int:
        level = 0
        while level < _NUM_LEVELS - 1 and num_tokens > self.limits.mlfq_quantum_tokens << level:
            level += 1
        return level
