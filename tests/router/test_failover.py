"""A client's stream is whole and exact whatever happens to the workers behind it."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem_router.openai.sse import EventSplitter, split_events
from tandem_router.proxy.resume import StreamJournal

LARGE = {"model": "large", "stream": True, "seed": 11}


def roles_and_finishes(reply: Any) -> tuple[int, list[int]]:
    choices = [choice for chunk in reply.chunks for choice in chunk["choices"]]
    roles = sum("role" in choice["delta"] for choice in choices)
    return roles, sorted(choice["index"] for choice in choices if choice["finish_reason"])


@pytest.mark.parametrize("num_choices", [1, 2])
async def test_a_stream_cut_at_any_byte_reads_the_same(
    run_router: Any, make_worker: Any, num_choices: int
) -> None:
    workers = [await make_worker(num_tokens=3) for _ in range(2)]
    fields = {**LARGE, "n": num_choices}

    async with run_router({"large": {"decode": workers}}, background=False) as (client, app):
        expected = await client.chat(**fields)
        served = next(worker for worker in workers if worker.inference)
        num_bytes = len(b"".join(served.events(served.inference[0])))
        # Every byte for one choice; a stride that is prime to the framing for two.
        for cut in range(0, num_bytes, 1 if num_choices == 1 else 7):
            # Shared: whichever worker is asked first is cut, the one asked next is not.
            cuts = [cut]
            for worker in workers:
                worker.cut_after = cuts
            for known in app.picker.workers:
                app.picker.answered(known)

            reply = await client.chat(**fields)

            for index in range(num_choices):
                assert reply.text(index) == expected.text(index), cut
                assert reply.token_ids(index) == expected.token_ids(index), cut
            assert roles_and_finishes(reply) == (num_choices, list(range(num_choices))), cut


async def test_a_stream_survives_every_worker_dying_once_and_waits_for_the_restart(
    run_router: Any, make_worker: Any
) -> None:
    worker = await make_worker(num_tokens=8, cut_after=[900])
    healthy = await make_worker(num_tokens=8)
    async with run_router({"large": {"decode": [healthy]}}) as (client, _):
        expected = await client.chat(**LARGE)

    async def restart() -> None:
        await worker.asked.wait()
        await worker.stop()
        await asyncio.sleep(0.3)
        await worker.start()

    async with run_router({"large": {"decode": [worker]}}) as (client, app):
        restarting = asyncio.ensure_future(restart())
        reply = await client.chat(**LARGE)
        await restarting

    assert reply.text() == expected.text()
    assert "resume_token_ids" in worker.inference[-1].json["tandem"]
    assert app.services.decisions.last(1)[0]["num_failovers"] == 1


async def test_ids_seed_and_creation_time_stay_the_same_after_a_failover(
    run_router: Any, make_worker: Any
) -> None:
    cuts = [700]
    workers = [await make_worker(cut_after=cuts) for _ in range(2)]

    async with run_router({"large": {"decode": workers}}) as (client, _):
        reply = await client.chat(**{**LARGE, "seed": None})

    first, second = (one for worker in workers for one in worker.inference)
    for name in ("x-request-id", "x-tandem-seed", "x-tandem-created"):
        assert first.headers[name] == second.headers[name]
    assert len({chunk["id"] for chunk in reply.chunks}) == 1


async def test_a_whole_reply_is_asked_for_again_when_its_worker_dies(
    run_router: Any, make_worker: Any
) -> None:
    cuts = [20, 0]
    workers = [await make_worker(cut_after=cuts) for _ in range(3)]

    async with run_router({"large": {"decode": workers}}) as (client, _):
        reply = await client.chat(model="large", seed=3)

    assert reply.status == 200
    assert reply.json["choices"][0]["message"]["content"]
    assert sum(len(worker.inference) for worker in workers) == 3


async def test_a_stream_that_cannot_be_carried_on_ends_with_an_error_event(
    run_router: Any, make_worker: Any
) -> None:
    worker = await make_worker(cut_after=[600])

    async with run_router(
        {"large": {"decode": [worker]}}, failover={"wait_s": 0.2, "tier_wait_s": 0.0}
    ) as (client, _):
        task = asyncio.ensure_future(client.chat(**LARGE))
        await worker.asked.wait()
        await worker.stop()
        reply = await task

    last = reply.body.decode().rstrip("\n").split("\n\n")[-1]
    assert "no worker" in json.loads(last.removeprefix("data: "))["error"]["message"]
    assert b"[DONE]" not in last.encode()


async def test_a_stream_without_token_ids_is_never_guessed_at(
    run_router: Any, make_worker: Any
) -> None:
    worker = await make_worker(cut_after=[900], token_ids_in_chunks=False)

    async with run_router({"large": {"decode": [worker]}}) as (client, _):
        reply = await client.chat(**LARGE)

    assert b"could not be carried on" in reply.body
    assert len(worker.inference) == 1


async def test_an_error_event_of_a_dying_worker_is_a_failover(
    run_router: Any, make_worker: Any
) -> None:
    class Dying(type(await make_worker())):  # type: ignore[misc]
        def events(self, seen: Any) -> list[bytes]:
            error = {"error": {"message": "engine died", "type": "server_error"}}
            first = super().events(seen)[:4] if "tandem" not in seen.json else []
            if not first:
                return super().events(seen)
            return [*first, b"data: " + json.dumps(error).encode() + b"\n\n"]

    worker = await Dying().start()
    async with run_router({"large": {"decode": [worker]}}) as (client, _):
        reply = await client.chat(**LARGE)
    await worker.stop()

    assert reply.token_ids() == worker.tokens(worker.inference[0].json, "11", 0)


async def test_an_error_event_about_the_request_reaches_the_client(
    run_router: Any, make_worker: Any
) -> None:
    class Refusing(type(await make_worker())):  # type: ignore[misc]
        def events(self, seen: Any) -> list[bytes]:
            error = {"error": {"message": "too long", "type": "invalid_request_error"}}
            return [*super().events(seen)[:2], b"data: " + json.dumps(error).encode() + b"\n\n"]

    worker = await Refusing().start()
    async with run_router({"large": {"decode": [worker]}}) as (client, _):
        reply = await client.chat(**LARGE)
    await worker.stop()

    assert b"too long" in reply.body
    assert len(worker.inference) == 1


async def test_a_draining_worker_is_left_alone_and_the_next_one_answers(
    run_router: Any, make_worker: Any
) -> None:
    refusal = (503, {"x-tandem-draining": "1"}, b'{"error": {"message": "draining"}}')
    refusals = [refusal]
    workers = [await make_worker(refuse=refusals) for _ in range(2)]

    async with run_router({"large": {"decode": workers}}, background=False) as (client, app):
        reply = await client.chat(**LARGE)

    assert reply.status == 200
    assert sorted(worker.draining for worker in app.picker.workers) == [False, True]


async def test_a_worker_that_is_not_ready_yet_is_waited_for(
    run_router: Any, make_worker: Any
) -> None:
    starting = (503, {"retry-after": "1"}, b'{"error": {"message": "loading"}}')
    worker = await make_worker(refuse=[starting] * 12)

    async with run_router(
        {"large": {"decode": [worker]}}, failover={"wait_s": 10.0, "max_attempts": 2}
    ) as (client, _):
        reply = await client.chat(model="large")

    assert reply.status == 200
    assert len(worker.inference) == 13


async def test_a_full_tier_is_queued_for_where_the_budget_says_so(
    run_router: Any, make_worker: Any
) -> None:
    full = (429, {"retry-after": "1"}, b'{"error": {"message": "full"}}')
    worker = await make_worker(refuse=[full] * 4)

    async with run_router(
        {"large": {"decode": [worker]}},
        failover={"wait_s": 10.0, "max_attempts": 2},
        budget={"on_exhausted": "Queue"},
    ) as (client, _):
        reply = await client.chat(model="large")

    assert reply.status == 200


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_splitter_releases_every_event_once_and_never_half_of_one(data: Any) -> None:
    """Whichever of its three line ends a server uses, wherever its bytes are cut."""
    texts = data.draw(st.lists(st.text(max_size=12), max_size=6))
    ends = st.sampled_from([b"\n", b"\r\n", b"\r"])
    end = data.draw(ends)
    separators = [end + end] * len(texts)
    stream = b"".join(
        b"data: " + json.dumps(text).encode() + end
        for text, end in zip(texts, separators, strict=True)
    )
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    splitter = EventSplitter()

    released = []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        if start < end:
            released.append(splitter.feed(stream[start:end]))

    plain = stream.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    assert b"".join(released) == plain
    for part in released:
        assert part == b"" or part.endswith(b"\n\n")
    assert b"".join(split_events(plain)) == plain
    assert len(split_events(plain)) == len(texts)


def chunk(token_ids: list[int], text: str, index: int = 0) -> bytes:
    choice = {"index": index, "text": text, "token_ids": token_ids, "finish_reason": None}
    return b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"


def test_journal_stays_within_its_bound_and_forgets_no_token() -> None:
    journal = StreamJournal(max_kept_bytes=2000)

    for position in range(500):
        journal.forwarded(chunk([position], "x"))
        assert journal.num_kept_bytes <= 2000

    assert list(journal.sent(1)[0].token_ids) == list(range(500))


def test_journal_drops_the_echoed_prompt_that_the_client_already_has() -> None:
    journal = StreamJournal()
    journal.forwarded(chunk([], "the prompt"))

    assert not journal.sent(1)[0].token_ids
    journal.resume("nothing")
    rest = journal.without_repeats(chunk([], "the ") + chunk([], "prompt") + chunk([7], " goes on"))

    assert rest == chunk([7], " goes on").replace(b": ", b":").replace(b", ", b",") or (
        json.loads(rest.decode().removeprefix("data: "))["choices"][0]["text"] == " goes on"
    )


def test_token_ids_that_are_none_are_text_that_nobody_can_go_on_from() -> None:
    journal = StreamJournal()
    journal.forwarded(b'data: {"choices": [{"index": 0, "text": "x", "token_ids": ["7"]}]}\n\n')

    (sent,) = journal.sent(1)

    assert sent.text_without_ids
    assert not sent.token_ids


async def test_a_stopped_worker_loses_its_streams_to_another(
    run_router: Any, make_worker: Any
) -> None:
    """It keeps its connections open and says nothing: only the missing load report tells."""
    stopped, healthy = await make_worker(num_tokens=8), await make_worker(num_tokens=8)
    failover = {"wait_s": 5.0, "dead_after_s": 0.2}

    async with run_router({"large": {"decode": [stopped]}}, failover=failover) as (client, app):
        expected = await client.chat(**LARGE)
        stopped.freeze_after = 900
        task = asyncio.ensure_future(client.chat(**LARGE))
        await stopped.frozen.wait()
        app.set_table({"large": {"decode": (stopped.url, healthy.url)}})
        reply = await task

    assert reply.text() == expected.text()
    assert healthy.inference


@pytest.mark.parametrize("seed", range(3))
async def test_many_streams_over_workers_that_keep_failing_are_all_exact(
    run_router: Any, make_worker: Any, token_text_of: Any, seed: int
) -> None:
    rng = random.Random(seed)
    full = (429, {"retry-after": "1"}, b'{"error": {"message": "full"}}')
    draining = (503, {}, b'{"error": {"message": "busy"}}')
    workers = []
    for _ in range(3):
        worker = await make_worker(
            num_tokens=10,
            cut_after=[rng.choice([None, rng.randrange(3000)]) for _ in range(6)],
            refuse=[rng.choice([full, draining]) for _ in range(3)],
            write_size=rng.choice([7, 100, None]),
        )
        workers.append(worker)
    judge = await make_worker(num_tokens=10)
    fields = [
        {
            "content": f"question {number % 5}",
            "model": "large",
            "stream": number % 4 != 0,
            "seed": number,
            "n": 1 + number % 2,
        }
        for number in range(24)
    ]

    async with run_router(
        {"large": {"decode": workers}},
        budget={"on_exhausted": "Queue"},
        failover={"wait_s": 10.0, "tier_wait_s": 0.05, "max_attempts": 30},
    ) as (client, app):
        replies = await asyncio.gather(*(client.chat(**each) for each in fields))

    for each, reply in zip(fields, replies, strict=True):
        body = {"messages": [{"role": "user", "content": each["content"]}]}
        for index in range(each["n"]):
            ids = judge.tokens(body, str(each["seed"]), index)
            expected = "".join(map(token_text_of, ids))
            if each["stream"]:
                assert reply.token_ids(index) == ids
                assert reply.text(index) == expected
            else:
                assert reply.json["choices"][index]["message"]["content"] == expected
    assert app.services.ledger.num_inflight == 0
    for known in app.picker.workers:
        assert (known.num_inflight, known.pending_tokens) == (0, 0.0)
