"""A user's verdict becomes a label of the answer's tier: their own answers only, the last word."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem_router.api.api_keys import key_hash
from tandem_router.errors import ApiError
from tandem_router.quality.feedback import MOST_CHANGES, Verdicts, parse
from tandem_router.testing.asgi_client import Client, Reply
from tandem_router.testing.two_tiers import Scores, both

SECRET = b"0123456789abcdef"
TENANTS = [
    {"name": name, "key_hashes": [key_hash(SECRET, f"tdm-{name}")], "requests_per_minute": 1000}
    for name in ("a", "b")
]


async def say(client: Client, body: Any, key: str | None = None) -> Reply:
    headers = {"authorization": f"Bearer tdm-{key}"} if key is not None else {}
    return await client.request("POST", "/v1/feedback", body, headers)


async def test_a_verdict_is_kept_with_what_was_predicted_and_the_last_word_stands(
    run_router: Any, make_worker: Any
) -> None:
    table = await both(make_worker)
    async with run_router(table, predictor=Scores(0.75, 0.875)) as (client, app):
        answer = await client.chat(stream=True)
        request_id = answer.headers["x-request-id"]
        replies = [
            await say(client, {"request_id": request_id, "verdict": verdict})
            for verdict in ("good", "good", "bad")
        ]
        labels = await app.services.store.labels()

    tier = answer.headers["x-tandem-tier"]
    assert [reply.status for reply in replies] == [200, 200, 200]
    assert replies[0].json == {
        "object": "feedback",
        "request_id": request_id,
        "tier": tier,
        "score": 1.0,
    }
    assert [(label.source, label.quality) for label in labels] == [("feedback", {tier: 0.0})]
    assert labels[0].predicted == {"small": 0.75, "large": 0.875}
    assert labels[0].tenant == "anonymous"
    assert app.services.labels.num_by_source == {"feedback": 2}


async def test_nobody_judges_what_another_was_answered(run_router: Any, make_worker: Any) -> None:
    table = await both(make_worker)
    async with run_router(table, tenants=TENANTS, key_secret=SECRET) as (client, app):
        answer = await client.chat(headers={"authorization": "Bearer tdm-a"})
        body = {"request_id": answer.headers["x-request-id"], "verdict": "bad"}
        foreign = await say(client, body, "b")
        unknown = await say(client, {**body, "request_id": "f" * 32}, "b")
        keyless = await say(client, body)
        own = await say(client, body, "a")
        labels = await app.services.store.labels()

    assert (foreign.status, unknown.status, keyless.status, own.status) == (404, 404, 401, 200)
    assert foreign.error["code"] == unknown.error["code"] == "unknown_request"
    assert [label.tenant for label in labels] == ["a"]


async def test_a_request_of_an_earlier_process_is_found_in_the_store(
    run_router: Any, make_worker: Any, tmp_path: Any
) -> None:
    table = await both(make_worker)
    place = {"store": {"type": "sqlite", "flush_s": 0.01}, "store_file": tmp_path / "router.db"}
    async with run_router(table, **place) as (client, _):
        request_id = (await client.chat()).headers["x-request-id"]
    async with run_router(table, **place) as (client, app):
        reply = await say(client, {"request_id": request_id, "score": 0.5})
    async with run_router(table, **place) as (_, app):
        labels = await app.services.store.labels()

    assert reply.status == 200
    assert [(label.request_id, list(label.quality.values())) for label in labels] == [
        (request_id, [0.5])
    ]


async def test_feedback_counts_as_a_request_of_its_tenant(
    run_router: Any, make_worker: Any
) -> None:
    tenants = [{**TENANTS[0], "requests_per_minute": 2}]
    table = await both(make_worker)
    async with run_router(table, tenants=tenants, key_secret=SECRET) as (client, _):
        answer = await client.chat(headers={"authorization": "Bearer tdm-a"})
        body = {"request_id": answer.headers["x-request-id"], "verdict": "good"}
        statuses = [(await say(client, body, "a")).status for _ in range(2)]

    assert statuses == [200, 429]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "request_id"),
        ({"request_id": 7, "verdict": "good"}, "request_id"),
        ({"request_id": "x" * 65, "verdict": "good"}, "request_id"),
        ({"request_id": "x"}, "verdict"),
        ({"request_id": "x", "verdict": "good", "score": 1}, "verdict"),
        ({"request_id": "x", "verdict": True}, "verdict"),
        ({"request_id": "x", "verdict": ["good"]}, "verdict"),
        ({"request_id": "x", "score": True}, "score"),
        ({"request_id": "x", "score": 1.5}, "score"),
        ({"request_id": "x", "score": float("nan")}, "score"),
        ({"request_id": "x", "verdict": "good", "comment": "thanks"}, "comment"),
    ],
)
def test_what_is_no_verdict_is_refused_by_name(body: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as refused:
        parse(body)

    assert (refused.value.status, refused.value.param) == (400, param)


DECISION = {"tenant": "a", "tier": "small", "status": 200, "quality": {"small": 0.5}}


@pytest.mark.parametrize(("status", "code"), [(None, "request_running"), (503, "no_answer")])
def test_only_answers_are_judged(status: int | None, code: str) -> None:
    with pytest.raises(ApiError) as refused:
        Verdicts().label({**DECISION, "status": status}, "a", "r", 1.0, 0.0)

    assert (refused.value.status, refused.value.code) == (409, code)


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0]), max_size=40))
def test_however_often_a_verdict_is_changed_few_labels_are_made_of_it(said: list[float]) -> None:
    verdicts, labels = Verdicts(), []
    for score in said:
        with contextlib.suppress(ApiError):
            labels.append(verdicts.label(DECISION, "a", "r", score, 0.0))

    made = [label for label in labels if label is not None]
    assert len(made) <= MOST_CHANGES + 1
    assert all(
        one.quality != next_one.quality for one, next_one in zip(made, made[1:], strict=False)
    )
