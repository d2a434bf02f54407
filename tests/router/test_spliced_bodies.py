"""What a provider is sent says what the client said, whichever way its model's name got in."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem_router.config import LimitsConfig
from tandem_router.engines.openai import as_provider
from tandem_router.openai.body import Bodies
from tandem_router.openai.request import parse_inference
from tandem_router.proxy.upstream_request import spliced

BODIES = Bodies(LimitsConfig())
NAME = 'their "model" ü'
text = st.sampled_from(['"', "\\", "model", '"model"', ":", "x", "é", "\n", " "])
values = st.recursive(
    st.none() | st.integers(-5, 5) | st.lists(text, max_size=4).map("".join),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(text, inner, max_size=2),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None)
@given(
    model=st.sampled_from(["chat", "model", 'a"b', "ü", "a/b"]),
    content=st.lists(text, max_size=5).map("".join),
    more=st.dictionaries(st.sampled_from(["user", "metadata", "seed"]), values, max_size=3),
    options=st.sampled_from(["absent", None, {}, {"include_usage": True}]),
    stream=st.booleans(),
    first=st.booleans(),
    ascii_only=st.booleans(),
    spaced=st.booleans(),
)
def test_a_spliced_body_says_what_a_written_one_does(
    model: str,
    content: str,
    more: dict[str, Any],
    options: Any,
    stream: bool,
    first: bool,
    ascii_only: bool,
    spaced: bool,
) -> None:
    fields: dict[str, Any] = {"messages": [{"role": "user", "content": content}], **more}
    fields = {"model": model, **fields} if first else {**fields, "model": model}
    if stream:
        fields["stream"] = True
    if options != "absent":
        fields["stream_options"] = options
    separators = (", ", " : ") if spaced else (",", ":")
    body = json.dumps(fields, ensure_ascii=ascii_only, separators=separators).encode()
    request = parse_inference("chat", body, BODIES)

    found = spliced(request, NAME)

    if found is not None:
        assert json.loads(found) == as_provider(request, request.fields, NAME)


@pytest.mark.parametrize(
    "body",
    [
        rb'{"\u006dodel": "chat", "messages": [{"role": "user", "content": "x", "model": "chat"}]}',
        rb'{"model": "chat", "model": "chat", "messages": [{"role": "user", "content": "x"}]}',
        rb'{"model": "ch\u0061t", "messages": [{"role": "user", "content": "x"}]}',
        rb'{"messages": [{"role": "user", "content": "x", "model": "a"}], "model": "chat"}',
    ],
    ids=["key is spelled out", "twice", "value is spelled out", "nested"],
)
def test_a_body_that_may_name_a_model_elsewhere_is_written_anew(body: bytes) -> None:
    assert spliced(parse_inference("chat", body, BODIES), NAME) is None


def test_most_bodies_are_spliced() -> None:
    body = json.dumps(
        {"model": "chat", "messages": [{"role": "user", "content": 'a\n"b" 1e3'}], "stream": True}
    ).encode()

    found = spliced(parse_inference("chat", body, BODIES), "m")

    assert found == b'{"stream_options":{"include_usage":true},' + body[1:].replace(
        b'"chat"', b'"m"', 1
    )
