"""The scheduler and the engine around a fake model: every request ends, right, whatever happens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import hypothesis.strategies as st
from hypothesis import given, settings

from tandem_worker.engine.core import EngineCore
from tandem_worker.engine.drawn import Sampled
from tandem_worker.engine.profile import StepProfile
from tandem_worker.engine.requests import (
    EngineRequest,
    ErrorEvent,
    Event,
    ReservedEvent,
    TokenEvent,
    Work,
)
from tandem_worker.engine.sampling import SamplingParams
from tandem_worker.scheduling.kv_blocks import BlockManager
from tandem_worker.scheduling.ranking import Order
from tandem_worker.scheduling.scheduler import Scheduler, SchedulerLimits
from tandem_worker.scheduling.sequence import Sequence as ScheduledSequence

BLOCK = 4
ORDERS: tuple[Order, ...] = ("fcfs", "mlfq", "sjf", "edf")


def next_token(tokens: Sequence[int]) -> int:
    """The fake model: depends on every token, so a lost or stale position shows."""
    value = 7
    for token in tokens:
        value = (value * 31 + token + 1) % 9973
    return value % 50


def continuation(prompt: Sequence[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class FakeRunner:
    """Keeps what was written to each block slot and reads only that, as attention does."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.slots: dict[tuple[int, int], tuple[int, int]] = {}
        self.steps: list[list[tuple[str, int]]] = []
        self.fail_next = False

    def execute(
        self,
        work: Sequence[Work],
        num_decodes: int,
        on_layer: Callable[[int], None] | None,
    ) -> list[Sampled | None]:
        if self.fail_next:
            self.fail_next = False
            raise RuntimeError("out of memory")
        self.steps.append([(w.request.request_id, w.chunk.num_tokens) for w in work])
        assert all(w.chunk.num_tokens == 1 for w in work[:num_decodes])
        for item in work:
            chunk, sequence = item.chunk, item.chunk.sequence
            for position in range(chunk.start, chunk.start + chunk.num_tokens):
                where = (sequence.block_ids[position // BLOCK], position % BLOCK)
                self.slots[where] = (position, sequence.token_ids[position])
        out: list[Sampled | None] = []
        for item in work:
            chunk, sequence = item.chunk, item.chunk.sequence
            if not chunk.samples:
                out.append(None)
                continue
            seen = []
            for position in range(chunk.start + chunk.num_tokens):
                where = (sequence.block_ids[position // BLOCK], position % BLOCK)
                stored, token = self.slots[where]
                assert stored == position, "a block holds another position"
                seen.append(token)
            out.append(Sampled(next_token(seen)))
        if on_layer is not None:
            on_layer(0)
        return out


class Bench:
    """An engine on a virtual clock, stepped by hand."""

    def __init__(self, num_blocks: int = 16, order: Order = "fcfs", **limits: Any) -> None:
        self.now_s = 0.0
        self.runner = FakeRunner(num_blocks)
        self.blocks = BlockManager(num_blocks, block_size=BLOCK)
        self.scheduler = Scheduler(
            self.blocks,
            SchedulerLimits(**({"max_num_seqs": 4, "max_batched_tokens": 8} | limits)),
            order=order,
        )
        self.core = EngineCore(
            self.runner, self.scheduler, eos_token_ids=frozenset(), clock=lambda: self.now_s
        )
        self.events: dict[str, list[Event]] = {}
        self.finished: list[str] = []

    def add(self, name: str, prompt: list[int], max_tokens: int = 4, **fields: Any) -> None:
        sequence = ScheduledSequence(name, list(prompt), len(prompt), self.now_s, **fields)
        self.events[name] = []
        sampling = SamplingParams(temperature=0, max_tokens=max_tokens)
        self.core.add(EngineRequest(sequence, sampling, self.events[name].append))

    def step(self) -> None:
        self.now_s += 0.01
        for sink, event in self.core.step():
            sink(event)
        self.finished += [
            name
            for name, events in self.events.items()
            if name not in self.finished
            and events
            and getattr(events[-1], "finish_reason", None) is not None
        ]

    def run(self, limit: int = 2000) -> None:
        for _ in range(limit):
            if not self.core.has_work:
                return
            self.step()
            self.blocks.check()
        raise AssertionError("requests are still running: a livelock")

    def tokens(self, name: str) -> list[int]:
        return [e.token_id for e in self.events[name] if isinstance(e, TokenEvent)]


requests = st.lists(
    st.tuples(
        st.lists(st.integers(0, 2), min_size=1, max_size=20),
        st.integers(1, 12),
        st.integers(0, 6),
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=150, deadline=None)
@given(requests=requests, num_blocks=st.integers(8, 20), order=st.sampled_from(ORDERS))
def test_every_request_gets_its_own_continuation_even_when_blocks_run_short(
    requests: list[tuple[list[int], int, int]], num_blocks: int, order: Order
) -> None:
    bench = Bench(num_blocks, order)
    for number, (prompt, max_tokens, delay) in enumerate(requests):
        for _ in range(delay):
            bench.step()
        bench.add(f"r{number}", prompt, max_tokens, deadline_s=bench.now_s + len(prompt))

    bench.run()

    for number, (prompt, max_tokens, _) in enumerate(requests):
        assert bench.tokens(f"r{number}") == continuation(prompt, max_tokens)
    assert bench.blocks.num_used == 0


def test_decodes_go_first_and_prefill_chunks_fill_the_budget() -> None:
    bench = Bench(max_batched_tokens=8)
    bench.add("decoding", [1, 2], max_tokens=10)
    bench.step()
    bench.add("long", list(range(20)), max_tokens=1)

    for _ in range(3):
        bench.step()

    assert bench.runner.steps[1:] == [
        [("decoding", 1), ("long", 7)],
        [("decoding", 1), ("long", 7)],
        [("decoding", 1), ("long", 6)],
    ]


def test_a_preempted_sequence_recomputes_and_loses_nothing() -> None:
    bench = Bench(num_blocks=5)
    bench.add("old", [1, 2, 3, 4], max_tokens=12)
    bench.now_s += 1
    bench.add("young", [4, 3, 2, 1], max_tokens=12)

    bench.run()

    assert bench.core.counters.num_preemptions > 0
    assert bench.tokens("old") == continuation([1, 2, 3, 4], 12)
    assert bench.tokens("young") == continuation([4, 3, 2, 1], 12)
    assert bench.finished == ["old", "young"]


def finish_order(bench: Bench) -> list[str]:
    bench.run()
    return bench.finished


def test_fcfs_serves_in_order_of_arrival() -> None:
    bench = Bench(max_num_seqs=1)
    for name, length in (("a", 9), ("b", 3), ("c", 6)):
        bench.add(name, list(range(length)), 2)
        bench.now_s += 1

    assert finish_order(bench) == ["a", "b", "c"]


def test_sjf_serves_the_shortest_first() -> None:
    bench = Bench(order="sjf", max_num_seqs=1)
    for name, length in (("a", 9), ("b", 3), ("c", 6)):
        bench.add(name, list(range(length)), 2)

    assert finish_order(bench) == ["b", "c", "a"]


def test_sjf_serves_the_answer_first_that_is_predicted_to_be_shortest() -> None:
    scheduler = Scheduler(
        BlockManager(16, block_size=BLOCK),
        SchedulerLimits(max_num_seqs=1, max_batched_tokens=8),
        order="sjf",
    )
    for name, answer in (("long", 900), ("short", 20), ("middle", 300)):
        scheduler.add(ScheduledSequence(name, [1, 2], 2, predicted_output_tokens=answer), 0.0)

    assert scheduler.schedule(0.0).chunks[0].sequence.request_id == "short"
    assert [s.request_id for s in scheduler.waiting] == ["middle", "long"]
    assert scheduler.num_expected_tokens == 900 + 20 + 300


def test_an_answer_that_outgrows_its_prediction_is_expected_to_be_twice_as_long() -> None:
    sequence = ScheduledSequence("a", [1, 2], 2, predicted_output_tokens=4)

    remaining = []
    for _ in range(10):
        remaining.append(sequence.remaining_output_tokens)
        sequence.token_ids.append(7)

    assert remaining == [4, 3, 2, 1, 4, 3, 2, 1, 8, 7]


def test_edf_serves_the_least_slack_first() -> None:
    bench = Bench(order="edf", max_num_seqs=1)
    for name, deadline_s in (("a", 9.0), ("b", 3.0), ("c", 6.0)):
        bench.add(name, [1, 2, 3], 2, deadline_s=deadline_s)
    bench.add("whenever", [1], 2)

    assert finish_order(bench) == ["b", "c", "a", "whenever"]


def test_edf_counts_what_the_measured_steps_say_a_long_answer_takes() -> None:
    profile = StepProfile()
    for length in range(1, 20):
        profile.observe(0.1, decode_contexts=[length], prefills=[])
    slack_of = {}
    for measured in (False, True):
        scheduler = Scheduler(
            BlockManager(16, block_size=BLOCK),
            SchedulerLimits(max_num_seqs=1, max_batched_tokens=8),
            order="edf",
            **(
                {"service_time": lambda s: profile.service_time_s(0, 1, s.predicted_output_tokens)}
                if measured
                else {}
            ),
        )
        for name, deadline_s, answer in (("short", 5.0, 1), ("long", 9.0, 100)):
            scheduler.add(
                ScheduledSequence(
                    name, [1], 1, deadline_s=deadline_s, predicted_output_tokens=answer
                ),
                0.0,
            )
        slack_of[measured] = scheduler.schedule(0.0).chunks[0].sequence.request_id

    assert slack_of == {False: "short", True: "long"}


def test_priority_goes_before_any_order() -> None:
    for order in ORDERS:
        bench = Bench(order=order, max_num_seqs=1)
        bench.add("normal", [1], 2)
        bench.add("urgent", [1, 2, 3, 4, 5], 2, priority=-1)

        assert finish_order(bench) == ["urgent", "normal"], order


def test_mlfq_lets_a_short_request_overtake_a_long_one_that_is_running() -> None:
    bench = Bench(
        num_blocks=40, order="mlfq", max_num_seqs=1, max_batched_tokens=8, mlfq_quantum_tokens=8
    )
    bench.add("long", list(range(40)), max_tokens=30)
    for _ in range(8):
        bench.step()
    bench.add("short", [1, 2], max_tokens=2)

    assert finish_order(bench) == ["short", "long"]
    assert bench.tokens("long") == continuation(list(range(40)), 30)


def test_mlfq_does_not_starve_a_long_request() -> None:
    bench = Bench(
        num_blocks=40,
        order="mlfq",
        max_num_seqs=1,
        mlfq_quantum_tokens=4,
        mlfq_starvation_s=0.5,
    )
    bench.add("long", list(range(16)), max_tokens=2)
    for number in range(300):
        if number % 4 == 0:
            bench.add(f"short{number}", [1, 2], max_tokens=3)
        bench.step()

    assert "long" in bench.finished


def test_an_aborted_request_gives_everything_back_in_any_state() -> None:
    bench = Bench(num_blocks=8, max_num_seqs=2)
    bench.add("running", [1] * 6, max_tokens=20)
    bench.add("prefilling", [2] * 18, max_tokens=20)
    bench.add("waiting", [3] * 6, max_tokens=20)
    bench.step()

    for name in ("running", "prefilling", "waiting", "unknown"):
        bench.core.abort(name)

    assert not bench.core.has_work
    assert bench.blocks.num_used == 0


def test_a_step_that_fails_ends_its_requests_and_nothing_else() -> None:
    bench = Bench()
    bench.add("unlucky", [1, 2, 3])
    bench.runner.fail_next = True

    bench.step()
    bench.add("later", [1, 2, 3])
    bench.run()

    assert [type(event) for event in bench.events["unlucky"]] == [ErrorEvent]
    assert bench.tokens("later") == continuation([1, 2, 3], 4)
    assert bench.core.num_failed_steps == 0


def test_blocks_reserved_in_a_step_that_fails_are_announced_all_the_same() -> None:
    """Else nobody would fill or give back those blocks, and the request would wait for ever."""
    bench = Bench()
    bench.add("unlucky", [1, 2, 3])
    bench.add("remote", list(range(10)), remote_prefill=True)
    bench.runner.fail_next = True

    bench.step()

    assert len(reserved(bench, "remote").block_ids) == 3
    assert [type(event) for event in bench.events["unlucky"]] == [ErrorEvent]


def test_steps_that_fail_in_a_row_are_counted() -> None:
    bench = Bench()
    for number in range(3):
        bench.add(f"r{number}", [1, 2, 3])
        bench.runner.fail_next = True
        bench.step()

    assert bench.core.num_failed_steps == 3


# -- remote prefill ------------------------------------------------------------------------------


def reserved(bench: Bench, name: str) -> ReservedEvent:
    (event,) = bench.events[name]
    assert isinstance(event, ReservedEvent)
    return event


def write_blocks(bench: Bench, event: ReservedEvent, prompt: list[int]) -> None:
    """What a prefill worker's push does."""
    for position in range(event.num_computed_tokens, len(prompt)):
        block = event.block_ids[(position - event.num_computed_tokens) // BLOCK]
        bench.runner.slots[(block, position % BLOCK)] = (position, prompt[position])


def test_a_remote_prefill_skips_the_prompt_and_goes_on_decoding() -> None:
    bench = Bench()
    prompt = list(range(10))
    bench.add("r", prompt, max_tokens=4, remote_prefill=True)
    bench.step()
    event = reserved(bench, "r")
    assert not bench.core.has_work

    write_blocks(bench, event, prompt)
    for sink, token in bench.core.remote_done("r", next_token(prompt), None):
        sink(token)
    bench.run()

    assert bench.tokens("r") == continuation(prompt, 4)
    assert all(num_tokens == 1 for step in bench.runner.steps for _, num_tokens in step)


def test_a_prompt_that_waits_for_blocks_costs_no_choice_each_step() -> None:
    """The choice evaluates a fitted profile: it is made when a sequence is let in."""
    chosen: list[str] = []

    def choose(sequence: ScheduledSequence, uncached: int) -> bool:
        chosen.append(sequence.request_id)
        return False

    scheduler = Scheduler(
        BlockManager(4, block_size=BLOCK), SchedulerLimits(), choose_remote=choose
    )
    for token, name in enumerate(("first", "second")):
        scheduler.add(ScheduledSequence(name, [token] * 12, 12, remote_prefill=True), 0.0)

    for _ in range(5):
        scheduler.advance(scheduler.schedule(0.0))

    assert chosen == ["first"]


def test_a_preempted_sequence_has_its_answer_so_far_filled_too() -> None:
    """A prefill of the prompt alone would leave the answer's own positions empty."""
    bench = Bench(num_blocks=5)
    bench.add("old", [1, 2, 3, 4], max_tokens=12)
    bench.now_s += 1
    prompt = [4, 3, 2, 1]
    bench.add("young", prompt, max_tokens=12, remote_prefill=True)

    announced: list[tuple[int, ...]] = []
    for _ in range(200):
        bench.step()
        for event in bench.events["young"][len(bench.tokens("young")) + len(announced) :]:
            assert isinstance(event, ReservedEvent)
            announced.append(event.token_ids)
            write_blocks(bench, event, list(event.token_ids))
            for sink, token in bench.core.remote_done("young", next_token(event.token_ids), None):
                sink(token)

    assert bench.core.counters.num_preemptions > 0
    assert [len(tokens) for tokens in announced] == sorted({len(t) for t in announced})
    assert announced[-1] == (*prompt, *continuation(prompt, len(announced[-1]) - len(prompt)))
    assert len(announced) > 1
    assert bench.tokens("young") == continuation(prompt, 12)


def test_a_remote_prefill_reserves_only_what_is_not_cached() -> None:
    bench = Bench()
    prompt = list(range(10))
    bench.add("first", prompt, max_tokens=1)
    bench.run()

    bench.add("second", prompt, remote_prefill=True)
    bench.step()

    assert reserved(bench, "second").num_computed_tokens == 8
    assert len(reserved(bench, "second").block_ids) == 1


def test_a_failed_remote_prefill_is_done_here_in_other_blocks() -> None:
    bench = Bench()
    prompt = list(range(10))
    bench.add("r", prompt, remote_prefill=True)
    bench.step()

    exposed = bench.core.remote_failed("r")
    used_meanwhile = bench.blocks.num_used
    bench.run()

    assert bench.tokens("r") == continuation(prompt, 4)
    assert used_meanwhile == len(exposed) == 3  # a late write can hit nobody
    assert bench.blocks.num_used == 3
    bench.core.release_blocks(exposed)
    assert bench.blocks.num_used == 0


def test_an_aborted_remote_prefill_keeps_its_blocks_until_released() -> None:
    bench = Bench()
    bench.add("r", list(range(10)), remote_prefill=True)
    bench.step()

    exposed = bench.core.abort("r")

    assert bench.blocks.num_used == len(exposed) == 3
    assert bench.core.remote_done("r", 1, None) == []
    bench.core.release_blocks(exposed)
    assert bench.blocks.num_used == 0


class FakePush:
    """Remembers what was pushed."""

    def __init__(self) -> None:
        self.failure: Exception | None = None
        self.pushed: list[tuple[int, list[int], list[int]]] = []

    def layer_blocks_nowait(
        self, layer: int, local_block_ids: Sequence[int], remote_block_ids: Sequence[int]
    ) -> None:
        self.pushed.append((layer, list(local_block_ids), list(remote_block_ids)))


def add_push(bench: Bench, name: str, prompt: list[int], start: int, remote: list[int]) -> FakePush:
    push = FakePush()
    bench.events[name] = []
    bench.core.add(
        EngineRequest(
            ScheduledSequence(name, list(prompt), len(prompt), pinned=True),
            SamplingParams(temperature=0),
            bench.events[name].append,
            push=push,
            remote_block_ids=tuple(remote),
            push_from_tokens=start,
        )
    )
    return push


def test_prefill_pushes_full_blocks_per_chunk_and_the_partial_one_last() -> None:
    bench = Bench(max_batched_tokens=6)
    prompt = list(range(14))
    push = add_push(bench, "p", prompt, 4, [20, 21, 22])

    while bench.core.has_work:
        bench.step()
    held = bench.blocks.num_used
    bench.core.let_go("p")

    assert [remote for _, _, remote in push.pushed] == [[20, 21], [22]]
    assert bench.tokens("p") == continuation(prompt, 1)
    assert held == 4  # the push may still be reading them
    assert bench.blocks.num_used == 0


def test_prefill_pushes_blocks_it_had_in_its_cache() -> None:
    bench = Bench()
    prompt = list(range(14))
    bench.add("before", prompt, max_tokens=1)
    bench.run()

    push = add_push(bench, "p", prompt, 0, [20, 21, 22, 23])
    bench.step()

    assert [remote for _, _, remote in push.pushed] == [[20, 21, 22, 23]]


def test_mlfq_takes_no_blocks_from_a_push_and_lets_it_go_on() -> None:
    """Blocks that a push is reading would be overwritten under it."""
    bench = Bench(
        num_blocks=8, order="mlfq", max_num_seqs=1, max_batched_tokens=8, mlfq_quantum_tokens=4
    )
    push = add_push(bench, "p", list(range(20)), 0, [20, 21, 22, 23, 24])
    bench.step()
    bench.add("short", [1] * 16, max_tokens=2, priority=-1)

    while not bench.finished:
        bench.step()
        bench.core.let_go("p")
        bench.blocks.check()

    assert bench.core.counters.num_preemptions == 0
    assert [remote for _, _, remote in push.pushed] == [[20, 21], [22, 23], [24]]
    assert bench.tokens("p") == continuation(list(range(20)), 1)
    bench.run()
    assert bench.tokens("short") == continuation([1] * 16, 2)


def test_a_prefill_order_without_an_answer_still_draws_the_first_token() -> None:
    bench = Bench()
    push = FakePush()
    bench.events["p"] = []
    bench.core.add(
        EngineRequest(
            ScheduledSequence("p", [1, 2, 3], 3, pinned=True),
            SamplingParams(temperature=0, max_tokens=0),
            bench.events["p"].append,
            push=push,
            remote_block_ids=(7,),
        )
    )

    bench.step()

    assert bench.tokens("p") == continuation([1, 2, 3], 1)


def test_a_broken_push_stops_the_prefill() -> None:
    bench = Bench(max_batched_tokens=6)
    push = add_push(bench, "p", list(range(14)), 0, [20, 21, 22, 23])
    bench.step()
    push.failure = ConnectionError("peer gone")

    bench.step()

    assert isinstance(bench.events["p"][-1], ErrorEvent)
    assert not bench.core.has_work
    assert bench.blocks.num_used == 0
