"""What a request body may hold: fields that change the answer are served or refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from tandem_worker.errors import RequestError
from tandem_worker.openai.body import REFUSED
from tandem_worker.openai.request import parse_chat, parse_completion

CHAT: Mapping[str, Any] = {"messages": [{"role": "user", "content": "x"}]}
TEXT: Mapping[str, Any] = {"prompt": "x"}


def refusal(body: Mapping[str, Any], *, chat: bool = True) -> RequestError:
    with pytest.raises(RequestError) as caught:
        parse_chat({**CHAT, **body}) if chat else parse_completion({**TEXT, **body})
    return caught.value


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_field_that_would_change_the_answer_is_refused_by_name(name: str) -> None:
    error = refusal({name: {"x": 1}})

    assert error.status == 400
    assert error.param == name
    assert error.code == "unsupported_parameter"
    assert REFUSED[name].instead in str(error)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_field_that_asks_for_nothing_passes(name: str) -> None:
    for value in (None, False, [], {}, *REFUSED[name].neutral):
        parse_chat({**CHAT, name: value})


def test_a_zero_is_no_absence() -> None:
    """vLLM's ``prompt_logprobs: 0`` asks for the prompt's own log-probabilities."""
    assert refusal({"prompt_logprobs": 0}).param == "prompt_logprobs"


def test_harmless_unknown_fields_pass() -> None:
    request = parse_chat({**CHAT, "user": "u", "metadata": {"a": 1}, "store": True, "x": [1]})

    assert request.messages == ({"role": "user", "content": "x"},)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"min_tokens": 9, "max_tokens": 3}, "min_tokens=9 must not exceed max_tokens=3"),
        ({"top_p": 0}, "top_p=0 must be above 0"),
        ({"stop": [""]}, "stop=[''] holds an empty string"),
        ({"stop": ["a", ""]}, "holds an empty string"),
        ({"best_of": 2}, "best_of=2 is not supported unless it equals n=1"),
        ({"n": True}, "n=True must be an integer"),
        ({"temperature": float("nan")}, "temperature=nan must be a finite number"),
        ({"tool_choice": "required"}, "tool_choice='required' needs tools"),
        ({"stream_options": []}, "stream_options=[] must be an object"),
        ({"seed": 1 << 64}, "seed=18446744073709551616 must be at most"),
        ({"messages": [{"content": "x"}]}, "must be an object with a role"),
        ({"messages": ["x"]}, "messages[0]='x' must be an object"),
    ],
)
def test_a_value_outside_the_rules_is_refused_with_the_rule(
    body: Mapping[str, Any], said: str
) -> None:
    error = refusal(body)

    assert said in str(error)
    assert error.status == 400
    assert error.param in (*body, "messages[0]")


def test_an_empty_stop_string_alone_means_none() -> None:
    assert parse_chat({**CHAT, "stop": ""}).stop == ()


def test_no_value_shown_in_a_refusal_is_longer_than_a_line() -> None:
    error = refusal({"prompt": [[-1] * 100_000]}, chat=False)

    assert len(str(error)) < 200


def test_text_parts_join_with_a_line_break_as_peers_do() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]

    request = parse_chat({"messages": [{"role": "user", "content": parts}]})

    assert request.messages[0]["content"] == "a\nb"


def test_arguments_of_earlier_calls_reach_templates_as_objects() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    history = [{"role": "assistant", "content": None, "tool_calls": [call]}]

    (message,) = parse_chat({"messages": history}).messages

    assert message["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    broken = {**call, "function": {"name": "f", "arguments": "{"}}
    error = refusal({"messages": [{"role": "assistant", "tool_calls": [broken]}]})
    assert "not JSON" in str(error)
