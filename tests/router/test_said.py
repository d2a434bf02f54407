"""Whatever a provider puts where text and calls belong, other protocols get well-formed replies."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tandem_router.anthropic.blocks import BlockWriter
from tandem_router.anthropic.reply import MessagesSend
from tandem_router.cache.response_cache import assemble
from tandem_router.openai.response_items import OutputItems
from tandem_router.openai.responses_api import ResponsesSend
from tandem_router.openai.said import calls_of, chunk_of, text_of
from tandem_router.proxy.resume import StreamJournal

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


CHOICE = st.fixed_dictionaries(
    {}, optional={"index": JSON, "delta": DELTA | JSON, "finish_reason": JSON, "token_ids": JSON}
)
CHUNK = st.fixed_dictionaries(
    {}, optional={"choices": st.lists(CHOICE | JSON, max_size=3) | JSON, "usage": JSON}
)
DEEP = b'data: {"choices": ' + b"[" * 100_000 + b"\n\n"
BROKEN = b'data: {"choices": [{"delta": {"content": "a"}}].1\n\n'
EVENTS = st.lists(
    CHUNK.map(lambda chunk: b"data: " + json.dumps(chunk).encode() + b"\n\n")
    | st.sampled_from([DEEP, BROKEN, b": ping\n\n", b"data: [DONE]\n\n"]),
    max_size=4,
)


@given(EVENTS)
async def test_any_chunk_is_passed_booked_and_kept_without_an_error(events: list[bytes]) -> None:
    """A provider's stream is forwarded as it is; whoever reads it reads what there is."""
    sent: list[bytes] = []

    async def send(message: Any) -> None:
        sent.append(message.get("body", b""))

    journal = StreamJournal()
    kind = (b"content-type", b"text/event-stream; charset=utf-8")
    start = {"type": "http.response.start", "status": 200, "headers": [kind]}
    for converted in (MessagesSend(send, "r"), ResponsesSend(send, {}, "r")):
        await converted(start)
        for event in events:
            await converted({"type": "http.response.body", "body": event, "more_body": True})
    for event in events:
        journal.forwarded(event)
    assemble(b"".join(events), "chat", {"prompt_tokens": 1})
    journal.resume("all")
    journal.without_repeats(b"".join(events))

    assert journal.num_tokens() >= 0
    assert len(journal.sent(2)) == 2
    assert not journal.all_finished(9)


def test_text_that_cannot_be_read_is_paid_and_not_carried_on() -> None:
    journal = StreamJournal()
    journal.forwarded(BROKEN)

    assert journal.num_tokens() > 1
    assert journal.sent(1)[0].text_without_ids


def test_an_event_that_cannot_be_read_holds_no_chunk() -> None:
    assert chunk_of(DEEP) is chunk_of(BROKEN) is chunk_of(b"data: [DONE]\n\n") is None
    assert chunk_of(b'data: {"choices": []}\n\n') == {"choices": []}
