"""A judge in `tandem grade`: what it is asked, what it costs, how far it can be believed."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fake_provider import Command, Provider, Reply, question, rows_of, small_errs, sums

Write = Callable[..., Path]


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
