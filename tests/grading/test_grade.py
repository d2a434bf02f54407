"""`tandem grade` as a user runs it: endpoints or a Router, a file of prompts, tiers that fail."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fake_provider import Command, Provider, Reply, right, rows_of, small_errs, sums
from tandem_router.predictor.records import dataset

Write = Callable[..., Path]


def test_two_endpoints_and_a_file_become_rows_that_train_reads(
    tandem: Command, provider: Provider, two_tiers: list[str], write: Write, tmp_path: Path
) -> None:
    provider.respond = small_errs
    output = tmp_path / "graded.jsonl.gz"
    given = [{**row, "task": "sums", "group": f"g{i}", "id": i} for i, row in enumerate(sums(24))]

    ran = tandem("grade", write(given), "-o", output, *two_tiers)

    assert ran.status == 0, ran.err
    rows = rows_of(output)
    assert rows[1] == {
        "id": 1,
        "prompt": "What is 1 + 1?",
        "quality": {"small": 0.0, "large": 1.0},
        "output_tokens": {"small": 5.0, "large": 9.0},
        "cost_usd": {"small": 20e-6, "large": 280e-6},
        "responses": {"small": "3", "large": "2"},
        "group": "g1",
        "task": "sums",
        "reference": 2,
        "grader": "numeric",
        "graded_by": "numeric",
    }
    read = dataset.read_dataset([output])
    assert read.quality().mean(axis=0).tolist() == [0.5, 1.0]
    assert "24 of 24 questions graded (numeric 24), $0.0072 spent" in ran.out
    assert "send all to large until a predictor is trained: it is better by .500" in ran.out
    assert "about 76 more prompts would say whether routing pays" in ran.out
    assert f"next: tandem train {output}" in ran.out


def test_the_same_command_again_asks_nothing_and_grades_anew(
    tandem: Command, provider: Provider, two_tiers: list[str], write: Write, tmp_path: Path
) -> None:
    provider.respond = lambda body: Reply("It is 4.")
    words = ("grade", write([{"prompt": "2 + 2?", "reference": "4"}]), *two_tiers)
    output = tmp_path / "graded.jsonl"
    tandem(*words, "-o", output)
    asked = len(provider.requests)

    ran = tandem(*words, "-o", output, "--grader", "exact", "--json")

    assert len(provider.requests) == asked == 2
    assert ran.found["graded_by"] == {"exact": 1}
    assert rows_of(output)[0]["quality"] == {"small": 0.0, "large": 0.0}


def test_rows_added_to_the_file_are_asked_and_the_old_ones_kept(
    tandem: Command, provider: Provider, two_tiers: list[str], write: Write, tmp_path: Path
) -> None:
    provider.respond = right
    output = tmp_path / "graded.jsonl"
    tandem("grade", write(sums(3)), "-o", output, *two_tiers)

    tandem("grade", write([*reversed(sums(5))]), "-o", output, *two_tiers)

    assert Counter(provider.prompts_to("s")) == Counter(row["prompt"] for row in sums(5))
    assert len(rows_of(output)) == 5


def test_several_samples_are_a_list_of_grades(
    tandem: Command, provider: Provider, two_tiers: list[str], write: Write, tmp_path: Path
) -> None:
    answers = iter("404404404")
    provider.respond = lambda body: Reply(next(answers) if body["model"] == "s" else "4")
    output = tmp_path / "graded.jsonl"

    tandem(
        *("grade", write([{"prompt": "2 + 2?", "reference": 4}]), "-o", output, *two_tiers),
        *("--samples", 3, "--concurrency", 1, "--temperature", 1),
    )

    (row,) = rows_of(output)
    assert sorted(row["quality"]["small"]) == [0.0, 1.0, 1.0]
    assert row["quality"]["large"] == [1.0, 1.0, 1.0]
    assert len(row["responses"]["small"]) == 3
    assert {body["temperature"] for body in provider.requests} == {1.0}
    assert dataset.read_dataset([output]).rows[0].quality["small"] == pytest.approx(2 / 3)


def test_a_conversation_is_sent_as_it_is_without_its_answer(
    tandem: Command, provider: Provider, two_tiers: list[str], write: Write, tmp_path: Path
) -> None:
    asked = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2 + 2?"},
    ]
    output = tmp_path / "graded.jsonl"
    row = {"messages": [*asked, {"role": "assistant", "content": "5"}], "reference": "4"}

    tandem("grade", write([row]), "-o", output, *two_tiers)

    assert provider.requests[0]["messages"] == asked
    assert rows_of(output)[0]["messages"] == asked


def test_a_tier_that_dies_in_the_middle_is_named_and_asked_again_later(
    tandem: Command,
    provider: Provider,
    two_tiers: list[str],
    write: Write,
    tmp_path: Path,
    no_waiting: list[float],
) -> None:
    dead = True

    def respond(body: dict[str, Any]) -> Reply:
        if dead and body["model"] == "s" and len(provider.prompts_to("s")) > 8:
            return Reply(status=503, body=b'{"error": {"message": "overloaded"}}')
        return right(body)

    provider.respond = respond
    output = tmp_path / "graded.jsonl"
    words = ("grade", write(sums(30)), "-o", output, *two_tiers, "--concurrency", 2)

    first = tandem(*words)

    assert first.status == 1
    assert "small was left alone: small at http" in first.out
    assert "answered 503: overloaded" in first.out
    assert "small: 22 answers are missing" in first.out
    assert len(provider.prompts_to("l")) == 30
    assert [len(row["quality"]) for row in rows_of(output)].count(1) == 22
    answered = set(provider.prompts_to("s")[:8])

    dead = False
    provider.seen.clear()
    second = tandem(*words)

    assert second.status == 0
    assert provider.prompts_to("l") == []
    assert not answered & set(provider.prompts_to("s"))
    assert len(provider.prompts_to("s")) == 22
    assert all(len(row["quality"]) == 2 for row in rows_of(output))


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (
            Reply(status=401, body=b'{"error": {"message": "bad key sk-1"}}'),
            "answered 401: bad key sk-1; no key was sent; name its variable with --key small=VARIA",
        ),
        (Reply(status=404, body=b"{}"), "answered 404; check the URL (it ends with /v1) and the"),
        (Reply(body=b"<html>Welcome</html>"), "answered HTML; is that the URL of an OpenAI"),
        (Reply(body=b'{"hello": 1}'), "answered no chat completion"),
        (Reply(status=200, body=b'{"error": {"message": "no quota"}}'), "completion: no quota"),
        (
            Reply(status=307, body=b"", headers={"location": "https://else.where/v1"}),
            "a redirect to https://else.where/v1; name that URL instead",
        ),
        (Reply(status=500, body=b"<html>oops</html>"), "answered 500"),
        (Reply(status=418, body=b"teapot \x1b[31m"), "answered 418: teapot"),
    ],
)
def test_a_tier_that_cannot_answer_is_named_with_the_way_out(
    tandem: Command,
    provider: Provider,
    two_tiers: list[str],
    write: Write,
    tmp_path: Path,
    no_waiting: list[float],
    reply: Reply,
    says: str,
) -> None:
    provider.respond = lambda body: reply if body["model"] == "s" else right(body)

    ran = tandem("grade", write(sums(30)), "-o", tmp_path / "graded.jsonl", *two_tiers)

    assert ran.status == 1
    assert says in ran.out
    assert "small was left alone" in ran.out
    assert "\x1b" not in ran.out
    assert len(rows_of(tmp_path / "graded.jsonl")) == 30


def test_nobody_listening_and_no_answer_in_time_are_said(
    tandem: Command, provider: Provider, write: Write, tmp_path: Path, no_waiting: list[float]
) -> None:
    provider.respond = lambda body: Reply("4", delay_s=5)

    ran = tandem(
        *("grade", write(sums(2)), "-o", tmp_path / "graded.jsonl", "--timeout", 0.05),
        *("--tier", f"slow={provider.api}#m", "--tier", "gone=http://127.0.0.1:9/v1#m"),
    )

    assert ran.status == 1
    assert "slow did not answer within 0.05 s (--timeout)" in ran.out
    assert "gone at http://127.0.0.1:9/v1 cannot be reached" in ran.out
    assert "nothing was graded" in ran.out
    assert not (tmp_path / "graded.jsonl").exists()


def test_a_busy_tier_is_left_alone_as_long_as_it_says(
    tandem: Command,
    provider: Provider,
    two_tiers: list[str],
    write: Write,
    tmp_path: Path,
    no_waiting: list[float],
) -> None:
    busy = {"s": 2, "l": 0}

    def respond(body: dict[str, Any]) -> Reply:
        if busy[body["model"]]:
            busy[body["model"]] -= 1
            return Reply(status=429, body=b"{}", headers={"retry-after": "7"})
        return right(body)

    provider.respond = respond

    ran = tandem(
        *("grade", write(sums(2)), "-o", tmp_path / "g.jsonl", *two_tiers, "--concurrency", 1)
    )

    assert ran.status == 0
    assert round(sum(no_waiting)) == 14
    assert "failures" not in ran.out


def test_a_model_that_wants_the_newer_limit_gets_it(
    tandem: Command, provider: Provider, two_tiers: list[str], write: Write, tmp_path: Path
) -> None:
    def respond(body: dict[str, Any]) -> Reply:
        if body["model"] == "l" and "max_tokens" in body:
            text = b'{"error": {"message": "use max_completion_tokens instead"}}'
            return Reply(status=400, body=text)
        return right(body)

    provider.respond = respond

    ran = tandem(
        *("grade", write(sums(3)), "-o", tmp_path / "g.jsonl", *two_tiers, "--max-tokens", 50)
    )

    assert ran.status == 0
    assert provider.requests[-1].get("max_completion_tokens", 50) == 50


def test_cut_off_empty_and_uncounted_answers_are_said(
    tandem: Command, provider: Provider, write: Write, tmp_path: Path
) -> None:
    replies = {"s": Reply("4 and", finish="length"), "l": Reply("", tokens=None)}
    provider.respond = lambda body: replies[body["model"]]

    ran = tandem(
        *("grade", write([{"prompt": "2 + 2?", "reference": 4}]), "-o", tmp_path / "g.jsonl"),
        *("--tier", f"small={provider.api}#s", "--tier", f"large={provider.api}#l"),
    )

    assert "small: 1 answer was cut off at max_tokens" in ran.out
    assert "large: 1 answer is empty" in ran.out
    assert "large: 1 answer came without token counts" in ran.out
    assert "small: 1 answer came without a cost; give --price small=IN/OUT" in ran.out


def test_a_model_that_explains_is_right_at_its_end_and_a_reference_elsewhere_is_said(
    tandem: Command, provider: Provider, write: Write, tmp_path: Path
) -> None:
    said = {"s": "The capital of France is Paris.", "l": "Paris is the capital of France."}
    provider.respond = lambda body: Reply(said[body["model"]])
    asked = (
        *("grade", write([{"prompt": "Capital?", "reference": "Paris"}])),
        *("-o", tmp_path / "g.jsonl"),
        *("--tier", f"small={provider.api}#s", "--tier", f"large={provider.api}#l"),
    )

    ran = tandem(*asked)
    again = tandem(*asked, "--grader", "includes")

    assert "large: 1 answer counts as wrong though the reference stands in the text" in ran.out
    assert "small: 1 answers count" not in ran.out
    assert rows_of(tmp_path / "g.jsonl")[0]["quality"] == {"small": 1.0, "large": 1.0}
    assert "count as wrong" not in again.out
    assert len(provider.requests) == 2


def test_a_routers_tiers_are_asked_by_name_around_its_cache(
    tandem: Command, provider: Provider, write: Write, tmp_path: Path
) -> None:
    provider.state = {
        "name": "chat",
        "tiers": [
            {"name": "s", "usd_per_1m_input_tokens": 0, "usd_per_1m_output_tokens": 0},
            {"name": "l", "usd_per_1m_input_tokens": 0.5, "usd_per_1m_output_tokens": 2},
        ],
    }

    def respond(body: dict[str, Any]) -> Reply:
        headers = {"x-tandem-tier": body["model"], "x-tandem-cost-usd": "0.000004000"}
        return Reply(right(body).text, headers=headers)

    provider.respond = respond

    ran = tandem(
        "grade", write(sums(3)), "-o", tmp_path / "g.jsonl", "--router", provider.url, "--json"
    )

    assert rows_of(tmp_path / "g.jsonl")[0]["cost_usd"] == {"s": 4e-06, "l": 1.5e-05}
    assert ran.found["spent_usd"] == pytest.approx(3 * 19e-6)
    sent = [seen.headers for seen in provider.seen if seen.body]
    assert {headers["cache-control"] for headers in sent} == {"no-cache"}


def test_a_router_file_names_external_tiers_and_those_behind_the_router(
    tandem: Command,
    provider: Provider,
    write: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    provider.respond = right
    path = tmp_path / "router.yaml"
    path.write_text(
        "kind: Model\n---\nkind: Router\nspec:\n  tiers:\n"
        "  - {name: small, modelRef: {name: m}, usdPer1MInputTokens: '1', "
        "usdPer1MOutputTokens: '2'}\n"
        f"  - {{name: large, external: {{url: '{provider.api}', model: big, "
        "usdPer1MInputTokens: '10', usdPer1MOutputTokens: '20'}}\n"
    )
    monkeypatch.setenv("LARGE_KEY", "secret-1")

    ran = tandem(
        *("grade", write(sums(2)), "-o", tmp_path / "g.jsonl", "--router", path),
        *("--url", provider.url, "--key", "large=LARGE_KEY"),
    )

    assert ran.status == 0, ran.err
    assert rows_of(tmp_path / "g.jsonl")[0]["cost_usd"] == {"small": 2e-05, "large": 2e-04}
    sent = {seen.json["model"]: seen.headers for seen in provider.seen}
    assert sent["big"]["authorization"] == "bearer secret-1"
    assert "authorization" not in sent["small"]
    assert "secret-1" not in ran.out + ran.err + (tmp_path / "g.jsonl.journal").read_text()


def test_the_users_command_grades_within_limits(
    tandem: Command, provider: Provider, two_tiers: list[str], write: Write, tmp_path: Path
) -> None:
    script = tmp_path / "check.py"
    script.write_text(
        "import os, sys\n"
        "assert os.listdir('.') == []\n"
        "answer = sys.stdin.read()\n"
        "print(0.5 if answer == os.environ['TANDEM_REFERENCE'] else 0)\n"
    )
    provider.respond = small_errs

    ran = tandem(
        *("grade", write(sums(2)), "-o", tmp_path / "g.jsonl", *two_tiers),
        *("--grade-command", f"{sys.executable} {script}"),
    )

    assert ran.status == 0
    assert [row["quality"] for row in rows_of(tmp_path / "g.jsonl")] == [
        {"small": 0.5, "large": 0.5},
        {"small": 0.0, "large": 0.5},
    ]


def test_token_statistics_become_part_of_the_rows_and_who_tells_none_is_asked_without(
    tandem: Command, provider: Provider, two_tiers: list[str], write: Write, tmp_path: Path
) -> None:
    def respond(body: dict[str, Any]) -> Reply:
        if body["model"] == "l" and "logprobs" in body:
            return Reply(status=400, body=b'{"error": {"message": "logprobs: unsupported"}}')
        told = (-0.5, -0.25) if "logprobs" in body else None
        return Reply(right(body).text, logprobs=told)

    provider.respond = respond
    output = tmp_path / "graded.jsonl"

    ran = tandem(
        "grade", write(sums(4)), "-o", output, *two_tiers, "--token-statistics", "--concurrency", 1
    )

    assert ran.status == 0, ran.err
    assert all(set(row["token_statistics"]) == {"small"} for row in rows_of(output))
    read = dataset.read_dataset([output])
    assert all(row.token_statistics["small"].num_tokens == 2 for row in read.rows)
    refused = [body for body in provider.requests if body["model"] == "l" and "logprobs" in body]
    assert len(refused) == 1
