"""Anthropic's client on /v1/messages: text, a stream, tools and errors."""

from __future__ import annotations

import json
import sys

import anthropic

URL, FOUND = sys.argv[1], {}
client = anthropic.Anthropic(base_url=URL, api_key="none", max_retries=0)
TURN = [{"role": "user", "content": "What is 12 + 30?"}]
NUMBERS = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}}
TOOLS = [{"name": "add", "input_schema": NUMBERS}]
CALL = {"model": "chat", "max_tokens": 64}


def agent(streams: bool) -> str:
    messages = list(TURN)
    for _ in range(4):
        if streams:
            with client.messages.stream(messages=messages, tools=TOOLS, **CALL) as stream:
                said = stream.get_final_message()
        else:
            said = client.messages.create(messages=messages, tools=TOOLS, **CALL)
        uses = [block for block in said.content if block.type == "tool_use"]
        if said.stop_reason != "tool_use":
            return said.content[0].text
        messages.append({"role": "assistant", "content": said.content})
        results = [
            {
                "type": "tool_result",
                "tool_use_id": use.id,
                "content": str(use.input["a"] + use.input["b"]),
            }
            for use in uses
        ]
        messages.append({"role": "user", "content": results})
    return "no end"


def error_of(**changes) -> list:
    try:
        client.messages.create(**{**CALL, "messages": TURN, **changes})
    except anthropic.APIStatusError as error:
        return [type(error).__name__, error.body["error"]["type"]]
    return ["none"]


whole = client.messages.create(messages=TURN, **CALL)
FOUND["whole"] = whole.content[0].text
FOUND["usage"] = [whole.usage.input_tokens, whole.usage.output_tokens]
with client.messages.stream(messages=TURN, **CALL) as stream:
    FOUND["stream"] = "".join(stream.text_stream)
FOUND["agent"] = [agent(streams) for streams in (True, False)]
FOUND["count"] = client.messages.count_tokens(model="pool", messages=TURN).input_tokens
FOUND["unknown"] = error_of(model="nobody")
FOUND["long"] = error_of(messages=[{"role": "user", "content": "word " * 5000}])
print(json.dumps(FOUND))
