"""A request's way to its workers: pick, ask, be refused or failed, wait, ask another.

`open` returns a reply that began well; whoever reads it tells back whether it was an answer
(`answered`) or not (`failed`). What happens after a failure is decided in one place, `failed`:

* before the first token another worker of the tier is asked, then another tier where the client
  named none, then a worker that may come back; within one deadline, counted from the arrival;
* after it only another worker of the same tier may go on, with the token ids that were forwarded.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Mapping, Sequence, Set
from functools import cached_property

from tandem_router.balancing.endpoint_picker import MAX_BACKOFF_S, Pick
from tandem_router.balancing.silence import longest_silence_s
from tandem_router.balancing.worker import Worker
from tandem_router.engines import engine_of
from tandem_router.engines.protocol import Headers, Resumption
from tandem_router.errors import ApiError, UpstreamError, overloaded
from tandem_router.http.response import Response
from tandem_router.proxy.arrival import LONGEST_ANSWER_TOKENS
from tandem_router.proxy.context import Services
from tandem_router.proxy.faults import (
    Fault,
    FaultKind,
    Refusal,
    RequestRefused,
    of_refusal,
    of_transport,
    refusal_of,
)
from tandem_router.proxy.prefix_chain import chain_of
from tandem_router.proxy.tier_assignment import TierAssignment
from tandem_router.proxy.upstream_request import (
    provider_lines,
    target,
    told,
    upstream_body,
    upstream_headers,
)
from tandem_router.routing.tier_router import gone_tier

logger = logging.getLogger("tandem.router")

# How often a held request looks for a worker; it is also woken when a load report arrives.
LOOK_AGAIN_S = 0.1
# Failures on one tier after which a request that may goes to another one.
FAILURES_BEFORE_LEAVING = 3
# Tries of one request at one provider: each may be billed.
PROVIDER_TRIES = 3
# A whole reply sends nothing until it is complete, so silence says less than in a stream.
WHOLE_REPLY_PATIENCE = 10.0
# Workers that one request may find to hang; then it is rather the request that takes long.
MOST_HUNG = 3
# How long a reply whose answer is complete may take to end.
ENDING_S = 0.05

NOBODY: frozenset[str] = frozenset()
_BUSY = frozenset({FaultKind.FULL, FaultKind.CLOSED})
_PASSING = frozenset({FaultKind.UNREACHABLE, FaultKind.BROKEN, FaultKind.SERVER_ERROR})
_RESTARTING = frozenset({FaultKind.UNREACHABLE, FaultKind.BROKEN})


def _is_no_stream(headers: Mapping[bytes, bytes]) -> bool:
    """Whether a reply is something else, or one that cannot be read."""
    content_type = headers.get(b"content-type", b"")
    packed = headers.get(b"content-encoding", b"identity") != b"identity"
    return packed or content_type.find(b"json") >= 0 or content_type.find(b"html") >= 0


class Retries:
    """The workers of one request, one after the other."""

    # What most requests leave as it is, so that making one costs little.
    _pick: Pick | None = None
    _response: Response | None = None
    _num_attempts = 0
    # Whether a worker or provider has the request, or answered it: it may have used tokens.
    asked = False
    holds = False  # a worker, a reply, or a place among the retries of a tier
    _left_out: frozenset[str]  # workers of the tier that failed this request
    _left_out_of: Mapping[str, frozenset[str]] = {}  # the same of the tiers before
    _busy: frozenset[str]  # workers to be asked again a little later
    _is_funded = True  # there is money for another try of this tier
    _retry_of: str | None = None  # tier whose retry budget the present attempt uses
    _num_hung = 0  # workers that this request was with and that were found to hang
    _hangs = False  # the worker that has it was
    # Of the present tier:
    _num_failures = 0
    _waits_since: float | None = None  # no worker of it could be had since then
    _full: Fault | None = None
    # Only those are left that failed others lately: each is asked once, and soon.
    _last_resort = False

    def __init__(self, services: Services, assignment: TierAssignment) -> None:
        self._services = services
        self._failover = services.config.failover
        self._assignment = assignment
        self._arrival = assignment.arrival
        self._deadline = assignment.arrival.deadline
        self._faults: dict[str, Fault] = {}  # the last one of each tier
        self._left_out = self._busy = NOBODY

    @cached_property
    def _chain(self) -> Sequence[int]:
        """What the request shares with earlier ones."""
        chain = self._assignment.chain
        return chain_of(self._services, self._arrival) if chain is None else chain

    async def open(self, body: bytes, resumption: Resumption | None = None) -> Response:
        """A 200 reply from some worker, its headers read.

        resumption: what is sent instead of `body` where a stream is gone on with.

        Raises ApiError when none can be had in time, RequestRefused for the request's own fault.
        """
        while True:
            pick = self._picked() if self._num_attempts == 0 else None
            if pick is None:
                pick = await self._acquire()
            self._hold(pick)
            try:
                return await self._ask(pick, body, resumption)
            except Fault as fault:
                self.failed(fault)

    def take(self, but: Set[str] = NOBODY) -> Pick | None:
        """Hold workers now for whoever asks them in our stead; None where none is usable.

        but: URLs that may not be asked.
        """
        self._left_out |= but
        pick = self._picked()
        if pick is not None:
            self._hold(pick)
        return pick

    def _hold(self, pick: Pick) -> None:
        """Until `release`."""
        self._pick, self.holds = pick, True
        assignment = self._assignment
        self._services.metrics.tiers[assignment.name].inflight.value += 1.0
        record = assignment.record
        record.decode_worker = pick.decode.url
        record.prefill_worker = pick.prefill.url if pick.prefill is not None else None
        self._num_attempts += 1
        self.asked = True
        worker, request, num_tokens = pick.decode, self._arrival.request, 1
        if not request.stream:
            most = request.max_tokens
            num_tokens = LONGEST_ANSWER_TOKENS if most is None else most
        if num_tokens > worker.longest_answer or worker.num_inflight == 1:
            worker.longest_answer = num_tokens

    def stood_in(self, worker: Worker) -> None:
        """Whoever asks in our stead did not reach the worker that was taken, but this one."""
        assert self._pick is not None
        picker, record = self._services.picker, self._assignment.record
        picker.failed(self._pick.decode, "the gateway did not reach it")
        self._pick = picker.handed_on(self._pick, worker)
        record.decode_worker = worker.url
        record.num_failovers += 1
        self._services.metrics.failovers[(worker.tier, "gateway")].inc()

    def answered(self) -> None:
        """The reply is an answer: its first token is here, or all of it."""
        if self._pick is not None:
            self._services.picker.answered_well(self._pick)
            response = self._response  # None: a gateway carries it
            now = self._services.clock() if response is None else response.last_data
            self._pick.decode.heard_at = now
        if self._retry_of is not None:
            self._give_back_retry()  # what is answered adds to no storm
        if self._response is not None:
            self._response.began()

    def failed(self, fault: Fault) -> None:
        """The attempt gave no answer; decides who may try next.

        Raises ApiError when nobody may, RequestRefused where the fault was the request's own.
        """
        assignment, worker = self._assignment, self.lost(fault)
        external = assignment.is_external
        if fault.kind is FaultKind.INCAPABLE:
            changed = self._change_tier(spent=True)  # what it cannot do it cannot do later either
            if not changed and not self._change_tier(last_resort=True, spent=True):
                raise RequestRefused(fault.status or 400, fault.body)
        elif fault.kind in _BUSY:
            self._busy |= {worker.url}
            if fault.kind is FaultKind.FULL:
                self._full = fault
            changed = not external or self._change_tier() or self._queues()
            if not changed and not self._change_tier(last_resort=True):
                raise refusal_of(self._faults)
        elif assignment.committed:
            if external:
                raise refusal_of(self._faults)  # only token ids can be gone on from exactly
            self._deadline = self._services.clock() + self._failover.wait_s
        else:
            self._after_failure(fault, worker)

    def lost(self, fault: Fault) -> Worker:
        """Tell everybody of an attempt that gave no answer, and let go of its worker."""
        assignment, pick = self._assignment, self._pick
        assert pick is not None
        tier, worker = assignment.tier, pick.decode
        # A worker that is busy or starts is asked again and again: said once at most.
        seen = self._faults.get(tier.name)
        again = seen is not None and seen.kind is fault.kind
        logger.log(
            logging.DEBUG if again or fault.kind is FaultKind.FULL else logging.WARNING,
            "request %s: tier %s, worker %s: %s",
            self._arrival.request_id,
            tier.name,
            worker.url,
            fault,
        )
        label = str(fault.status) if fault.status is not None else str(fault.kind)
        self._services.metrics.upstream_errors[(tier.name, label)].inc()
        self._tell_picker(worker, fault)
        self.release(close=True)
        self._is_funded = assignment.gave_up(fault)
        self.asked = assignment.committed
        self._faults[tier.name] = fault
        return worker

    def _after_failure(self, fault: Fault, worker: Worker) -> None:
        """Before the first token: another worker, another tier, or the same worker once more."""
        external, hung = self._assignment.is_external, self._hangs
        self._hangs = False
        if fault.kind is not FaultKind.UNREACHABLE:
            self._num_failures += 1
        restarting = not external and fault.kind in _RESTARTING
        if not restarting or self._last_resort:
            self._left_out |= {worker.url}
        leave = self._assignment.others() and self._num_failures >= FAILURES_BEFORE_LEAVING
        if not leave:
            if self._has_other_worker(worker) and self._may_retry(fault, hung):
                return
            waits = not self._last_resort and self._num_attempts < self._failover.max_attempts
            if restarting and waits:
                return  # `_acquire` waits for it, and changes tier where that takes long
        if self._change_tier():
            return
        num_tries = self._num_failures if fault.kind is not FaultKind.UNREACHABLE else 0
        may_pass = external and fault.kind in _PASSING and num_tries < PROVIDER_TRIES
        if may_pass and self._num_attempts < PROVIDER_TRIES and self._may_retry(fault):
            self._left_out -= {worker.url}
            return
        resting = self._services.picker.resting(self._assignment.name, self._left_out)
        if resting and self._may_retry(fault):
            self._last_resort = True
            return
        if not self._change_tier(last_resort=True):
            raise self._refused()

    def let_end(self) -> None:
        """The answer is complete; what is left of the reply may come, for its connection's sake."""
        if self._response is not None:
            self._response.let_end(ENDING_S)
            self._response = None

    def release(self, close: bool = False) -> None:
        """Let go of the worker; `close` gives up what is left of its reply."""
        if self._pick is not None:
            worker, tier = self._pick.decode, self._pick.decode.tier
            if self._response is not None and self._response.has_begun:
                worker.heard_at = max(worker.heard_at, self._response.last_data)
            self._services.picker.finished(self._pick)
            self._services.metrics.tiers[tier].inflight.value -= 1.0
            self._pick = None
        if self._retry_of is not None:
            self._give_back_retry()
        response = self._response
        if response is not None and (close or response.done):
            response.close()
            self._response = None
        self.holds = self._response is not None

    def _give_back_retry(self) -> None:
        assert self._retry_of is not None
        self._services.picker.retries(self._retry_of).give_back()
        self._retry_of = None

    # -- one attempt ------------------------------------------------------------------------

    async def _ask(self, pick: Pick, body: bytes, resumption: Resumption | None) -> Response:
        """Raises Fault, RequestRefused."""
        services, arrival, assignment = self._services, self._arrival, self._assignment
        tier, request = assignment.tier, arrival.request
        path, max_tokens = request.path, assignment.decision.max_tokens
        if resumption is not None:
            body = resumption.body
            if resumption.path != path:
                # Bounded already, by what is left of the answer.
                path, max_tokens = resumption.path, None
        external = assignment.is_external
        headers: Headers | bytes
        if external:
            headers = provider_lines(services, assignment.name, arrival.request_id)
            body = upstream_body(tier, arrival, body, max_tokens, None)
        else:
            known = told(services, assignment, pick)
            headers = upstream_headers(services, tier, arrival, known)
            body = upstream_body(tier, arrival, body, max_tokens, known)
            if pick.prefill is not None:
                body = await self._prefilled(pick, headers, path, body)
        stall_s = self._failover.stall_timeout_s
        if not request.stream:
            stall_s *= WHOLE_REPLY_PATIENCE
        try:
            response = self._response = await services.client.request(
                "POST",
                target(pick.decode.url, path, external),
                headers=headers,
                body=body,
                stall_timeout_s=stall_s,
                begin_within_s=self._patience_s(),
                more_s=self._more_patience_s,
                outward=external,
                may_repeat=self._repeats if external else None,
            )
            status = response.status
            if status != 200:
                payload = await response.read_all(4 * 2**20)
        except UpstreamError as error:
            raise of_transport(error) from error
        if status != 200:
            verdict = of_refusal(Refusal(response.status, response.headers, payload, external))
            if isinstance(verdict, RequestRefused):
                self.release()
                self.asked = False  # refused: nothing was generated
            raise verdict
        if request.stream and _is_no_stream(response.headers):
            why = "no stream where one was asked for"
            is_json = response.headers.get(b"content-type", b"").find(b"json") >= 0
            raise Fault(FaultKind.BAD_ANSWER, why, status=200, whole=is_json)
        return response

    def _repeats(self) -> bool:
        """A provider closed its kept connection on a request that it may have read, and bill."""
        fault = Fault(FaultKind.BROKEN, "closed a kept connection")
        return self._assignment.gave_up(fault)

    async def _prefilled(self, pick: Pick, headers: Headers, path: str, body: bytes) -> bytes:
        """The decode worker's body once the prefill worker is done, where the router asks it.

        A prefill worker that fails costs one prefill: the decode worker then computes it itself.
        """
        engine, prefill = engine_of(self._assignment.tier.engine), pick.prefill
        order = engine.prefill_order(self._arrival.request, body)
        if order is None or prefill is None:
            return body
        picker = self._services.picker
        try:
            response = await self._services.client.request(
                "POST", prefill.url + path, headers=headers, body=order[1]
            )
            reply = await response.read_all()
            if response.status != 200:
                raise ValueError(f"the prefill worker answered {response.status}")
            return engine.handed_over(body, reply)
        except (UpstreamError, ValueError) as error:
            logger.warning("prefill worker %s: %s", prefill.url, error)
            if isinstance(error, UpstreamError):
                picker.failed(prefill, str(error))
            return body

    def _patience_s(self) -> float | None:
        """How long an attempt may go without the beginning of an answer; None: until it stalls.

        That is the part of the time that a tier gets where another one could answer: whether any
        could is looked at when it is over (`_more_patience_s`).
        """
        if self._assignment.committed:
            return None
        answer_s = self._arrival.answer_s
        left = self._deadline + answer_s - self._services.clock()
        share = self._failover.wait_s / 2.0
        if self._assignment.is_external:
            patience_s = self._failover.tier_patience_s
            share = patience_s if patience_s < share else share
        share += answer_s
        least = share if share < left else left
        return least if least > 0.001 else 0.001

    def _more_patience_s(self, now: float, sent_at: float) -> float:
        """How much longer an attempt may take; none where something else could be answered.

        A worker of ours that reports its load and answers somebody may take as long as its queue
        is. Times are the loop's.
        """
        assignment = self._assignment
        external = assignment.is_external
        left_s = 0.0 if external else self._silence_left_s(now, sent_at)
        if assignment.has_answer or assignment.others():
            return 0.0
        if external:
            return self._deadline + self._arrival.answer_s - self._services.clock()
        return left_s

    def _silence_left_s(self, now: float, sent_at: float) -> float:
        """How much longer our worker may answer nobody before it hangs: not above 0 if it does.

        Without another worker there is nothing to leave it for; it is looked at again.
        """
        assert self._pick is not None
        worker, failover = self._pick.decode, self._failover
        if self._num_hung >= MOST_HUNG or self._num_attempts >= failover.max_attempts:
            return math.inf
        num_tokens = float(self._arrival.request.num_prompt_tokens)
        heard_at = max(sent_at, worker.heard_at, self._services.client.heard_at(worker.url))
        silence_s = longest_silence_s(worker, num_tokens, failover)
        left_s = heard_at + silence_s - now
        if left_s > 0.0:
            return left_s
        if not self._has_other_worker(worker):
            return silence_s
        self._hangs = True
        self._num_hung += 1
        return 0.0

    # -- who is next ------------------------------------------------------------------------

    async def _acquire(self) -> Pick:
        """Workers for this request; waits for one that restarts, changes tier where allowed."""
        services, failover, assignment = self._services, self._failover, self._assignment
        picker = services.picker
        if self._num_attempts >= failover.max_attempts:
            raise self._no_worker(f"{self._num_attempts} attempts failed")
        began = services.clock()
        held: str | None = None
        asleep = False
        try:
            while True:
                name = assignment.name
                external = assignment.is_external
                pick = self._picked()
                if pick is not None:
                    return pick
                now = services.clock()
                if self._waits_since is None:
                    self._waits_since = now
                all_full = self._full is not None and picker.num_usable(name) > 0
                changed = False
                if all_full and not assignment.committed and not self._queues():
                    changed = self._downgrades() and self._change_tier()
                    if not changed:
                        services.arrivals.refused()
                        raise refusal_of(self._faults)
                lost = external or picker.gone(name)
                tier_wait_s = 0.0 if lost else failover.tier_wait_s
                if not changed and not all_full and now >= self._waits_since + tier_wait_s:
                    if assignment.has_answer and not assignment.committed:
                        raise self._refused("none is ready, and another answer is there")
                    changed = self._change_tier()
                    if not changed and now >= self._waits_since + failover.wait_s / 2.0:
                        changed = self._change_tier(last_resort=True)
                if changed:
                    services.arrivals.let_go(held)
                    held = None
                    continue
                if picker.gone(name):
                    raise gone_tier(name)
                if picker.num_listed(name) == 0:
                    asleep, limit = True, max(self._deadline, began + failover.wake_s)
                else:
                    if asleep:
                        # It woke up: from here it is a worker like any other that starts.
                        asleep, self._deadline = False, now + failover.wait_s
                    limit = self._deadline
                if now >= limit:
                    raise self._refused(f"none came within {now - self._arrival.started_at:.3g} s")
                if self._last_resort and now >= self._waits_since + MAX_BACKOFF_S:
                    raise self._refused("those that failed lately still do")
                if held is None:
                    services.arrivals.held(name)
                    held = name
                services.workers_changed.clear()
                try:
                    async with asyncio.timeout(min(LOOK_AGAIN_S, limit - now)):
                        await services.workers_changed.wait()
                except TimeoutError:
                    pass
                self._busy = NOBODY
        finally:
            services.arrivals.let_go(held)

    def _picked(self) -> Pick | None:
        """A worker that may be asked; one that failed others lately where there is no choice."""
        picker, assignment = self._services.picker, self._assignment
        name, arrival = assignment.name, self._arrival
        num_tokens = float(arrival.request.num_prompt_tokens)
        exclude = self._busy | self._left_out
        if arrival.adapter is not None:
            exclude = exclude | picker.without(name, arrival.adapter)
        remembers = not assignment.is_external or self._services.routing.holds_prefixes(name)
        chain = self._chain if remembers else ()
        expected = assignment.expected_tokens()
        pick = picker.pick(name, chain, num_tokens, exclude, False, expected)
        if pick is None and not assignment.others():
            pick = picker.pick(name, chain, num_tokens, exclude, True, expected)
        return pick

    def _has_other_worker(self, worker: Worker) -> bool:
        picker, name = self._services.picker, self._assignment.name
        gone = self._left_out | {worker.url}
        if self._arrival.adapter is not None:
            gone |= picker.without(name, self._arrival.adapter)
        usable = picker.usable(name)
        return any(other.url not in gone for other in usable)

    def _may_retry(self, fault: Fault, hung: bool = False) -> bool:
        """Whether the tier can bear one more try; what nobody has seen costs it nothing.

        hung: its worker hangs. What that had is moved like what one had that died: all of it.
        """
        if fault.kind is FaultKind.UNREACHABLE:
            return True
        if not self._is_funded or hung:
            return self._is_funded
        name, picker = self._assignment.name, self._services.picker
        if not picker.retries(name).take(picker.num_inflight(name)):
            return False
        self._retry_of, self.holds = name, True  # it may be refused before it has a worker
        return True

    def _change_tier(self, last_resort: bool = False, spent: bool = False) -> bool:
        assignment, left_out = self._assignment, self._left_out | self._busy
        left = assignment.name
        spent = spent or not self._services.picker.resting(left, left_out)
        if not assignment.change(last_resort, spent):
            return False
        self._left_out_of = {**self._left_out_of, left: left_out}
        self._last_resort = last_resort
        self._num_failures = 0
        self._waits_since = None
        self._left_out, self._busy = self._left_out_of.get(assignment.name, NOBODY), NOBODY
        self._full = None
        return True

    def _tell_picker(self, worker: Worker, fault: Fault) -> None:
        """A full worker is well; one that stops or starts is no outlier; all else counts."""
        picker = self._services.picker
        if fault.kind in (FaultKind.FULL, FaultKind.INCAPABLE):
            # Refusals are waited out by time; only broken attempts are counted.
            self._num_attempts -= 1
            return
        if fault.kind is FaultKind.CLOSED:
            self._num_attempts -= 1
            worker.draining = worker.draining or fault.draining
            if not fault.draining:
                picker.failed(worker, str(fault))
            return
        if fault.kind is FaultKind.UNREACHABLE and self._assignment.tier.kind == "pool":
            # Waiting for a restart is bounded by time, not by knocks on its door.
            self._num_attempts -= 1
        if self._hangs:
            logger.warning(
                "worker %s of tier %s hangs: it reports its load and answers nobody",
                worker.url,
                worker.tier,
            )
        picker.failed(worker, str(fault))
        if picker.outcome(worker, good=False, hangs=self._hangs):
            self._services.metrics.ejections[(worker.tier,)].inc()
            logger.warning("worker %s of tier %s is left out: %s", worker.url, worker.tier, fault)

    def _queues(self) -> bool:
        return self._services.config.budget.on_exhausted == "Queue"

    def _downgrades(self) -> bool:
        return self._services.config.budget.on_exhausted == "Downgrade"

    def _refused(self, why: str = "it does not answer") -> ApiError:
        """What the client is told: which tiers failed, or that a worker is still awaited."""
        tier = self._assignment.tier
        fault = self._faults.get(tier.name)
        lost = fault is None or fault.kind in _RESTARTING or fault.kind is FaultKind.CLOSED
        if tier.kind == "pool" and lost and self._faults.keys() <= {tier.name}:
            return self._no_worker(why)
        return refusal_of(self._faults) if self._faults else self._no_worker(why)

    def _no_worker(self, why: str) -> ApiError:
        self._services.arrivals.refused()
        return overloaded(
            f"tier {self._assignment.name!r} has no worker that can take the request: {why}; "
            "retry later",
            code="no_worker",
            retry_after_s=5.0,
            status=503,
        )
