"""`tandem grade` as a user runs it: two endpoints, a file of prompts, and what can go wrong."""

from __future__ import annotations

import gzip
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fake_provider import Command, Provider, Reply, question, right, sums
from tandem_router.predictor.training import dataset

Write = Callable[..., Path]


def rows_of(path: Path) -> list[dict[str, Any]]:
    content = path.read_bytes()
    if path.name.endswith(".gz"):
        content = gzip.decompress(content)
    return [json.loads(line) for line in content.splitlines()]


def small_errs(body: dict[str, Any]) -> Reply:
    """The small tier is right on even sums only, and shorter; the large one on all."""
    number = int(question(body).split()[2])
    wrong = body["model"] == "s" and number % 2
    return Reply(str(2 * number + bool(wrong)), tokens=(10, 5 if body["model"] == "s" else 9))


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

    assert "small: 1 answers were cut off at max_tokens" in ran.out
    assert "large: 1 answers are empty" in ran.out
    assert "large: 1 answers came without token counts" in ran.out
    assert "small: 1 answers came without a cost; give --price small=IN/OUT" in ran.out


@pytest.mark.parametrize("concurrency", [1, 8])
def test_no_more_than_max_usd_is_spent_and_the_rest_is_asked_when_it_is_raised(
    tandem: Command,
    provider: Provider,
    two_tiers: list[str],
    write: Write,
    tmp_path: Path,
    concurrency: int,
) -> None:
    provider.respond = lambda body: Reply("4", tokens=(10, 100))
    words = ("grade", write(sums(50)), "-o", tmp_path / "g.jsonl", *two_tiers, "--json")
    words = (*words, "--max-tokens", 100, "--concurrency", concurrency)

    first = tandem(*words, "--max-usd", 0.05).found

    assert first["stopped"] == "max_usd"
    assert 0.03 < first["spent_usd"] <= 0.05
    second = tandem(*words, "--max-usd", 1).found
    assert second["stopped"] is None
    assert second["spent_usd"] == pytest.approx(50 * (210e-6 + 2100e-6))
    assert len(provider.requests) == 100


def test_money_is_held_by_bytes_for_letters_that_take_several_tokens(
    tandem: Command, provider: Provider, two_tiers: list[str], write: Write, tmp_path: Path
) -> None:
    provider.respond = lambda body: Reply("4", tokens=(1200, 1))
    rows = [{"prompt": f"{'数' * 1000} {i}", "reference": 4} for i in range(8)]

    found = tandem(
        *("grade", write(rows), "-o", tmp_path / "g.jsonl", *two_tiers, "--json"),
        *("--max-tokens", 1, "--max-usd", 0.034, "--concurrency", 1),
    ).found

    assert found["stopped"] == "max_usd"
    assert found["spent_usd"] <= 0.034


def test_money_is_held_for_asking_a_judge_that_garbles_once_more(
    tandem: Command, provider: Provider, write: Write, tmp_path: Path
) -> None:
    def respond(body: dict[str, Any]) -> Reply:
        return Reply("Hmm." if body["model"] == "j" else body["model"], tokens=(0, 100))

    provider.respond = respond

    found = tandem(
        *("grade", write([{"prompt": "Why?"}]), "-o", tmp_path / "g.jsonl", "--json"),
        *("--tier", f"small={provider.api}#s", "--tier", f"large={provider.api}#l"),
        *("--price", "small=0/1", "--price", "large=0/1"),
        *("--judge", f"{provider.api}#j", "--judge-price", "0/10"),
        *("--max-tokens", 100, "--max-usd", 0.003),
    ).found

    assert found["spent_usd"] <= 0.003


PROGRAM = "import sys; from tandem_operator.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_after_ctrl_c_nothing_is_asked_twice(
    tandem: Command,
    provider: Provider,
    two_tiers: list[str],
    write: Write,
    tmp_path: Path,
    number: signal.Signals,
) -> None:
    def slowly(body: dict[str, Any]) -> Reply:
        return Reply(right(body).text, delay_s=0.05)

    provider.respond = slowly
    output = tmp_path / "g.jsonl"
    words = ["grade", str(write(sums(60))), "-o", str(output), *two_tiers, "--concurrency", "3"]
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    while len(provider.requests) < 12 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)

    assert process.returncode == 130, (out, err)
    assert b"Ctrl-C again drops them" in err
    assert b"run the same command again" in out
    assert 6 <= len(rows_of(output)) < 60
    assert all(len(row["quality"]) == 2 for row in rows_of(output))
    provider.respond = right
    ran = tandem(*words)
    assert ran.status == 0
    assert len(rows_of(output)) == 60
    assert set(Counter(provider.prompts_to("s")).values()) == {1}
    assert set(Counter(provider.prompts_to("l")).values()) == {1}


def test_a_killed_run_goes_on_behind_its_last_whole_line(
    tandem: Command, provider: Provider, two_tiers: list[str], write: Write, tmp_path: Path
) -> None:
    provider.respond = right
    output = tmp_path / "g.jsonl"
    words = ("grade", write(sums(4)), "-o", output, *two_tiers)
    tandem(*words)
    journal = output.with_name("g.jsonl.journal")
    journal.write_bytes(journal.read_bytes()[:-20])

    tandem(*words)

    assert len(provider.requests) == 9
    assert len(rows_of(output)) == 4


def truthful(body: dict[str, Any], wrong: Callable[[], bool] = lambda: False) -> Reply:
    """A judge that knows the sums: the right answer wins, two alike tie; sometimes it errs."""
    text = question(body)
    wanted = 2 * int(text.split("What is ")[1].split()[0])
    answers = [part.split("\n")[1] for part in text.split("[The Start of")[1:]]
    good = [answer == str(wanted) for answer in answers]
    said = "C" if good[0] == good[1] else "A" if good[0] else "B"
    if wrong():
        said = {"A": "B", "B": "A", "C": "A"}[said]
    return Reply(f"I looked at both.\n[[{said}]]", tokens=(200, 10))


def test_without_references_a_judge_grades_and_its_price_is_booked(
    tandem: Command, provider: Provider, two_tiers: list[str], write: Write, tmp_path: Path
) -> None:
    provider.respond = lambda body: truthful(body) if body["model"] == "j" else small_errs(body)
    output = tmp_path / "g.jsonl"
    prompts = [{"prompt": row["prompt"]} for row in sums(20)]
    words = ("grade", write(prompts), "-o", output, *two_tiers, "--json")

    found = tandem(
        *words, "--judge", f"{provider.api}#j", "--judge-price", "5/10", "--concurrency", 2
    ).found

    rows = rows_of(output)
    assert [row["quality"] for row in rows[:2]] == [
        {"small": 1.0, "large": 1.0},
        {"small": 0.0, "large": 1.0},
    ]
    assert found["graded_by"] == {"judge": 20}
    assert found["judge"]["judged_pairs"] == 10  # equal answers are a tie without asking
    assert found["judge"]["contradicted"] == 0
    assert found["judge"]["usd"] == pytest.approx(20 * (200 * 5 + 10 * 10) / 1e6)
    assert found["judge"]["agreement"] is None


def test_another_judge_gives_its_own_verdicts_on_the_answers_there_are(
    tandem: Command, provider: Provider, two_tiers: list[str], write: Write, tmp_path: Path
) -> None:
    provider.respond = lambda body: (
        truthful(body) if body["model"].startswith("judge") else small_errs(body)
    )
    words = ("grade", write(sums(4)), "-o", tmp_path / "g.jsonl", *two_tiers)
    tandem(*words)
    tandem(*words, "--judge", f"{provider.api}#judge-1")

    tandem(*words, "--judge", f"{provider.api}#judge-2")

    asked = Counter(body["model"] for body in provider.requests)
    assert asked == {"s": 4, "l": 4, "judge-1": 4, "judge-2": 4}


def test_a_judge_that_errs_at_a_known_rate_is_measured_by_references(
    tandem: Command, provider: Provider, two_tiers: list[str], write: Write, tmp_path: Path
) -> None:
    rng = random.Random(3)

    def respond(body: dict[str, Any]) -> Reply:
        if body["model"] == "j":
            return truthful(body, lambda: rng.random() < 0.2)
        return small_errs(body)

    provider.respond = respond
    words = ("grade", write(sums(96)), "-o", tmp_path / "g.jsonl", *two_tiers)

    ran = tandem(*words, "--judge", f"{provider.api}#j", "--judge-check", 200)

    assert "numeric 96" in ran.out  # the reference grades, the judge is only measured
    assert "the judge agrees with the references in" in ran.out
    found = tandem(*words, "--judge", f"{provider.api}#j", "--judge-check", 200, "--json").found
    measured = found["judge"]["agreement_where_one_is_better"]
    assert measured["num_pairs"] == 48
    assert measured["low"] <= 0.8 <= measured["high"]
    assert measured["high"] - measured["low"] < 0.25


def test_a_judge_that_garbles_or_prefers_a_place_is_told_from_one_that_judges(
    tandem: Command, provider: Provider, two_tiers: list[str], write: Write, tmp_path: Path
) -> None:
    def respond(body: dict[str, Any]) -> Reply:
        if body["model"] != "j":
            return small_errs(body)
        return Reply("Hmm." if "What is 1 + 1?" in question(body) else "[[A]]")

    provider.respond = respond
    prompts = [{"prompt": row["prompt"]} for row in sums(10)]

    ran = tandem(
        *("grade", write(prompts), "-o", tmp_path / "g.jsonl", *two_tiers),
        *("--judge", f"{provider.api}#j"),
    )

    assert "the judge garbled 2 verdicts" in ran.out
    assert "1 questions could not be graded: the judge gave no verdict in both orders" in ran.out
    assert "in 4 (100%) it contradicted itself when the order changed" in ran.out
    assert "is unknown: no judged row has a reference" in ran.out
    assert "missing" not in ran.out  # there is an answer, only no verdict about it
    assert rows_of(tmp_path / "g.jsonl")[2]["quality"] == {"small": 0.5, "large": 0.5}


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


def test_a_price_that_is_none_and_a_key_that_no_header_holds_are_refused(
    tandem: Command, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "router.yaml"
    path.write_text(
        "kind: Router\nspec:\n  tiers:\n"
        "  - {name: small, usdPer1MInputTokens: '1', usdPer1MOutputTokens: cheap}\n"
    )
    monkeypatch.setenv("ODD_KEY", "schlüssel")
    words = (write(sums(2)), "-o", tmp_path / "g.jsonl")

    assert "tier small: usdPer1MOutputTokens is 'cheap', not dollars per million" in refusal(
        tandem, *words, "--router", path
    )
    assert "the key in ODD_KEY holds characters that no header can" in refusal(
        tandem, *words, "--tier", TIER, "--key", "small=ODD_KEY"
    )


def refusal(tandem: Command, *words: object) -> str:
    ran = tandem("grade", *words)
    assert ran.status in (1, 2), ran.out
    assert "Traceback" not in ran.err
    return ran.err


TIER = "small=http://127.0.0.1:9/v1#m"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "nobody to ask; name a Router (--router FILE or URL) or tiers"),
        (["--tier", "small"], "is not NAME=URL#MODEL, such as small="),
        (["--tier", "small=http://h/v1"], "names no model; end it with #MODEL"),
        (["--tier", "small=ftp://h#m"], "'ftp://h' is not a URL; write it like http"),
        (["--tier", "small=http://u:p@h/v1#m"], "leave user and password out of the URL"),
        (["--tier", TIER, "--tier", TIER], "two tiers are called 'small'"),
        (["--tier", TIER.replace("small", "judge")], "a tier cannot be called judge"),
        (["--tier", TIER, "--price", "large=1/2"], "there is no tier 'large'; the tiers are small"),
        (["--tier", TIER, "--price", "small=cheap"], "is not IN/OUT in dollars per million"),
        (["--tier", TIER, "--price", "small"], "--price 'small' is not NAME=VALUE"),
        (["--tier", TIER, "--key", "small=NOT_SET"], "the variable NOT_SET, named for small's key"),
        (["--tier", TIER, "--max-usd", "1"], "cannot be held, small has no price; give --price sm"),
        (["--tier", TIER, "--judge", "http://h/v1"], "--judge 'http://h/v1' names no model"),
        (["--tier", TIER, "--judge-price", "1/2"], "--judge-price speaks of a judge; name it"),
        (
            ["--tier", TIER, "--judge", "http://h#m", "--grade-command", "true"],
            "--judge and --grade-command both grade",
        ),
        (["--tier", TIER, "--grade-command", "no-such"], "there is no program 'no-such'"),
        (["--tier", TIER, "--grade-command", "'"], "is no command line"),
        (["--tier", TIER, "--samples", "0"], "'0' is not a whole number from 1 to 100"),
        (["--tier", TIER, "--temperature", "nan"], "'nan' is not a number from 0 to 2"),
        (["--router", "missing.yaml"], "--router missing.yaml does not exist"),
        (["--router", "http://127.0.0.1:9"], "--router: no Router answers at http://127.0.0.1:9"),
        (["--tier", TIER, "--reference", "right"], "no row has a `reference` (columns: reference)"),
    ],
)
def test_what_cannot_work_is_refused_before_anybody_is_asked(
    tandem: Command, write: Write, tmp_path: Path, words: list[str], says: str
) -> None:
    assert says in refusal(tandem, write(sums(2)), "-o", tmp_path / "g.jsonl", *words)
    assert not (tmp_path / "g.jsonl.journal").exists()


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([], "holds no prompts; expected text, JSON lines or a table"),
        (
            [{"prompt": "p", "answer": "4"}],
            "no row has a `reference` (columns: answer) and there is no judge, so answers could "
            "not be graded; name the column with --reference answer, a judge with",
        ),
        (
            [{"prompt": "p", "id": 7, "reference": 1}, {"prompt": "q", "id": 7, "reference": 1}],
            "the id 7 stands at prompts.jsonl:1 and again at prompts.jsonl:2",
        ),
        (
            [{"prompt": "p", "reference": "(", "grader": "regex"}],
            "1 references cannot be used; correct them or name another grader, the first are\n"
            "  prompts.jsonl:1: '(' is no regular expression",
        ),
        ([{"prompt": "p", "grader": "magic"}], "names the grader 'magic'; known are exact, norm"),
        ([{"question": "p"}], "its columns are question: rename `question` to `prompt`"),
        ([{"prompt": ""}], "has an empty prompt"),
    ],
)
def test_prompts_that_cannot_be_graded_are_refused_before_anybody_is_asked(
    tandem: Command, write: Write, tmp_path: Path, rows: list[Any], says: str
) -> None:
    assert says in refusal(tandem, write(rows), "-o", tmp_path / "g.jsonl", "--tier", TIER)


def test_a_file_of_another_run_is_not_gone_on_with(
    tandem: Command, provider: Provider, two_tiers: list[str], write: Write, tmp_path: Path
) -> None:
    provider.respond = right
    words = (write(sums(2)), "-o", tmp_path / "g.jsonl")
    tandem("grade", *words, *two_tiers)

    other = refusal(tandem, *words, "--tier", TIER)
    longer = refusal(tandem, *words, *two_tiers, "--max-tokens", 7)

    assert "holds answers of another run: its tiers are small (s at http://127.0.0.1" in other
    assert "not small (m at http://127.0.0.1:9/v1); go on with what it had" in other
    assert "its max_tokens is not set, not 7" in longer


def test_what_cannot_be_written_is_said_before_anybody_is_asked(
    tandem: Command, provider: Provider, two_tiers: list[str], write: Write, tmp_path: Path
) -> None:
    prompts = write(sums(2))
    (tmp_path / "mine.jsonl").write_text("precious")
    (tmp_path / "x.jsonl.journal").write_text("something else\n")

    assert "is a directory; name a file" in refusal(tandem, prompts, "-o", tmp_path, *two_tiers)
    assert "make it first" in refusal(tandem, prompts, "-o", tmp_path / "no" / "g", *two_tiers)
    assert "it would be overwritten" in refusal(
        tandem, prompts, "-o", tmp_path / "mine.jsonl", *two_tiers
    )
    assert "x.jsonl.journal:1 is not what `tandem grade` wrote" in refusal(
        tandem, prompts, "-o", tmp_path / "x.jsonl", *two_tiers
    )
    if os.geteuid() != 0:
        tmp_path.chmod(0o500)
        assert "Permission denied" in refusal(
            tandem, prompts, "-o", tmp_path / "g.jsonl", *two_tiers
        )
        tmp_path.chmod(0o700)
    assert provider.requests == []


def test_a_full_disk_ends_the_run_with_a_sentence(
    tandem: Command, provider: Provider, two_tiers: list[str], write: Write, tmp_path: Path
) -> None:
    provider.respond = right
    prompts = write(sums(20))
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, limit[1]))
    try:
        said = refusal(tandem, prompts, "-o", tmp_path / "g.jsonl", *two_tiers)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)

    assert f"cannot write {tmp_path / 'g.jsonl.journal'}: " in said
    again = tandem("grade", prompts, "-o", tmp_path / "g.jsonl", *two_tiers)
    assert again.status == 0
    assert len(provider.prompts_to("s")) < 40


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
