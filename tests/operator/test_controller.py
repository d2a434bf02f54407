"""From a change to a pass: whom it concerns, and what becomes of a pass that fails."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from eventually import eventually
from tandem_operator.reconcile import controller, work_queue
from tandem_operator.reconcile.cluster_api import ApiError
from tandem_operator.reconcile.controller import Controller
from tandem_operator.reconcile.owners import concerned
from tandem_operator.reconcile.requeue import Key, Result
from tandem_operator.resources.base import Object

MODEL, ROUTER = Key("Model", "ns", "m"), Key("Router", "ns", "r")


def stored(kind: str, name: str, **more: Any) -> Object:
    metadata = {"namespace": "ns", "name": name, **more.pop("metadata", {})}
    return {"kind": kind, "metadata": metadata, **more}


def router(*models: str) -> Object:
    tiers = [{"name": m, "modelRef": {"name": m}} for m in models]
    return stored("Router", "r", spec={"tiers": tiers})


def test_a_model_concerns_itself_and_the_routers_that_use_it() -> None:
    model = stored("Model", "m")

    assert concerned(model, lambda _: [router("m", "n")]) == [MODEL, ROUTER]
    assert concerned(model, lambda _: [router("n")]) == [MODEL]


def test_a_child_concerns_its_owner_by_label_or_by_reference() -> None:
    owner = {"ownerReferences": [{"kind": "Model", "name": "m"}]}
    labels = {"labels": {"tandem.dev/model": "m"}}

    assert concerned(stored("Pod", "p", metadata=labels), lambda _: []) == [MODEL]
    assert concerned(stored("Deployment", "d", metadata=owner), lambda _: []) == [MODEL]
    assert concerned(stored("Service", "s", metadata={**owner, **labels}), lambda _: []) == [MODEL]
    assert concerned(stored("Pod", "p"), lambda _: []) == []


class Passes:
    """A reconciler whose passes end as a test says, and which counts them."""

    def __init__(self, *ends: Exception | Result) -> None:
        self.ends = list(ends)
        self.seen: list[Key] = []
        self.told: list[tuple[Key, str, float]] = []

    async def tell_of_failure(self, key: Key, error: Exception, again_s: float) -> None:
        self.told.append((key, str(error), again_s))
        raise ApiError(503, "events are not taken")

    async def reconcile(self, key: Key) -> Result:
        self.seen.append(key)
        end = self.ends.pop(0) if self.ends else Result()
        if isinstance(end, Exception):
            raise end
        return end


async def test_a_pass_that_fails_is_told_and_stops_nobody() -> None:
    """A refusal of the cluster and a defect of ours alike."""
    passes, told = Passes(ApiError(500, "no"), KeyError("spec")), list[tuple[Key, str]]()
    subject = Controller(
        passes,  # type: ignore[arg-type]
        lambda kind, namespace: [],
        600.0,
        0.0,
        lambda key, error, again_s: told.append((key, repr(error))),
    )
    running = asyncio.create_task(subject.run())
    subject.queue.add(MODEL)
    subject.queue.add(ROUTER)
    await eventually(lambda: len(passes.seen) >= 4)  # each is tried again
    running.cancel()

    assert told == [(MODEL, "ApiError('no')"), (ROUTER, "KeyError('spec')")]
    assert passes.seen[2:] == [MODEL, ROUTER]
    assert (subject.num_failures, subject.num_passes) == (2, 4)


async def test_passes_that_go_on_failing_are_told_of_on_the_resource(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Once the next try is some time away; and one that cannot be told stops nobody either."""
    monkeypatch.setattr(work_queue, "FIRST_DELAY_S", 0.001)
    monkeypatch.setattr(controller, "TOLD_FROM_S", 0.004)
    passes = Passes(*(ApiError(500, "no") for _ in range(5)))
    subject = Controller(passes, lambda kind, namespace: [], 600.0, 0.0)  # type: ignore[arg-type]
    running = asyncio.create_task(subject.run())
    subject.queue.add(MODEL)
    await eventually(lambda: len(passes.seen) >= 6)
    running.cancel()

    assert passes.told == [(MODEL, "no", 0.004), (MODEL, "no", 0.008), (MODEL, "no", 0.016)]


async def test_everything_is_looked_at_again_after_the_resync_time() -> None:
    passes = Passes()
    subject = Controller(
        passes,  # type: ignore[arg-type]
        lambda kind, namespace: [stored(kind, "m")] if kind == "Model" else [],
        0.01,
        0.0,
    )
    running = asyncio.create_task(subject.run())
    await eventually(lambda: passes.seen.count(MODEL) >= 2)
    running.cancel()
