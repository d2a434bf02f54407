"""A recorded live run replays to the same decisions in the objects that the simulator drives.

Recorded are scores, seed, the clock and the load reports, as they came; replayed they
choose the same tier for the same reason, and the same decode and prefill worker, each time.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Callable
from typing import Any

from tandem_operator.simulate.arrivals import Arrival
from tandem_operator.simulate.front import Front, TierPlan
from tandem_router.api.app import RouterApp
from tandem_router.balancing.endpoint_picker import Pick, Picker
from tandem_router.balancing.worker import Worker
from tandem_router.config import PickingConfig
from tandem_router.policy import PlainScore
from tandem_router.testing.two_tiers import TIERS

SEED = 7  # as `run_router` gives it
TOLD = ("first_token", "finished", "answered_well", "outcome", "observed", "failed", "answered")
NUM_REQUESTS = 60


class ByPrompt:
    """A predictor whose scores differ from prompt to prompt."""

    def score(self, prompt: str) -> PlainScore:
        digest = hashlib.sha256(prompt.encode()).digest()
        small = digest[0] / 255.0
        return PlainScore({"small": small, "large": min(1.0, small + digest[1] / 512.0)})


class Journal:
    """All that is asked of and told to a picker, in order, by name instead of object."""

    def __init__(self, picker: Picker, clock: Callable[[], float]) -> None:
        self.entries: list[tuple[Any, ...]] = []
        self._picks: dict[int, int] = {}
        self._kept: list[Pick] = []  # so that no two have one id
        self._clock = clock
        self._inside = False
        self._reported = asyncio.Event()
        for name in ("pick", *TOLD):
            setattr(picker, name, self._wrapped(name, getattr(picker, name)))

    def _wrapped(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            if self._inside:  # one method of the picker calls another
                return method(*args, **named)
            self._inside = True
            try:
                now, told = self._clock(), tuple(map(self._named, args))
                found = method(*args, **named)
            finally:
                self._inside = False
            self.entries.append((now, name, told, named, self._result(found)))
            if name == "observed":
                self._reported.set()
            return found

        return call

    async def next_report(self) -> None:
        """Until another load report has come."""
        self._reported.clear()
        await self._reported.wait()

    def _named(self, value: Any) -> Any:
        if isinstance(value, Worker):
            return ("worker", value.tier, value.url)
        if isinstance(value, Pick):
            return ("pick", self._picks[id(value)])
        return value

    def _result(self, found: Any) -> Any:
        if not isinstance(found, Pick):
            return None
        self._picks[id(found)] = len(self._kept)
        self._kept.append(found)
        return urls(found)


def urls(pick: Pick) -> tuple[str, str | None]:
    return pick.decode.url, None if pick.prefill is None else pick.prefill.url


def replayed(journal: Journal, table: Any, config: PickingConfig) -> list[tuple[Any, Any]]:
    """(then, now) of each choice, by a new picker of the same seed."""
    clock = [0.0]
    picker = Picker(config, random.Random(SEED), lambda: clock[0])
    picker.set_table(table)
    picks: list[Pick] = []

    def meant(value: Any) -> Any:
        if isinstance(value, tuple) and value[:1] == ("worker",):
            return picker.worker(value[1], value[2])
        if isinstance(value, tuple) and value[:1] == ("pick",):
            return picks[value[1]]
        return value

    found = []
    for now, name, args, named, result in journal.entries:
        clock[0] = now
        made = getattr(picker, name)(*map(meant, args), **named)
        if name == "pick":
            picks.append(made)
            found.append((result, urls(made)))
    return found


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
    choices = replayed(journal, table, app.config.picking)
    assert sum(name == "observed" for _, name, *_ in journal.entries) > 12
    assert len(choices) == NUM_REQUESTS
    assert all(then == now for then, now in choices)
    assert len({then for then, _ in choices}) > 6


def decisions(app: RouterApp) -> list[Any]:
    """The run's records, first one first."""
    return sorted(app.services.decisions.records(), key=lambda record: record.sequence)
