"""A conversation is scored as it is trained: its last turn, after what that turn refers to."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tandem_router.config import LimitsConfig
from tandem_router.openai.body import Bodies
from tandem_router.openai.request import parse_inference
from tandem_router.predictor.records import conversation
from tandem_router.predictor.records.dataset import read_dataset, read_prompts

HARD = "Prove that there are infinitely many primes congruent to 3 modulo 4."
FOLLOW_UP = "Now do the same for the other one."


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def test_a_single_turn_is_a_plain_prompt() -> None:
    assert conversation.scored_text([user(HARD)]) == HARD


def test_a_follow_up_is_scored_after_what_it_follows() -> None:
    found = conversation.scored_text(
        [
            {"role": "system", "content": "You are a tutor."},
            user(HARD),
            {"role": "assistant", "content": "Suppose there were finitely many ..."},
            user(FOLLOW_UP),
        ]
    )

    assert found == f"You are a tutor.\n\n{HARD}\n\n{FOLLOW_UP}"


def test_parts_of_both_apis_count() -> None:
    parts = [
        {"type": "input_text", "text": "What is"},
        {"type": "image_url", "image_url": {"url": "data:"}},
        {"type": "text", "text": "this?"},
    ]

    assert conversation.scored_text([user(parts)]) == "What is\nthis?"


def test_a_long_history_is_read_in_part() -> None:
    long = [user("a" * 100_000), {"role": "assistant", "content": "b" * 100_000}] * 500

    found = conversation.scored_text([{"role": "system", "content": "s" * 9000}, *long, user("x")])

    assert len(found) < 1100


messages = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["system", "user", "assistant", "tool"]),
            "content": st.text(max_size=20) | st.none(),
        }
    ),
    min_size=1,
    max_size=6,
)


@given(messages)
def test_the_router_scores_what_training_reads(given_messages: list[dict[str, Any]]) -> None:
    body = json.dumps({"model": "chat", "messages": given_messages}).encode()

    request = parse_inference("chat", body, Bodies(LimitsConfig()))

    assert request.prompt == conversation.scored_text(conversation.parse(given_messages))


def test_all_three_commands_read_messages_alike(write: Callable[..., Path], tmp_path: Path) -> None:
    chat = [user(HARD), {"role": "assistant", "content": "..."}, user(FOLLOW_UP)]
    path = write([{"messages": chat, "quality": {"small": 0, "large": 1}}])

    (row,) = read_dataset([path]).rows

    assert row.prompt == f"{HARD}\n\n{FOLLOW_UP}"
    assert list(read_prompts(str(path))) == [row.prompt]


@given(
    st.sampled_from(["system", "developer", "user", "assistant", "tool"]),
    st.sampled_from(["", "  \n", "Be brief.", "s" * 300, None, [{"type": "text", "text": "Be."}]]),
    st.sampled_from(["", "Why?", None, [{"type": "text", "text": "Why?"}]]),
)
def test_the_commonest_shape_reads_as_any_other(role: str, first: Any, last: Any) -> None:
    """An answer in between sends the same two messages the general way."""
    messages = [{"role": role, "content": first}, {"role": "user", "content": last}]
    answer = {"role": "assistant", "content": "4"}

    found = conversation.scored_text(messages)

    assert found == conversation.scored_text([messages[0], answer, messages[1]])
