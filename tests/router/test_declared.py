"""What a body may hold is declared; every refusal says which field, which value and which rule."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem_router.anthropic.body import Message
from tandem_router.config import LimitsConfig
from tandem_router.errors import ApiError
from tandem_router.openai.body import Bodies, Response
from tandem_router.openai.declared import checked

BODIES = Bodies(LimitsConfig())
DECLARED = (BODIES.chat, BODIES.completion, BODIES.embedding, Response, Message)
CHAT = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
ASKED = {"role": "user", "content": "x"}


@pytest.mark.parametrize(
    ("declared", "fields", "said"),
    [
        (BODIES.chat, {"model": "m"}, "`messages` is missing; it must be a non-empty list of"),
        (BODIES.chat, {**CHAT, "n": 17}, "`n`=17 must be a whole number from 1 to 16"),
        (BODIES.chat, {**CHAT, "n": True}, "`n`=true must be a whole number"),
        (BODIES.chat, {**CHAT, "stop": ["x"] * 17}, "`stop` (17 entries) must be a string"),
        (BODIES.chat, {**CHAT, "logprobs": 21}, "true or false or a whole number of at most 20"),
        (BODIES.chat, {**CHAT, "messages": [{}]}, "`messages[0].role` is missing; it must be a"),
        (BODIES.chat, {**CHAT, "stream_options": {"include_usage": 1}}, "must be true or false"),
        (BODIES.completion, {"model": "m", "prompt": 7}, "`prompt`=7 must be a string, a list of"),
        (BODIES.completion, {"model": "m", "prompt": [[]]}, "`prompt[0]` (0 entries) must be"),
        (
            Message,
            {"model": "m", "max_tokens": 1, "messages": [{"role": "x", "content": "a"}]},
            '`messages[0].role`="x" must be user, assistant or system',
        ),
        (
            Message,
            {"model": "m", "max_tokens": 1, "messages": [{**ASKED, "content": [{"type": "file"}]}]},
            '`messages[0].content[0].type`="file" must be text, image or tool_result',
        ),
        (
            Message,
            {"model": "m", "max_tokens": 1, "messages": [{**ASKED, "content": 5}]},
            "must be a string or a list of objects with `type` text, image or tool_result",
        ),
    ],
)
def test_a_refusal_names_field_value_and_rule(
    declared: type[Any], fields: dict[str, Any], said: str
) -> None:
    with pytest.raises(ApiError) as refused:
        checked(fields, declared)

    assert said in str(refused.value)
    assert f"`{refused.value.param}`" in str(refused.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "role", "content", "text", "source", "a.b[0]"]), inner
        )
    ),
    max_leaves=6,
)


@given(declared=st.sampled_from(DECLARED), data=st.data())
def test_whatever_is_in_a_body_it_is_taken_or_refused_by_name(
    declared: type[Any], data: st.DataObject
) -> None:
    """Kinds that the types do not expect, at any depth, never end in another error."""
    names = st.sampled_from(declared.__struct_fields__)
    fields = data.draw(st.dictionaries(names, JSON, max_size=5))

    try:
        said: Any = checked(fields, declared)
    except ApiError as refused:
        said = refused

    assert isinstance(said, declared) or (said.status == 400 and said.param)
