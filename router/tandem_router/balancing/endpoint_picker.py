"""Which workers take a request: the decode and the prefill worker are chosen together.

What stands before a request at a worker is its cost (`worker_cost`). Covered
prefixes are known from a chain of block hashes over the request's bytes, remembered for each
worker a request was sent to. Candidates are two random workers (power of two choices, so that
routers acting on the same old numbers do not all pick one worker) and one with the longest
covered prefix. Pure: randomness and clock are passed in, I/O happens elsewhere.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence, Set
from functools import reduce

from msgspec import Struct

from tandem_router.balancing.file_discovery import EndpointTable
from tandem_router.balancing.prefix_index import PrefixIndex, block_hashes
from tandem_router.balancing.retry_budget import RetryBudget
from tandem_router.balancing.revisions import same_revision, with_prefill
from tandem_router.balancing.shared_prefixes import STRIDE, SharedPrefixes
from tandem_router.balancing.worker import TEXT_WORKER, Load, Worker
from tandem_router.balancing.worker_cost import Pair, least_cost
from tandem_router.config import FailoverConfig, PickingConfig
from tandem_router.openai.prompt_size import BYTES_PER_TOKEN
from tandem_router.policy import Capabilities

FIRST_BACKOFF_S = 0.1
MAX_BACKOFF_S = 2.0
# As a worker assumes where nobody has predicted a length.
UNKNOWN_OUTPUT_TOKENS = 256.0
# Providers keep a prefix that nobody asks for some minutes.
PROVIDER_KEEPS_S = 300.0
# Workers looked at before it is assumed that few can be used.
MOST_DRAWS = 12


class Pick(Struct, eq=False):
    """The workers of one request; give it back with `first_token` and `finished`."""

    decode: Worker
    prefill: Worker | None
    num_uncached_tokens: float
    chain: Sequence[int] = ()
    prefill_done: bool = False


class Picker:
    """All workers of all tiers, and the choice among them.

    `rng` and `clock` (seconds, monotonic) are passed in.
    """

    def __init__(
        self,
        config: PickingConfig,
        rng: random.Random,
        clock: Callable[[], float],
        failover: FailoverConfig | None = None,
    ) -> None:
        self._config = config
        self._failover = failover or FailoverConfig()
        self._retries: dict[str, RetryBudget] = {}
        self._rng = rng
        self._clock = clock
        self._workers: dict[tuple[str, str], Worker] = {}
        # The same, by tier: those that a request is sent to, and those that only prefill.
        self._decoders: dict[str, list[Worker]] = {}
        self._prefillers: dict[str, list[Worker]] = {}
        self._shared: dict[str, SharedPrefixes] = {}
        self._tiers: frozenset[str] | None = None  # as the last table names them
        self._capabilities: dict[str, Capabilities] = {}
        self._adapters: dict[str, frozenset[str]] = {}

    def reconfigure(self, failover: FailoverConfig) -> None:
        """Other bounds of retries and ejections from now on; what is under way stays counted."""
        self._failover = failover
        for budget in self._retries.values():
            budget.share, budget.least = failover.retry_share, failover.min_retries

    @property
    def workers(self) -> Iterable[Worker]:
        return self._workers.values()

    def worker(self, tier: str, url: str) -> Worker | None:
        return self._workers.get((tier, url))

    def retries(self, tier: str) -> RetryBudget:
        """What bounds the retries of a tier."""
        budget = self._retries.get(tier)
        if budget is None:
            failover = self._failover
            budget = RetryBudget(failover.retry_share, failover.min_retries)
            self._retries[tier] = budget
        return budget

    def num_inflight(self, tier: str) -> int:
        """Requests of this router at the tier's workers."""
        return sum(worker.num_inflight for worker in self._decoders.get(tier, ()))

    def set_table(self, table: EndpointTable) -> None:
        """Replace the table; workers that stay keep their state.

        Two tiers may name one URL, as two models of one provider do: each has its own worker.
        """
        self._tiers = frozenset(table)
        workers: dict[tuple[str, str], Worker] = {}
        for tier, roles in table.items():
            for role, urls in roles.items():
                for url in urls:
                    old = self._workers.get((tier, url))
                    if old is not None and old.role == role:
                        workers[tier, url] = old
                    else:
                        index = PrefixIndex(self._config.max_prefix_entries)
                        workers[tier, url] = Worker(url, tier, role, index)
        self._workers = workers
        self._decoders, self._prefillers = {}, {}
        for (tier, _), worker in workers.items():
            part = self._prefillers if worker.role == "prefill" else self._decoders
            part.setdefault(tier, []).append(worker)

    def chain(self, data: bytes, apart: str = "") -> list[int]:
        """apart: whose prefixes these are, where workers keep them from those of others."""
        config = self._config
        return block_hashes(data, config.prefix_block_bytes, config.max_prefix_blocks, apart)

    def held_tokens(self, tier: str, chain: Sequence[int], by_provider: bool = False) -> float:
        """How much of a prompt the usable worker of the tier has that has most; 0 below 512 tokens.

        by_provider: who forgets what was not asked for lately.
        """
        if len(chain) < STRIDE:
            return 0.0
        now, mark, most = self._clock(), chain[STRIDE - 1], 0
        for workers in (self._decoders.get(tier, ()), self._prefillers.get(tier, ())):
            for worker in workers:
                prefixes = worker.prefixes
                if mark not in prefixes or not worker.usable(now):
                    continue
                if by_provider:
                    covered = prefixes.num_fresh(chain, now - PROVIDER_KEEPS_S)
                else:
                    covered = prefixes.num_covered(chain)
                most = max(most, covered)
        return most * self._config.prefix_block_bytes / BYTES_PER_TOKEN if most >= STRIDE else 0.0

    def usable(self, tier: str) -> list[Worker]:
        """Workers that could take a request of the tier now."""
        now = self._clock()
        return [worker for worker in self._decoders.get(tier, ()) if worker.usable(now)]

    def num_listed(self, tier: str) -> int:
        """Workers that the endpoints name, usable or not; 0 for a tier that is scaled to zero."""
        return len(self._decoders.get(tier, ())) + len(self._prefillers.get(tier, ()))

    def gone(self, tier: str) -> bool:
        """Whether the endpoints no longer name the tier, as after its Model was deleted.

        One that is scaled to zero is still named, without a worker.
        """
        return self._tiers is not None and tier not in self._tiers

    def num_usable(self, tier: str) -> int:
        return len(self.usable(tier))

    def has_prefill(self, tier: str) -> bool:
        """Whether the endpoints name workers of the tier that only prefill."""
        return bool(self._prefillers.get(tier))

    def any_usable(self, tier: str) -> bool:
        return self.ready(tier, self._clock())

    def ready(self, tier: str, now: float) -> bool:
        """As `any_usable`, at `now`."""
        for worker in self._decoders.get(tier, ()):  # noqa: SIM110 (a generator costs thrice)
            if worker.usable(now):
                return True
        return False

    def resting(self, tier: str, exclude: Set[str] = frozenset()) -> bool:
        """Whether a worker that nobody excludes is out only because it failed others lately."""
        workers = self._decoders.get(tier, ())
        return any(
            worker.url not in exclude and worker.usable(math.inf, ejected_too=True)
            for worker in workers
        )

    def all_ready(self, tiers: Sequence[str], now: float) -> bool:
        """Whether each of the tiers is `ready`."""
        for tier in tiers:
            for worker in self._decoders.get(tier, ()):
                if worker.usable(now):
                    break
            else:
                return False
        return True

    def queue_wait_s(self, tier: str) -> float:
        """Seconds of prefill before a new request at the least busy worker; 0 where unknown."""
        waits = [
            worker.queued_tokens() * worker.load.prefill_profile[1]
            for worker in self.usable(tier)
            if worker.load is not None and worker.load.prefill_profile is not None
        ]
        return max(0.0, min(waits)) if waits else 0.0

    def profile(self, tier: str) -> dict[str, list[float]]:
        """How fast the tier's workers are, by half: the mean of what they report."""
        found: dict[str, list[float]] = {}
        loads = [w.load for w in self._workers.values() if w.tier == tier and w.load is not None]
        for half in ("prefill", "decode"):
            told = [getattr(load, f"{half}_profile") for load in loads]
            known = [numbers for numbers in told if numbers is not None]
            if known:
                found[half] = [sum(column) / len(known) for column in zip(*known, strict=True)]
        return found

    def capabilities(self, tier: str) -> Capabilities:
        """What every worker of the tier can that has reported; the last known where none has."""
        reports = [
            worker.load.capabilities
            for worker in self._decoders.get(tier, ())
            if worker.load is not None
        ]
        if reports:
            first = reports[0]
            if any(report is not first and report != first for report in reports):
                first = reduce(_both, reports)
            self._capabilities[tier] = first
        return self._capabilities.get(tier, TEXT_WORKER)

    def adapters(self, tier: str) -> frozenset[str]:
        """LoRA adapters that some worker of the tier has loaded; the last known where none says."""
        reports = [w.load.adapters for w in self._decoders.get(tier, ()) if w.load is not None]
        if reports:
            self._adapters[tier] = frozenset().union(*reports)
        return self._adapters.get(tier, frozenset())

    def without(self, tier: str, adapter: str) -> frozenset[str]:
        """URLs of the tier's workers that have not said that they have loaded the adapter."""
        every = (*self._decoders.get(tier, ()), *self._prefillers.get(tier, ()))
        return frozenset(w.url for w in every if w.load is None or adapter not in w.load.adapters)

    def pick(
        self,
        tier: str,
        chain: Sequence[int],
        num_tokens: float,
        exclude: frozenset[str] | set[str],
        ejected_too: bool = False,
        expected_tokens: float | None = None,
    ) -> Pick | None:
        """Choose workers for a prompt of about num_tokens; None when none is usable.

        exclude: URLs that just refused this very request. ejected_too: better one that has failed
        lately than none. expected_tokens: of the answer, where they are predicted.
        """
        now = self._clock()
        known = self._decoders.get(tier, ())
        expected = UNKNOWN_OUTPUT_TOKENS if expected_tokens is None else expected_tokens
        if len(known) == 1 and tier not in self._prefillers:
            (only,) = known
            if only.url in exclude or not only.usable(now, ejected_too):
                return None
            uncached = num_tokens
            if chain:
                block_tokens = self._config.prefix_block_bytes / BYTES_PER_TOKEN
                uncached = max(0.0, num_tokens - only.prefixes.num_covered(chain) * block_tokens)
            only.sent_tokens += expected
            return self._started(Pick(only, None, uncached, chain))
        prefills: list[Worker] = []
        if tier in self._prefillers:
            prefills = [
                worker
                for worker in self._prefillers[tier]
                if worker.url not in exclude and worker.usable(now, ejected_too)
            ]
        candidates: Sequence[Worker] = ()
        if len(known) > 3 and not prefills:
            candidates = self._drawn(known, chain, now, exclude, ejected_too)
        if not candidates:
            decodes = [
                worker
                for worker in known
                if worker.url not in exclude and worker.usable(now, ejected_too)
            ]
            if not decodes:
                return None
            if prefills:
                decodes = with_prefill(decodes, prefills)
            candidates = self._candidates(decodes, chain)
        pairs: list[Pair] = []
        nearest = self._nearest(prefills, chain) if chain and len(prefills) > 3 else None
        for decode in candidates:
            partners: list[Worker] = []
            if prefills and decode.role == "decode":
                partners = [
                    prefill
                    for prefill in self._some(prefills, nearest)
                    if same_revision(decode, prefill)
                ]
            if partners:
                pairs += [(decode, prefill) for prefill in partners]
            else:
                pairs.append((decode, None))
        (decode, prefill), uncached = least_cost(
            pairs,
            chain,
            num_tokens,
            self._config.prefix_block_bytes / BYTES_PER_TOKEN,
            self._shared.get(tier),
            (*known, *self._prefillers.get(tier, ())),
        )
        decode.sent_tokens += expected
        return self._started(Pick(decode, prefill, uncached, chain))

    def _drawn(
        self,
        workers: Sequence[Worker],
        chain: Sequence[int],
        now: float,
        exclude: frozenset[str] | set[str],
        ejected_too: bool,
    ) -> list[Worker]:
        """Candidates among many, as `_candidates`, without a look at each of them.

        Who cannot be used is drawn again, so those that can have equal chances; nobody where two
        of them are not found soon.
        """
        chosen: list[Worker] = []
        number, random_ = len(workers), self._rng.random
        for _ in range(MOST_DRAWS):
            worker = workers[int(random_() * number)]
            if worker in chosen or worker.url in exclude or not worker.usable(now, ejected_too):
                continue
            chosen.append(worker)
            if len(chosen) == 2:
                break
        else:
            return []
        if chain:
            first = chain[0]
            holders = [
                worker
                for worker in workers
                if first in worker.prefixes
                and worker.url not in exclude
                and worker.usable(now, ejected_too)
            ]
            nearest = self._nearest(holders, chain)
            if nearest is not None and nearest not in chosen:
                chosen.append(nearest)
        return chosen

    def _candidates(self, workers: list[Worker], chain: Sequence[int]) -> list[Worker]:
        nearest = self._nearest(workers, chain) if chain and len(workers) > 3 else None
        return self._some(workers, nearest)

    def _some(self, workers: list[Worker], nearest: Worker | None) -> list[Worker]:
        """Two at random and the nearest; of up to three, all."""
        number = len(workers)
        if number == 1:
            return workers
        if number <= 3:
            # In random order, so that equal costs are shared out.
            return self._rng.sample(workers, number)
        random_ = self._rng.random
        first, second = int(random_() * number), int(random_() * (number - 1))
        chosen = [workers[first], workers[second + (second >= first)]]
        if nearest is not None and nearest not in chosen:
            chosen.append(nearest)
        return chosen

    def _nearest(self, workers: Iterable[Worker], chain: Sequence[int]) -> Worker | None:
        """One with the longest covered prefix: of many, the less busy of two."""
        most, found = 1, []
        for worker in workers:
            covered = worker.prefixes.num_covered(chain)
            if covered > most:
                most, found = covered, [worker]
            elif covered == most:
                found.append(worker)
        if len(found) > 2:
            found = self._rng.sample(found, 2)
        return min(found, key=Worker.queued_tokens, default=None)

    def _started(self, pick: Pick) -> Pick:
        decode, prefill = pick.decode, pick.prefill
        decode.num_inflight += 1
        if pick.chain:
            decode.prefixes.add(pick.chain, self._clock())
            shared = self._shared.get(decode.tier)
            if shared is None:
                shared = self._shared[decode.tier] = SharedPrefixes()
            shared.began(pick.chain)
        if prefill is None:
            decode.pending_tokens += pick.num_uncached_tokens
            return pick
        prefill.num_inflight += 1
        if pick.chain:
            prefill.prefixes.add(pick.chain, self._clock())
        prefill.pending_tokens += pick.num_uncached_tokens
        return pick

    def first_token(self, pick: Pick) -> None:
        """Prefill is over: its work no longer stands before others."""
        if not pick.prefill_done:
            pick.prefill_done = True
            (pick.prefill or pick.decode).pending_tokens -= pick.num_uncached_tokens
            if pick.prefill is not None:
                pick.prefill.num_inflight -= 1

    def handed_on(self, pick: Pick, worker: Worker) -> Pick:
        """The request went to `worker` instead of the one that was picked."""
        self.finished(pick)
        return self._started(Pick(worker, None, pick.num_uncached_tokens, pick.chain))

    def finished(self, pick: Pick) -> None:
        if not pick.prefill_done:
            self.first_token(pick)
        pick.decode.num_inflight -= 1
        if pick.chain:
            self._shared[pick.decode.tier].ended(pick.chain)

    def failed(self, worker: Worker, why: str) -> None:
        """Back off: nothing is sent there for a while, longer with every failure in a row."""
        backoff = min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2.0 ** min(worker.num_failures, 10))
        worker.num_failures += 1
        worker.down_until = self._clock() + backoff
        worker.last_error = why
        # If it restarted, its cache is gone; if not, affinity is soon learnt again.
        worker.prefixes.clear()

    def answered_well(self, pick: Pick) -> None:
        """As `first_token`, and `outcome` of an answer."""
        worker = pick.decode
        if not pick.prefill_done:
            self.first_token(pick)
        outcomes = worker.outcomes
        if outcomes.num_failures or outcomes.num_ejections:
            outcomes.succeeded()
        if worker.num_failures or worker.down_until:
            self.answered(worker)

    def outcome(self, worker: Worker, good: bool, hangs: bool = False) -> bool:
        """Count what a request came to there; True when that ejects the worker for a while."""
        if good:
            worker.outcomes.succeeded()
            self.answered(worker)
            return False
        others = [
            other.outcomes
            for other in self._workers.values()
            if other is not worker and (other.tier, other.role) == (worker.tier, worker.role)
        ]
        return worker.outcomes.failed(self._clock(), self._failover.outliers, others, hangs)

    def answered(self, worker: Worker) -> None:
        worker.num_failures = 0
        worker.down_until = 0.0

    def observed(self, worker: Worker, load: Load) -> None:
        """A fresh load report: the worker lives."""
        worker.load = load
        worker.sent_tokens = 0.0
        worker.draining = load.draining
        worker.last_error = None
        self.answered(worker)


def _both(one: Capabilities, other: Capabilities) -> Capabilities:
    """What two workers can do both, as while a rollout replaces one by the other."""
    lengths = [c.context_length for c in (one, other) if c.context_length is not None]
    return Capabilities(
        generation=one.generation and other.generation,
        tools=one.tools and other.tools,
        structured_output=one.structured_output and other.structured_output,
        images=one.images and other.images,
        logprobs=one.logprobs and other.logprobs,
        embeddings=one.embeddings and other.embeddings,
        context_length=min(lengths, default=None),
    )
