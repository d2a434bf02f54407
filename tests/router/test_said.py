"""Whatever a provider puts where text and calls belong, other protocols get well-formed replies."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tandem_router.anthropic.blocks import BlockWriter
from tandem_router.openai.response_items import OutputItems
from tandem_router.openai.said import calls_of, text_of

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)
FUNCTION = st.fixed_dictionaries({}, optional={"name": JSON, "arguments": JSON}) | JSON
CALL = st.fixed_dictionaries({}, optional={"index": JSON, "id": JSON, "function": FUNCTION}) | JSON
DELTA = st.fixed_dictionaries(
    {}, optional={"content": JSON, "reasoning": JSON, "tool_calls": st.lists(CALL) | JSON}
)


def event(name: str, /, **fields: Any) -> bytes:
    return json.dumps({"type": name, **fields}).encode() + b"\n"


@given(st.lists(DELTA, max_size=4))
def test_any_delta_makes_items_and_blocks_of_text(deltas: list[dict[str, Any]]) -> None:
    items, blocks = OutputItems("r", event), BlockWriter()
    for delta in deltas:
        items.delta(delta, [])
        blocks.delta(delta)
    items.end(False)
    blocks.close()

    for item in items.items:
        texts = (item["name"], item["arguments"]) if "arguments" in item else ()
        texts = texts or (item["content"][0]["text"],)
        assert all(isinstance(text, str) for text in texts)


def test_arguments_that_are_an_object_are_the_json_that_they_stand_for() -> None:
    function = {"name": "weather", "arguments": {"city": "Oslo"}}
    (call,) = calls_of({"tool_calls": [{"id": "c", "function": function}]})

    assert call == (0, "c", "weather", '{"city": "Oslo"}')
    assert text_of({"content": ["x"], "reasoning": "so"}, "content", "reasoning") == "so"
