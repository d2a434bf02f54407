"""`tandem verify`: what a Router delivered beside one tier for all, and whether the floor held."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fake_provider import Command, Provider, Reply, question

Write = Callable[..., Path]


def router(provider: Provider, quality_floor: float | None = None) -> None:
    provider.state = {
        "name": "chat",
        "quality_floor": quality_floor,
        "tiers": [{"name": "small"}, {"name": "large"}],
    }


def graded(count: int, **more: Any) -> list[dict[str, Any]]:
    """The small tier is right on even questions."""
    return [
        {
            "prompt": f"What is {i} + {i}?",
            "quality": {"small": 1 - i % 2, "large": 1},
            "cost_usd": {"small": 0.001, "large": 0.01},
            **({"reference": 2 * i, "grader": "numeric"} | more),
        }
        for i in range(count)
    ]


def routes(mistakes: int = 0) -> Callable[[dict[str, Any]], Reply]:
    """Even questions go to the small tier; the first odd ones too, wrongly, where it errs."""

    def respond(body: dict[str, Any]) -> Reply:
        number = int(question(body).split()[2])
        small = number % 2 == 0 or number < 2 * mistakes
        right = not small or number % 2 == 0
        cost = "0.001" if small else "0.01"
        headers = {"x-tandem-tier": "small" if small else "large", "x-tandem-cost-usd": cost}
        return Reply(str(2 * number + (not right)), headers=headers)

    return respond


def test_a_router_that_routes_right_saves_calls_and_dollars_and_holds_its_floor(
    tandem: Command, provider: Provider, write: Write
) -> None:
    router(provider, 0.95)
    provider.respond = routes()

    ran = tandem("verify", write(graded(100)), "--url", provider.url)

    assert ran.status == 0, ran.err
    assert {body["model"] for body in provider.requests} == {"chat"}
    assert "all small    0.500" in ran.out
    assert "all large    1.000" in ran.out
    assert "routed       1.000" in ran.out
    assert "50 of 100 large calls saved, $0.45 (45%) beside all-large" in ran.out
    assert "the floor of 95.0% held: 100.0% (100.0% to 100.0%) of large's quality" in ran.out


@pytest.mark.parametrize(
    ("mistakes", "floor", "status", "says"),
    [
        (20, 0.95, 1, "the floor of 95.0% did not hold: 80.0% ("),
        (5, 0.96, 0, "whether the floor of 96.0% held cannot be said yet: 95.0% ("),
        (5, None, 0, "the Router has no quality floor (--floor checks one)"),
    ],
)
def test_a_floor_held_or_not_or_cannot_be_said_yet(
    tandem: Command,
    provider: Provider,
    write: Write,
    mistakes: int,
    floor: float | None,
    status: int,
    says: str,
) -> None:
    router(provider, floor)
    provider.respond = routes(mistakes)

    ran = tandem("verify", write(graded(100)), "--url", provider.url)

    assert ran.status == status
    assert says in ran.out


def test_without_references_the_grade_of_the_tier_that_answered_counts(
    tandem: Command, provider: Provider, write: Write
) -> None:
    router(provider)
    provider.respond = lambda body: Reply("whatever", headers=routes(10)(body).headers)

    found = tandem(
        *("verify", write(graded(40, reference=None)), "--url", provider.url),
        *("--floor", 0.5, "--json"),
    ).found

    assert found["quality"] == pytest.approx(0.75)
    assert found["calls"] == {"small": 30, "large": 10}
    assert found["saved_usd"] == pytest.approx(0.4 - 0.13)
    assert found["floor_held"] is True


def test_a_reference_that_is_none_is_refused_and_not_graded_as_something_else(
    tandem: Command, provider: Provider, write: Write
) -> None:
    router(provider)

    ran = tandem("verify", write(graded(20, reference="no number")), "--url", provider.url)

    assert ran.status == 1
    assert "20 references cannot be used" in ran.err
    assert "'no number' holds no number" in ran.err
    assert provider.requests == []


def test_questions_that_fail_are_counted(
    tandem: Command, provider: Provider, write: Write, no_waiting: list[float]
) -> None:
    router(provider)

    def respond(body: dict[str, Any]) -> Reply:
        refused = "What is 3 " in question(body)
        return Reply(status=400, body=b"{}") if refused else routes()(body)

    provider.respond = respond

    ran = tandem("verify", write(graded(20)), "--url", provider.url)

    assert "chat answered 19 questions, 19 compared" in ran.out
    assert "1 questions failed, the last: the Router at http" in ran.out


@pytest.mark.parametrize(
    ("state", "words", "says"),
    [
        (None, [], "answered 404, not a Router's state; is http"),
        ({"name": "chat", "tiers": []}, [], "names no Router with tiers"),
        ({"name": "chat", "tiers": [{"name": "x"}]}, [], "verify needs grades of its tiers"),
        ({"name": "chat", "tiers": [{"name": "small"}]}, ["--key", "NOT_SET"], "NOT_SET, named"),
    ],
)
def test_what_cannot_be_verified_is_one_sentence(
    tandem: Command,
    provider: Provider,
    write: Write,
    state: dict[str, Any] | None,
    words: list[str],
    says: str,
) -> None:
    provider.state = state

    ran = tandem("verify", write(graded(20)), "--url", provider.url, *words)

    assert ran.status == 1
    assert says in ran.err


def test_a_router_with_tenants_is_asked_with_the_peer_token(
    tandem: Command, provider: Provider, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    router(provider)
    provider.peer_token = "t0k"
    provider.respond = routes()
    words = ("verify", write(graded(20)), "--url", provider.url)

    refused = tandem(*words)
    monkeypatch.setenv("TANDEM_PEER_TOKEN", "t0k")
    monkeypatch.setenv("TANDEM_API_KEY", "tenant-1")
    found = tandem(*words)

    assert refused.status == 1
    assert (
        "needs the peer token, because tenants exist; put it into TANDEM_PEER_TOKEN" in refused.err
    )
    assert found.status == 0, found.err
    keys = {seen.headers["authorization"] for seen in provider.seen if seen.body}
    assert keys == {"bearer tenant-1"}


def test_a_router_that_answers_nothing_is_said(
    tandem: Command, provider: Provider, write: Write, no_waiting: list[float]
) -> None:
    router(provider)
    provider.respond = lambda body: Reply(status=401, body=b"{}")

    ran = tandem("verify", write(graded(20)), "--url", provider.url)

    assert ran.status == 1
    assert "the Router answered none of 20 questions: the Router at http" in ran.err
    assert "--key VARIABLE" in ran.err
