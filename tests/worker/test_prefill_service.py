"""A prefill order is checked, and one that is given up hands its blocks back however it ends."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tandem_worker.disaggregation.prefill_side import PrefillService
from tandem_worker.engine.requests import ErrorEvent
from tandem_worker.errors import RequestError
from tandem_worker.metrics import WorkerMetrics

ORDER = {
    "version": 1,
    "request_id": "r",
    "epoch": 1,
    "token_ids": [1, 2, 3],
    "num_computed_tokens": 0,
    "sampling": {},
    "kv": {"address": "127.0.0.1:1", "block_ids": [0]},
}


class SlowPush:
    """A push whose peer has died: it takes a while until nobody reads the blocks."""

    def __init__(self) -> None:
        self.closing = asyncio.Event()
        self.closed = asyncio.Event()

    def abort(self, reason: str) -> None:
        pass

    async def aclose(self) -> None:
        self.closing.set()
        await self.closed.wait()


class FakeSender:
    def __init__(self, push: SlowPush) -> None:
        self.push = push

    async def open(self, address: str, request_id: str, epoch: int) -> SlowPush:
        return self.push


class FakeEngine:
    """Fails every prefill, as the engine does when the push breaks."""

    def __init__(self) -> None:
        self.aborted: list[str] = []
        self.gave_back = asyncio.Event()

    def add(self, request: Any) -> None:
        request.sink(ErrorEvent("the push broke"))

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        self.gave_back.set()


def make_service(engine: FakeEngine, push: SlowPush) -> PrefillService:
    return PrefillService(
        engine,  # type: ignore[arg-type]
        FakeSender(push),  # type: ignore[arg-type]
        WorkerMetrics("m"),
        create_constraint=lambda sampling: None,
        vocab_size=10,
        max_model_len=64,
    )


@pytest.mark.parametrize(
    ("sampling", "said"),
    [
        ({"temperature": "hot"}, "temperature='hot' must be a number"),
        ({"temperature": -1}, "temperature=-1 must be at least 0"),
        ({"num_logprobs": 5000}, "num_logprobs=5000 must be at most 20"),
        ({"stop_token_ids": 7}, "stop_token_ids=7 must be a list"),
        ({"logit_bias": [[10, 1.0]]}, "logit_bias names token 10; the vocabulary ends at 9"),
        ({"logit_bias": [3]}, "logit_bias=[3] must be a list of [token, bias] pairs"),
        ({"repetition_penalty": 0}, "repetition_penalty=0 must be at least 0.01"),
    ],
)
async def test_a_malformed_order_is_refused_before_it_reaches_the_engine(
    sampling: dict[str, Any], said: str
) -> None:
    """One bad row would fail the whole step, and with it every other prompt in it."""
    engine = FakeEngine()
    push = SlowPush()
    push.closed.set()
    service = make_service(engine, push)

    with pytest.raises(RequestError) as refused:
        await service.prefill(ORDER | {"sampling": sampling})

    assert said in str(refused.value)
    assert refused.value.status == 400


@pytest.mark.parametrize("salt", ["xyz", 7, "00" * 65])
async def test_a_malformed_salt_is_refused(salt: object) -> None:
    push = SlowPush()
    push.closed.set()

    with pytest.raises(RequestError, match="cache_salt"):
        await make_service(FakeEngine(), push).prefill(ORDER | {"cache_salt": salt})


async def test_a_newer_peer_may_send_settings_that_this_release_does_not_know() -> None:
    push = SlowPush()
    push.closed.set()

    with pytest.raises(RequestError, match="the push broke"):
        await make_service(FakeEngine(), push).prefill(ORDER | {"sampling": {"typical_p": 0.5}})


async def test_a_client_that_leaves_while_a_broken_push_ends_leaks_no_blocks() -> None:
    push, engine = SlowPush(), FakeEngine()
    service = make_service(engine, push)
    work = asyncio.create_task(service.prefill(ORDER))
    await push.closing.wait()

    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    early = list(engine.aborted)
    push.closed.set()
    async with asyncio.timeout(5):
        await engine.gave_back.wait()

    assert early == []  # the blocks are still being read
    assert engine.aborted == ["r#1"]
