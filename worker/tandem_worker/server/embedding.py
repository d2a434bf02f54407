"""Vectors of texts: each text is one sequence of the engine that generates nothing."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Sequence
from functools import partial

from tandem_worker.engine.pooling import Pooling
from tandem_worker.engine.requests import EngineRequest, ErrorEvent, Event, VectorEvent
from tandem_worker.engine.sampling import SamplingParams
from tandem_worker.engine.thread import EngineThread
from tandem_worker.models.embedding_settings import PoolingKind
from tandem_worker.openai.context import RequestContext
from tandem_worker.scheduling.sequence import Sequence as ScheduledSequence

_numbers = itertools.count(1)


async def embed(
    engine: EngineThread,
    prompts: Sequence[tuple[int, ...]],
    pooling: PoolingKind,
    context: RequestContext,
    salt: bytes,
) -> list[tuple[float, ...]]:
    """The vectors, in order; cancelling aborts what still runs.

    Raises:
        RequestError: the engine failed.
    """
    events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
    arrival_s, number = time.monotonic(), next(_numbers)
    names = [f"{context.request_id}-{index}.e{number}" for index in range(len(prompts))]

    def deliver(index: int, event: Event) -> None:
        events.put_nowait((index, event))

    for index, prompt in enumerate(prompts):
        sequence = ScheduledSequence(
            request_id=names[index],
            token_ids=list(prompt),
            num_prompt_tokens=len(prompt),
            arrival_s=arrival_s,
            deadline_s=arrival_s + context.deadline_ms / 1e3 if context.deadline_ms else None,
            priority=context.priority,
            predicted_output_tokens=0,
            reuse_prefix=pooling == "last",  # the others need states of earlier tokens
            salt=salt,
            tenant=context.tenant,
        )
        engine.add(
            EngineRequest(
                sequence=sequence,
                sampling=SamplingParams(max_tokens=0),
                sink=partial(deliver, index),
                pooling=Pooling(pooling),
            )
        )
    left = dict(enumerate(names))
    vectors: dict[int, tuple[float, ...]] = {}
    try:
        while left:
            index, event = await events.get()
            if isinstance(event, ErrorEvent):
                del left[index]
                raise event.as_refusal()
            if isinstance(event, VectorEvent):
                del left[index]
                vectors[index] = event.vector
    finally:
        for name in left.values():
            engine.abort(name)
    return [vectors[index] for index in range(len(prompts))]
