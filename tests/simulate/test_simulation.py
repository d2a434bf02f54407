"""A simulated cluster loses nothing, repeats itself exactly and takes no shortcut that shows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem_operator.simulate.arrivals import Arrival, generate
from tandem_operator.simulate.cluster import PoolPlan, remote_is_cheaper
from tandem_operator.simulate.engine import EngineSettings
from tandem_operator.simulate.front import TierPlan
from tandem_operator.simulate.outcome import Targets
from tandem_operator.simulate.profiles import Profile
from tandem_operator.simulate.simulation import Simulation, SimulationPlan
from tandem_router.balancing.endpoint_picker import Picker
from tandem_worker.disaggregation.decode_side import RemoteCosts
from tandem_worker.scheduling.kv_blocks import BlockManager
from tandem_worker.scheduling.scheduler import Scheduler

PROFILE = Profile((0.01, 1e-4, 1e-9), (0.02, 1e-7, 2e-4), kv_tokens=64 * 200)


class StepByStep(Profile):
    """The same times, but no run of decode steps is taken at once."""

    def decode_line(self, num_decodes: int, decode_context: int) -> None:  # type: ignore[override]
        return None


def pool(role: str = "unified", replicas: int = 1, **settings_: object) -> PoolPlan:
    engine = EngineSettings(max_num_seqs=8, max_batched_tokens=256, kv_tokens=PROFILE.kv_tokens)
    return PoolPlan("t", role, replicas, PROFILE, replace(engine, **settings_))  # type: ignore[arg-type]


def simulate(arrivals: Iterator[Arrival], *pools: PoolPlan, **plan: object) -> Simulation:
    simulation = Simulation(
        SimulationPlan((TierPlan("t"),), {p.key: p for p in pools}, **plan),  # type: ignore[arg-type]
        arrivals,
    )
    simulation.run()
    return simulation


requests = st.lists(
    st.tuples(st.floats(0.0, 3.0), st.integers(1, 700), st.integers(1, 90)), max_size=25
)


def arrivals_of(rows: list[tuple[float, int, int]]) -> Iterator[Arrival]:
    return (Arrival(at, prompt, {"": output}) for at, prompt, output in sorted(rows))


@settings(max_examples=40, deadline=None)
@given(rows=requests, split=st.booleans(), prefix_cache=st.booleans())
def test_every_request_is_served_once_and_every_block_comes_back(
    rows: list[tuple[float, int, int]], split: bool, prefix_cache: bool
) -> None:
    pools = [pool("prefill"), pool("decode", 2)] if split else [pool("unified", 2)]
    pools = [replace(p, settings=replace(p.settings, prefix_cache=prefix_cache)) for p in pools]

    simulation = simulate(arrivals_of(rows), *pools)

    assert len(simulation.outcomes) == len(rows)
    assert sum(simulation.outcomes.output_tokens) == sum(output for _, _, output in rows)
    for pod in simulation.cluster.pods.values():
        pod.worker.blocks.check()
        assert pod.worker.blocks.num_used == 0
        assert pod.worker.num_requests == 0
    assert all(w.num_inflight == 0 for w in simulation.cluster.picker.workers)


@settings(max_examples=40, deadline=None)
@given(rows=requests, split=st.booleans())
def test_runs_of_steps_taken_at_once_change_no_result(
    rows: list[tuple[float, int, int]], split: bool
) -> None:
    pools = [pool("prefill"), pool("decode")] if split else [pool()]
    slow = [
        replace(p, profile=StepByStep(PROFILE.prefill, PROFILE.decode, PROFILE.kv_tokens))
        for p in pools
    ]

    at_once = simulate(arrivals_of(rows), *pools).outcomes
    one_by_one = simulate(arrivals_of(rows), *slow).outcomes

    assert sorted(at_once.ttft_s) == pytest.approx(sorted(one_by_one.ttft_s), abs=1e-5)
    assert sorted(at_once.e2e_s) == pytest.approx(sorted(one_by_one.e2e_s), abs=1e-5)


def test_the_same_seed_gives_the_same_bytes() -> None:
    def run(seed: int) -> str:
        arrivals = generate(4.0, 60.0, 7, prompt_tokens=(300, 90), output_tokens=(40, 10))
        return json.dumps(simulate(arrivals, pool("unified", 4), seed=seed).result())

    assert run(3) == run(3)
    assert run(3) != run(4)  # the picker draws


def test_the_simulator_drives_the_production_objects() -> None:
    simulation = simulate(arrivals_of([(0.0, 100, 5)]), pool())

    assert type(simulation.cluster.picker) is Picker
    for pod in simulation.cluster.pods.values():
        assert type(pod.worker.scheduler) is Scheduler
        assert type(pod.worker.blocks) is BlockManager


def test_latencies_of_a_lone_request_are_those_of_the_profile() -> None:
    outcomes = simulate(arrivals_of([(0.0, 200, 11)]), pool()).outcomes

    prefill = PROFILE.step_s([(0, 200)])
    steps = [PROFILE.step_s([], [201 + i]) for i in range(10)]
    assert outcomes.ttft_s[0] == pytest.approx(prefill, rel=1e-5)
    assert outcomes.e2e_s[0] == pytest.approx(prefill + sum(steps), rel=1e-5)


def test_a_prompt_of_a_split_tier_is_computed_by_the_prefill_worker_alone() -> None:
    split = (pool("prefill"), replace(pool("decode"), local_prefill_max_tokens=0))

    simulation = simulate(arrivals_of([(0.0, 200, 11), (5.0, 300, 4)]), *split)

    tokens = {p.pool.role: p.worker.num_prefill_tokens for p in simulation.cluster.pods.values()}
    assert tokens == {"prefill": 500, "decode": 0}


def test_without_a_prediction_the_order_by_length_cannot_see_the_true_one() -> None:
    """As live: the simulator tells a scheduler no more than its router would."""
    rows = [(0.0, 100, 300), *((0.01 * i, 100, 310 - 10 * i) for i in range(1, 31))]
    blind = list(arrivals_of(rows))
    told = [replace(a, expected_tokens=a.output_of("")) for a in blind]

    first, second = (
        simulate(iter(trace), pool(order="sjf", max_num_seqs=1)).result()["e2e_s"]["mean"]
        for trace in (blind, told)
    )

    assert second < 0.8 * first


def test_a_prefix_that_was_computed_before_is_not_computed_again() -> None:
    prefix = tuple(range(10))
    arrivals = [Arrival(t, 640, {"": 2}, prefix, block_tokens=64) for t in (0.0, 5.0)]

    simulation = simulate(iter(arrivals), pool())

    (pod,) = simulation.cluster.pods.values()
    assert pod.worker.num_prefill_tokens == 640 + 64  # the last block has the token to compute


def test_a_request_longer_than_any_worker_holds_is_rejected_and_counts_as_missed() -> None:
    simulation = simulate(
        arrivals_of([(0.0, 100, 5), (1.0, 64 * 200, 5)]), pool(), targets=Targets(ttft_s=5.0)
    )

    result = simulation.result()
    assert (result["served"], result["rejected"]) == (1, 1)
    assert result["slo"]["both"] == 0.5


def test_overload_ends_requests_that_nobody_takes_in_time_instead_of_never() -> None:
    arrivals = generate(40.0, 20.0, 1, prompt_tokens=(500,), output_tokens=(200,))

    result = simulate(arrivals, pool(max_waiting=2)).result()

    assert result["failed"] > 0
    assert result["served"] + result["failed"] == result["requests"]


def test_scaling_down_breaks_no_request() -> None:
    arrivals = generate(2.0, 60.0, 5, prompt_tokens=(300,), output_tokens=(300,))
    simulation = Simulation(
        SimulationPlan((TierPlan("t"),), {("t", "unified"): pool("unified", 6)}), arrivals
    )
    for at_s in range(5, 60, 5):
        replicas = 1 + at_s % 3
        simulation.clock.at(float(at_s), simulation.cluster.scale, ("t", "unified"), replicas)

    result = simulation.run()

    assert result["served"] == result["requests"]
    assert len(simulation.cluster.pods) == 1 + 55 % 3


@given(
    tokens=st.integers(1, 20_000),
    running=st.integers(0, 64),
    latency_s=st.sampled_from([0.0, 0.002, 0.05, 1.0]),
)
def test_a_prompt_goes_where_a_live_decode_worker_would_send_it(
    tokens: int, running: int, latency_s: float
) -> None:
    profile = replace(PROFILE, link_latency_s=latency_s)
    compute_s = profile.step_s([(0, tokens)])
    live = RemoteCosts()
    for _ in range(2):
        live.observe(compute_s + latency_s, compute_s, tokens)
    clear = abs(compute_s * running - latency_s) > 1e-9  # else rounding decides

    if clear:
        assert remote_is_cheaper(profile, tokens, running) == live.remote_is_cheaper(
            tokens, compute_s, running
        )
