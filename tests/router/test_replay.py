"""A recorded live run replays to the same decisions in the objects that the simulator drives.

Recorded are scores, seed, the clock and the load reports, as they came; replayed they
choose the same tier for the same reason, and the same decode and prefill worker, each time.
"""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any

from replay_kit import Journal, decisions, replayed
from tandem_operator.simulate.arrivals import Arrival
from tandem_operator.simulate.front import Front, TierPlan
from tandem_router.policy import PlainScore
from tandem_router.testing.two_tiers import TIERS

SEED = 7  # as `run_router` gives it
NUM_REQUESTS = 60


class ByPrompt:
    """A predictor whose scores differ from prompt to prompt."""

    def score(self, prompt: str) -> PlainScore:
        digest = hashlib.sha256(prompt.encode()).digest()
        small = digest[0] / 255.0
        return PlainScore({"small": small, "large": min(1.0, small + digest[1] / 512.0)})


async def ask(client: Any, number: int) -> None:
    topic = f"topic {number % 5} " * 80  # a beginning that some have in common
    body = {
        "model": "chat",
        "messages": [{"role": "user", "content": f"{topic} question {number}"}],
        "stream": number % 3 == 0,
    }
    reply = await client.request("POST", "/v1/chat/completions", body)
    assert reply.status == 200


async def test_a_recorded_live_run_replays_to_the_same_decisions(
    run_router: Any, make_worker: Any, reported: Any
) -> None:
    tiers = [TIERS[0], {**TIERS[1], "max_share": 0.4}]
    roles: dict[str, Any] = {
        "small": {"unified": [await make_worker() for _ in range(5)]},
        "large": {
            "prefill": [await make_worker() for _ in range(3)],
            "decode": [await make_worker() for _ in range(4)],
        },
    }
    async with run_router(roles, tiers=tiers, threshold=0.1, predictor=ByPrompt()) as (client, app):
        journal = Journal(app.picker, asyncio.get_running_loop().time)
        await reported(app)
        for first in range(0, NUM_REQUESTS, 6):
            await asyncio.gather(*(ask(client, first + i) for i in range(6)))
            await journal.next_report()
        records = decisions(app)

    # The choice of a tier: the simulator's front, fed with what the run was scored as.
    front = Front(
        (TierPlan("small", 1.0, 2.0), TierPlan("large", 10.0, 20.0, max_share=0.4)),
        fallback="large",
        threshold=0.1,
        quality_floor=None,
        ttft_slo_s=None,
        tpot_slo_s=None,
        available=lambda tier: True,
    )
    again = [
        front.choose(Arrival(r.time, r.prompt_tokens or 1, {"": 1}, predicted=dict(r.quality)))
        for r in records
    ]

    assert len(records) == NUM_REQUESTS
    assert [(r.tier, r.reason) for r in records] == [(d.tier, str(d.reason)) for d in again]
    assert {r.tier for r in records} == {"small", "large"}

    # The choice of workers: the picker, with the recorded clock and load reports.
    table = {
        tier: {role: tuple(worker.url for worker in workers) for role, workers in named.items()}
        for tier, named in roles.items()
    }
    choices = replayed(journal, table, app.config.picking, SEED)
    assert sum(name == "observed" for _, name, *_ in journal.entries) > 12
    assert len(choices) == NUM_REQUESTS
    assert all(then == now for then, now in choices)
    assert len({then for then, _ in choices}) > 6
