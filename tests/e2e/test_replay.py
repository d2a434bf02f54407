"""A recorded run of the demo pair replays to the same decisions in what the simulator drives.

The workers are those of `tandem up`, with one more of each kind that decodes; the router is one of
the example's configuration, predictor and quality floor included, in this process.
"""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path
from typing import Any

from eventually import eventually
from replay_kit import Journal, decisions, replayed
from stack_kit import EXAMPLE, Stack
from tandem_operator.demo.suite import generate
from tandem_operator.simulate.arrivals import Arrival
from tandem_operator.simulate.front import Front, TierPlan
from tandem_router.api.app import RouterApp
from tandem_router.config import RouterConfig, parse_config
from tandem_router.predictor import load
from tandem_router.routing.predictor_source import training_gains
from tandem_router.testing.asgi_client import Client

SEED = 7
NUM_REQUESTS = 96
AT_ONCE = 8


def configuration(stack: Stack) -> RouterConfig:
    """The running router's own, but nothing is stored and weights are where this checkout has them.

    Loads are asked for often, so that a short run sees many reports.
    """
    names = {o["metadata"]["name"]: o for o in stack.get("configmaps")["items"]}
    (name,) = [name for name in names if name.startswith("chat-router-")]
    told = json.loads(names[name]["data"]["config.json"])
    told["store"] = {"type": "memory"}
    told["predictor"]["artifact"] = str(EXAMPLE / "predictor")
    told["picking"] = {**told.get("picking", {}), "load_poll_s": 0.05}
    return parse_config(json.dumps(told))


def endpoints(stack: Stack) -> dict[str, dict[str, list[str]]]:
    """Workers by tier and role, as local mode tells the router."""
    maps = stack.get("configmaps")["items"]
    found = next(o for o in maps if o["metadata"]["name"] == "chat-endpoints")
    tiers: dict[str, dict[str, list[str]]] = json.loads(found["data"]["endpoints.json"])["tiers"]
    return tiers


def body(number: int, prompt: str) -> dict[str, Any]:
    return {
        "model": "chat",
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "stream": number % 3 == 0,
    }


def arrival_of(record: Any, config: RouterConfig) -> Arrival:
    """What a trace of the run says: when, how long, and what the predictor stated."""
    tokens = {}
    for verdict in record.verdicts:
        tier = config.tier(verdict.tier)
        of_prompt = record.prompt_tokens * (tier.usd_per_1m_input_tokens or 0.0)
        of_answer = 1e6 * verdict.expected_cost_usd - of_prompt
        tokens[tier.name] = of_answer / (tier.usd_per_1m_output_tokens or 1.0)
    return Arrival(
        record.time,
        record.prompt_tokens,
        {"": 1},
        predicted={verdict.tier: verdict.quality for verdict in record.verdicts},
        predicted_tokens=tokens,
    )


async def test_a_recorded_run_of_the_demo_pair_replays_to_the_same_decisions(
    stack: Stack, tmp_path: Path
) -> None:
    for pool in ("small-unified", "large-decode"):
        stack.tandem("scale", "workerpool", pool, "--replicas", "2")

    async def two_of_each() -> bool:
        table = endpoints(stack)
        counts = [
            len(table[tier][role]) for tier, role in (("small", "unified"), ("large", "decode"))
        ]
        return counts == [2, 2]

    await eventually(two_of_each, 90.0, 0.5)
    table = endpoints(stack)
    config = configuration(stack)
    (token, *_) = (p.read_text().strip() for p in stack.log.parent.rglob("peer/token"))
    app = RouterApp(
        config,
        artifact_path=Path(str(config.predictor.artifact)),
        # A file that is never there: the table is given below.
        endpoints_path=tmp_path / "endpoints.json",
        peer_token=token,
        rng=random.Random(SEED),
    )
    app.set_table({t: {r: tuple(u) for r, u in roles.items()} for t, roles in table.items()})
    prompts = [question.prompt for question in generate("test", 3, NUM_REQUESTS)]

    async with app.running():
        client = Client(app)
        journal = Journal(app.picker, asyncio.get_running_loop().time)
        while any(worker.load is None for worker in app.picker.workers):
            await journal.next_report()

        async def ask(number: int) -> None:
            request = body(number, prompts[number])
            reply = await client.request("POST", "/v1/chat/completions", request)
            assert reply.status == 200, reply.body

        for first in range(0, NUM_REQUESTS, AT_ONCE):
            await asyncio.gather(*(ask(first + i) for i in range(AT_ONCE)))
            await journal.next_report()
        records = decisions(app)

    # The choice of a tier: the simulator's front, fed with the scores of the run.
    front = Front(
        tuple(
            TierPlan(t.name, t.usd_per_1m_input_tokens or 0.0, t.usd_per_1m_output_tokens or 0.0)
            for t in config.tiers
        ),
        fallback=config.fallback_tier,
        threshold=0.1 if config.threshold is None else config.threshold,
        quality_floor=config.objective.quality_floor,
        ttft_slo_s=(config.slo.ttft_ms or 0.0) / 1000.0,
        tpot_slo_s=(config.slo.tpot_ms or 0.0) / 1000.0,
        available=lambda tier: True,
        training=training_gains(load(config.predictor.artifact or ""), "large", "small"),
    )
    again = [front.choose(arrival_of(record, config)) for record in records]
    assert len(records) == NUM_REQUESTS
    assert [(r.tier, r.reason) for r in records] == [(d.tier, str(d.reason)) for d in again]
    assert {r.tier for r in records} == {"small", "large"}

    # The choice of workers: the picker, with the recorded clock and load reports.
    choices = replayed(journal, table, config.picking, SEED)
    assert sum(name == "observed" for _, name, *_ in journal.entries) > 20
    assert len(choices) >= NUM_REQUESTS
    assert all(then == now for then, now in choices)
    assert len({then for then, _ in choices}) == 4
