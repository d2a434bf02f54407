"""What the next step computes: every sequence is tokens computed catching up with tokens wanted.

Prefill, chunked prefill, prefix hits, resumption after preemption and decoding are the same thing
here: a sequence wants all its tokens computed, some already are, and a step computes more of them.
A sequence whose last token is computed in a step gets a new token sampled.

Pure: plain values in, a :class:`Step` out, the clock passed in. The live engine, the simulator and
the tests drive this same object.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from tandem_worker.scheduling.kv_blocks import BlockManager
from tandem_worker.scheduling.prefixes import cached_blocks, publish
from tandem_worker.scheduling.ranking import Order, Ranking, ServiceTime, nominal_time
from tandem_worker.scheduling.sequence import Chunk, Sequence, State, Step
from tandem_worker.scheduling.shares import (
    InOrder,
    InTurn,
    above_share,
    blocks_by_tenant,
    may_keep,
    of_who_holds_most,
    one_by_one,
)
from tandem_worker.scheduling.step_shares import StepShares
from tandem_worker.scheduling.tenants import NOMINAL, ReadCosts, StepCosts, Turns, Usual


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


class Scheduler:
    """Chooses each step's chunks and gives sequences their blocks.

    Args:
        blocks: The block manager; shared with nobody else but the caller's own releases.
        limits: Bounds of a step.
        order: Who goes first, as `ranking` says.
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
        service_time: ServiceTime = nominal_time,
        choose_remote: PrefillChoice | None = None,
        step_costs: ReadCosts = lambda: None,
    ) -> None:
        self.blocks = blocks
        self.limits = limits
        self._ranking = Ranking(
            order, limits.mlfq_quantum_tokens, limits.mlfq_starvation_s, service_time
        )
        self._choose_remote = choose_remote or (lambda sequence, uncached: True)
        self._step_costs = step_costs
        self._now_s = 0.0
        self.turns = Turns()
        self._shares = StepShares(self.turns, limits.max_batched_tokens, limits.max_num_seqs)
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self._is_sorted = True
        """Whether those that are computed stand in order, where they have levels."""
        self.awaiting_kv: dict[str, Sequence] = {}
        self.holding: dict[str, Sequence] = {}
        self.num_prefix_queries = 0
        self.num_prefix_hits = 0

    # -- what callers do -------------------------------------------------------------------------

    def add(self, sequence: Sequence, now_s: float) -> None:
        """Take a new sequence into the waiting queue."""
        sequence.state = State.WAITING
        sequence.queued_since_s = now_s
        self._ranking.join(sequence)
        self._now_s = now_s
        costs, size = self._costs(), self.limits.max_batched_tokens
        num_cached = self._num_cached(sequence)
        num_tokens = len(sequence.token_ids) - num_cached
        prompt_s = costs.chunk_s(num_cached, num_tokens, is_decode=False)
        steps_s = costs.base_s * num_tokens / size
        self.turns.came(sequence.tenant, prompt_s + steps_s, now_s)
        self._ranking.insert(self.waiting, sequence)

    def finish(self, sequence: Sequence, *, hold: bool = False) -> None:
        """Stop computing a sequence; frees its blocks unless ``hold`` (see :meth:`let_go`)."""
        self._detach(sequence)
        self.turns.left(sequence.tenant, self._usual(sequence))
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
        publish(self.blocks, sequence)
        sequence.token_ids.append(first_token)
        sequence.state = State.RUNNING
        self._shares.resumes(sequence)
        self.running.append(sequence)
        self._is_sorted = False

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
        self._shares.resumes(sequence)
        sequence.queued_since_s = now_s
        self._ranking.insert(self.waiting, sequence)
        return exposed

    def remote_abandoned(self, sequence: Sequence) -> list[int]:
        """Like :meth:`remote_failed` for a sequence nobody wants any more."""
        exposed = self.remote_failed(sequence, 0.0)
        self.waiting.remove(sequence)
        self.turns.left(sequence.tenant, None)
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
        self._now_s = self.turns.now_s = now_s
        self._claim(step, now_s)
        self._fill(step, len(step.preempted), now_s, is_shared=True)
        if not step.chunks and self.has_work:  # whoever was to go first cannot
            self._fill(step, len(step.preempted), now_s, is_shared=False)
        if len(self.turns.here) > 1 or "" not in self.turns.here:
            self._shares.charge(step.chunks, self._costs())
        return step

    def _fill(self, step: Step, num_claimed: int, now_s: float, *, is_shared: bool) -> None:
        budget = self.limits.max_batched_tokens
        selected, paused = self._select(now_s)
        caps = self._share(selected) if is_shared else {}
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
            prefills.sort(key=lambda s: (s.priority, self.turns.used(s.tenant)))
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

    def advance(self, step: Step) -> None:
        """Record that a step's chunks are computed; sampled tokens are appended by the caller."""
        size = self.blocks.block_size
        caches = self.blocks.prefix_cache
        if self._ranking.has_levels and self._ranking.demote(step.chunks):
            self._is_sorted = False
        running = State.RUNNING
        for sequence, start, num_tokens in step.chunks:
            if sequence.state is not running:
                continue
            computed = sequence.num_computed_tokens = start + num_tokens
            if caches and computed // size > sequence.num_published:
                publish(self.blocks, sequence)

    def num_quiet_steps(self, most: int) -> int:
        """How many coming steps, at most ``most``, would only decode every running sequence once.

        0 where a step could do anything else: admit, prefill, preempt, or change an order. A
        caller that knows no request arrives or finishes meanwhile may take them at once with
        :meth:`advance_quiet` instead of one by one.
        """
        running = self.running
        if (
            self.turns.are_shared
            or self._ranking.has_levels
            or not running
            or len(running) > self.limits.max_batched_tokens
        ):
            return 0
        if self.waiting and len(running) + len(self.awaiting_kv) < self.limits.max_num_seqs:
            return 0
        size = self.blocks.block_size
        missing = 0
        for sequence in running:
            computed = sequence.num_computed_tokens
            if len(sequence.token_ids) - computed != 1:
                return 0
            more = computed + most - len(sequence.block_ids) * size
            if more > 0:
                missing += -(-more // size)
        if missing <= self.blocks.num_available:
            return most  # as almost always
        low, high = 0, most - 1
        while low < high:
            steps = (low + high + 1) // 2
            if self._blocks_for(steps) <= self.blocks.num_available:
                low = steps
            else:
                high = steps - 1
        return low

    def advance_quiet(self, num_steps: int) -> None:
        """Record so many quiet steps; the caller has appended the token that each one sampled."""
        size = self.blocks.block_size
        caches = self.blocks.prefix_cache
        for sequence in self.running:
            computed = sequence.num_computed_tokens = sequence.num_computed_tokens + num_steps
            more = computed - len(sequence.block_ids) * size
            if more > 0:
                fresh = self.blocks.allocate(-(-more // size))
                assert fresh is not None, "num_quiet_steps counted the blocks"
                sequence.block_ids += fresh
            if caches and computed // size > sequence.num_published:
                publish(self.blocks, sequence)

    def _blocks_for(self, num_steps: int) -> int:
        size = self.blocks.block_size
        return sum(
            max(0, -(-(s.num_computed_tokens + num_steps) // size) - len(s.block_ids))
            for s in self.running
        )

    # -- the parts of a step ---------------------------------------------------------------------

    def _select(self, now_s: float) -> tuple[list[Sequence], list[Sequence]]:
        """Running sequences that take part in this step, and those that sit it out, best first."""
        if not self._ranking.has_levels:
            return list(self.running), []
        # Under MLFQ a waiting sequence of a higher level pauses running ones: they keep their
        # blocks (unless memory is needed) and simply sit out. A pinned one cannot give its blocks
        # up, so sitting out would only hold up who needs them.
        self._ranking.lift(self.waiting, now_s)
        if not self._is_sorted:
            self.running.sort(key=self._ranking.key)
            self._is_sorted = True
        most = self.limits.max_num_seqs
        if not self.turns.are_shared:
            num_first = self._ranking.num_first(self.running, self.waiting, most)
            rest = self.running[num_first:]
            running = self.running[:num_first] + [s for s in rest if s.pinned]
            return running, [s for s in rest if not s.pinned]
        everyone = sorted(self.running + self.waiting, key=self._ranking.key)
        chosen = {id(s) for s in one_by_one(everyone)[:most]}
        takes_part = [s.pinned or id(s) in chosen for s in self.running]
        return (
            [s for s, takes in zip(self.running, takes_part, strict=True) if takes],
            [s for s, takes in zip(self.running, takes_part, strict=True) if not takes],
        )

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
        if self._ranking.moves:
            self.waiting.sort(key=self._ranking.key)
        taken: list[Sequence] = []
        in_order = not paused and not self.turns.are_shared
        queue = InOrder(self.waiting) if in_order else InTurn(self.waiting, self.turns)
        while slots > 0 and (sequence := queue.first()) is not None:
            tenant = sequence.tenant
            hits = cached_blocks(self.blocks, sequence)
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
            queue.took(self._costs().chunk_s(num_cached, uncached, is_decode=False))
            slots -= 1
            if remote:
                sequence.state = State.AWAITING_KV
                self.awaiting_kv[sequence.request_id] = sequence
                step.reserved.append(sequence)
                continue
            sequence.state = State.RUNNING
            sequence.remote_prefill = False
            self.running.append(sequence)
            self._is_sorted = False
            num_tokens = min(cap, uncached)
            step.chunks.append(Chunk(sequence, num_cached, num_tokens))
            budget -= num_tokens
            if tenant in caps:
                caps[tenant] -= num_tokens
        if in_order:
            del self.waiting[: len(taken)]
        elif taken:
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
        sequence = InTurn(self.waiting, self.turns).first()
        assert sequence is not None
        tenant, num_tenants = sequence.tenant, len(self.turns.here)
        own = [s for s in (*self.running, *self.awaiting_kv.values()) if s.tenant == tenant]
        slots = max(1, self.limits.max_num_seqs // num_tenants)
        blocks = self.blocks.num_blocks // num_tenants
        num_wanted, needed, hits = self._wanted(
            tenant, slots - len(own), blocks - sum(len(s.block_ids) for s in own)
        )
        if not num_wanted:
            return
        while self._num_in_slots + num_wanted > self.limits.max_num_seqs:
            held = Counter(s.tenant for s in (*self.running, *self.awaiting_kv.values()))
            if not self._take_from(held, slots, sequence, step, now_s):
                break
        while not self._fits(needed, hits):
            held = blocks_by_tenant((*self.running, *self.awaiting_kv.values()))
            if not self._take_from(held, blocks, sequence, step, now_s):
                break

    def _wanted(self, tenant: str, slots: int, blocks: int) -> tuple[int, int, list[int]]:
        """How many of a tenant's waiting ones fit into what it may have; their blocks and hits."""
        number, needed = 0, 0
        hits: list[int] = []
        for sequence in self.waiting:
            if sequence.tenant != tenant:
                continue
            cached = cached_blocks(self.blocks, sequence)
            fresh = self._num_blocks(len(sequence.token_ids)) - len(cached)
            if number >= slots or needed + fresh > blocks:
                break
            number += 1
            needed += fresh
            hits += cached
        return number, needed, hits

    @property
    def _num_in_slots(self) -> int:
        return len(self.running) + len(self.awaiting_kv)

    def _take_from(
        self, held: Counter[str], share: int, sequence: Sequence, step: Step, now_s: float
    ) -> bool:
        """Preempt one of the tenant that holds most; False where nobody has more than a share."""
        own = above_share(held, share, sequence, self.running)
        if not own:
            return False
        self._preempt(max(own, key=self._ranking.key), step, now_s)
        return True

    def _may_keep(self, sequence: Sequence, slots: int, needed: int) -> bool:
        """Whether a tenant may hold one more that cannot be preempted."""
        held = [*self.awaiting_kv.values(), *(s for s in self.running if s.pinned)]
        return may_keep(sequence.tenant, held, slots, needed, self.blocks.num_available)

    def _share(self, selected: list[Sequence]) -> dict[str, int]:
        """Leave out what would make the step too long; tokens that tenants may still add."""
        if (costs := self._step_costs()) is None:
            return {}
        has_slot = self._num_in_slots < self.limits.max_num_seqs
        return self._shares.bound(
            selected,
            self.waiting,
            costs,
            lambda s: has_slot and self._num_blocks(len(s.token_ids)) <= self.blocks.num_available,
            self._num_cached,
        )

    def _num_cached(self, sequence: Sequence) -> int:
        """Tokens of a waiting sequence that need not be computed, were it admitted now."""
        return len(cached_blocks(self.blocks, sequence)) * self.blocks.block_size

    def _costs(self) -> StepCosts:
        return self._step_costs() or NOMINAL

    def _usual(self, sequence: Sequence) -> Usual | None:
        """What a sequence would have taken alone, if it has got a token."""
        num_drawn = len(sequence.token_ids) - sequence.num_prompt_tokens
        if num_drawn < 1 or not sequence.tenant or (costs := self._step_costs()) is None:
            return None
        num_prompt = max(1, sequence.num_prompt_tokens - sequence.num_cached_tokens)
        size = self.limits.max_batched_tokens
        num_steps = -(-num_prompt // size) + num_drawn - 1
        prompt_s = costs.chunk_s(sequence.num_cached_tokens, num_prompt, is_decode=False)
        decode_s = costs.chunk_s(sequence.num_prompt_tokens, 1, is_decode=True)
        first_s = costs.base_s + prompt_s * min(1.0, size / num_prompt)
        return Usual(first_s, num_steps * costs.base_s + prompt_s + (num_drawn - 1) * decode_s)

    def _fits(self, needed: int, hits: list[int]) -> bool:
        """Whether these cached blocks and that many fresh ones could be had now."""
        return needed + self.blocks.num_idle(hits) <= self.blocks.num_available

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
                candidates = of_who_holds_most(candidates, self.running)
            # Of equals the last to come: max keeps the first it sees.
            victim = max(reversed(candidates), key=self._ranking.key)
            self._preempt(victim, step, now_s)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence, step: Step, now_s: float) -> None:
        """Take a sequence's blocks away; it recomputes later, helped by the prefix cache."""
        self.running.remove(sequence)
        self._release(sequence)
        self._reset(sequence)
        sequence.num_preemptions += 1
        sequence.state = State.WAITING
        sequence.queued_since_s = now_s
        self._ranking.insert(self.waiting, sequence)
        step.preempted.append(sequence)

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
