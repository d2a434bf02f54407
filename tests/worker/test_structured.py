"""Structured answers over HTTP: batched, preempted, resumed, prefilled elsewhere, they parse."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from tandem_worker.server.worker import Worker

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "tags": {"type": "array", "items": {"enum": ["a", "b", 3]}, "maxItems": 4},
        "age": {"type": ["integer", "null"], "minimum": 0, "maximum": 150},
    },
    "required": ["name", "tags", "age"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "p", "schema": SCHEMA, "strict": True}}
# Grammars that explode: by what all patterns must share, by rules that double, by depth.
SHARED = " & ".join(f"/(?s:.*)[{letter}].{{{10 + i}}}/" for i, letter in enumerate("abcdefghij"))
DOUBLING = "start: r0\n" + "".join(f"r{i}: r{i + 1} r{i + 1}\n" for i in range(3000)) + 'r3000: "b"'
DEEP_ITEMS: dict[str, Any] = {"type": "string"}
for _ in range(500):
    DEEP_ITEMS = {"type": "array", "items": DEEP_ITEMS}


async def ask(worker: Worker, *, headers: dict[str, str] | None = None, **body: Any) -> Any:
    async with httpx.AsyncClient(base_url=worker.url, timeout=60) as client:
        return await client.post(
            "/v1/chat/completions",
            json={"messages": [{"role": "user", "content": "hello"}], "max_tokens": 200} | body,
            headers={"x-tandem-token-ids": "1"} | (headers or {}),
        )


async def choice(worker: Worker, **options: Any) -> dict[str, Any]:
    reply = await ask(worker, **options)
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()["choices"][0]
    return found


def parsed(answer: dict[str, Any]) -> Any:
    assert answer["finish_reason"] == "stop", answer
    value = json.loads(answer["message"]["content"])
    assert set(value) == {"name", "tags", "age"}
    return value


async def test_answers_of_one_batch_parse_beside_free_ones_that_stay_the_same(
    start_worker: Any,
) -> None:
    worker = await start_worker()
    alone = await choice(worker, temperature=0, max_tokens=20)

    answers = await asyncio.gather(
        *(choice(worker, response_format=FORMAT, seed=seed) for seed in range(6)),
        choice(worker, temperature=0, max_tokens=20),
        choice(worker, response_format=FORMAT, temperature=0),
    )

    for answer in (*answers[:6], answers[7]):
        parsed(answer)
    assert answers[6]["token_ids"] == alone["token_ids"]


WAYS = [
    ({"guided_choice": ["yes", "no"]}, {"yes", "no"}),
    ({"guided_regex": "(ab){2}"}, {"abab"}),
    ({"structured_outputs": {"choice": ["x"]}}, {"x"}),
    ({"structured_outputs": {"json": {"const": 3}}}, {"3"}),
    ({"guided_json": '{"enum": ["k"]}'}, {'"k"'}),
    ({"guided_grammar": 'start: "a" "b"'}, {"ab"}),
    ({"guided_grammar": 'root ::= "a" "c"'}, {"ac"}),
]


@pytest.mark.parametrize(("body", "expected"), WAYS)
async def test_each_way_to_ask_for_a_format_is_served(
    start_worker: Any, body: dict[str, Any], expected: set[str]
) -> None:
    worker = await start_worker()

    answer = await choice(worker, **body)

    assert answer["message"]["content"] in expected


async def test_each_way_is_served_behind_a_thought(start_worker: Any, family: Any) -> None:
    """There it is one grammar beside others, whoever wrote it."""
    worker = await start_worker(weights=family("hermes"))

    for body, expected in WAYS:
        answer = await choice(worker, **body, thinking_token_budget=2, max_tokens=40)

        assert answer["message"]["content"].strip() in expected, body


async def test_a_structured_answer_survives_preemption(start_worker: Any) -> None:
    worker = await start_worker(num_kv_blocks=6, max_num_seqs=4, prefix_cache=False)
    long = {"type": "array", "items": {"type": "integer"}, "minItems": 60, "maxItems": 60}
    messages = [{"role": "user", "content": "the quick brown fox " * 20}]

    answers = await asyncio.gather(
        *(
            choice(worker, guided_json=long, seed=seed, messages=messages, max_tokens=150)
            for seed in range(4)
        )
    )

    assert worker.engine.core.counters.num_preemptions > 0
    for answer in answers:
        if answer["finish_reason"] == "stop":
            assert len(json.loads(answer["message"]["content"])) == 60
        else:
            assert answer["message"]["content"].startswith("[")


async def test_a_structured_answer_resumes_where_it_was(start_worker: Any) -> None:
    worker = await start_worker()
    whole = await choice(worker, response_format=FORMAT, seed=5)
    sent = whole["token_ids"][:7]

    again = await choice(
        worker, response_format=FORMAT, seed=5, tandem={"resume_token_ids": [sent]}
    )

    assert again["token_ids"] == whole["token_ids"]
    parsed(again)


async def test_a_prefill_worker_draws_the_first_token_from_the_mask(start_worker: Any) -> None:
    prefill, decode = await start_worker("prefill"), await start_worker("decode")
    unified = await start_worker()

    there = await choice(
        decode, response_format=FORMAT, seed=5, headers={"x-tandem-prefill": prefill.url}
    )
    here = await choice(unified, response_format=FORMAT, seed=5)

    assert there["token_ids"] == here["token_ids"]
    text = decode.metrics.render().decode()
    assert 'tandem_worker_remote_prefills_total{model_name="tiny"} 1.0' in text


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"guided_regex": "(a"}, "regex"),
        ({"guided_json": {"allOf": [{"pattern": f"a.*{i}.*b"} for i in range(40)]}}, "work"),
        ({"guided_json": {"enum": [f"v{i}" for i in range(60_000)]}}, "characters"),
        ({"guided_json": {"type": "object", "required": ["a"], "properties": {"a": False}}}, "Uns"),
        ({"guided_regex": "(x?){2000}x{2000}"}, "work"),
        ({"guided_grammar": f"start: T\nT: {SHARED}"}, "fuel exhausted"),
        ({"guided_grammar": DOUBLING}, "building it ended"),
        ({"guided_json": DEEP_ITEMS}, "recursion limit"),
        ({"guided_json": {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}}, "no text"),
        ({"guided_json": {"anyOf": [{"const": "x" * 5000}] * 60}}, "characters"),
        ({"guided_choice": []}, "must be a list of texts"),
        ({"guided_choice": ["a"], "guided_regex": "b"}, "both ask for a format"),
        ({"structured_outputs": {"json": {}, "regex": "a"}}, "must hold exactly one"),
        ({"response_format": {"type": "xml"}}, "response_format.type='xml' must be"),
        ({"response_format": {"type": "json_schema"}}, "needs json_schema.schema"),
        ({"guided_choice": ["a"], "stop": "a"}, "could break the answer's format"),
        ({"guided_choice": ["a"], "ignore_eos": True}, "could break the answer's format"),
    ],
)
async def test_a_format_that_cannot_be_had_is_refused(
    start_worker: Any, body: dict[str, Any], said: str
) -> None:
    worker = await start_worker()

    reply = await ask(worker, **body)

    assert reply.status_code == 400, reply.text
    assert said in reply.json()["error"]["message"]
    assert (await ask(worker, guided_choice=["ok"])).status_code == 200


async def test_a_format_that_leads_nowhere_is_the_requests_own_fault(start_worker: Any) -> None:
    """The check at the start sees no more of it than the first token."""
    schema = {"allOf": [{"multipleOf": p} for p in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)]}
    worker = await start_worker()

    whole = await ask(worker, guided_json={"type": "integer", **schema})
    streamed = await ask(worker, guided_json={"type": "integer", **schema}, stream=True)

    assert whole.status_code == 400, whole.text
    error = whole.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["code"] == "grammar_dead_end"
    assert "the format that this request asks for" in error["message"]
    assert "simplify its schema" in error["message"]
    assert json.loads(streamed.text.strip().split("data: ")[-1]) == {"error": error}
    assert 'reason="grammar_dead_end"} 2.0' in worker.metrics.render().decode()
    assert (await ask(worker, guided_choice=["ok"])).status_code == 200


async def test_logits_that_are_not_finite_fail_their_request_alone(
    start_worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = await start_worker()
    model = worker.engine.core.runner.model
    logits = model.logits

    def broken(hidden: Any) -> Any:
        out = logits(hidden)
        out[0, 3] = float("nan")
        return out

    await choice(worker, max_tokens=2)
    monkeypatch.setattr(model, "logits", broken)
    failed = await ask(worker, max_tokens=2, logprobs=True)
    monkeypatch.setattr(model, "logits", logits)
    again = await choice(worker, max_tokens=2, logprobs=True)

    assert failed.status_code == 500
    assert failed.json()["error"]["code"] == "logits_not_finite"
    assert "NaN" not in json.dumps(again)
    text = worker.metrics.render().decode()
    assert (
        'tandem_worker_failed_requests_total{model_name="tiny",reason="logits_not_finite"} 1.0'
        in text
    )
    assert worker.failure is None
