"""openai's client as its users use it; prints what came of each call as JSON."""

from __future__ import annotations

import json
import sys

import openai

URL, FOUND = sys.argv[1], {}
client = openai.OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0)
TURN = [{"role": "user", "content": "What is 12 + 30?"}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            },
        },
    }
]


def agent() -> str:
    """Calls tools by what the streamed deltas say until the model is content."""
    messages = list(TURN)
    for _ in range(4):
        text, calls = "", {}
        stream = client.chat.completions.create(
            model="chat", messages=messages, tools=TOOLS, stream=True
        )
        for chunk in stream:
            for choice in chunk.choices:
                text += choice.delta.content or ""
                for piece in choice.delta.tool_calls or []:
                    call = calls.setdefault(piece.index, {"id": "", "name": "", "arguments": ""})
                    call["id"] += piece.id or ""
                    call["name"] += piece.function.name or ""
                    call["arguments"] += piece.function.arguments or ""
        if not calls:
            return text
        said = [
            {
                "id": call["id"],
                "type": "function",
                "function": {"name": call["name"], "arguments": call["arguments"]},
            }
            for call in calls.values()
        ]
        messages.append({"role": "assistant", "content": text or None, "tool_calls": said})
        for call in calls.values():
            numbers = json.loads(call["arguments"])
            result = str(numbers["a"] + numbers["b"])
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})
    return "no end"


def responses_agent(stream: bool) -> str:
    """The same over the responses API, with its events where it streams."""
    tools = [{"type": "function", **TOOLS[0]["function"]}]
    said = list(TURN)
    for _ in range(4):
        asked = {"model": "chat", "input": said, "tools": tools}
        if stream:
            arguments, last = {}, None
            for event in client.responses.create(**asked, stream=True):
                if event.type == "response.function_call_arguments.delta":
                    arguments[event.item_id] = arguments.get(event.item_id, "") + event.delta
                last = event
            assert last.type == "response.completed", last
            response = last.response
            calls = [item for item in response.output if item.type == "function_call"]
            assert [call.arguments for call in calls] == list(arguments.values())
        else:
            response = client.responses.create(**asked)
            calls = [item for item in response.output if item.type == "function_call"]
        if not calls:
            return response.output_text
        said += [item.model_dump(exclude_none=True) for item in response.output]
        for call in calls:
            numbers = json.loads(call.arguments)
            result = str(numbers["a"] + numbers["b"])
            output = {"type": "function_call_output", "call_id": call.call_id, "output": result}
            said.append(output)
    return "no end"


def error_of(call) -> list:
    try:
        call()
    except openai.APIStatusError as error:
        return [type(error).__name__, error.status_code, error.code]
    return ["none"]


whole = client.chat.completions.create(model="chat", messages=TURN)
FOUND["whole"] = whole.choices[0].message.content
FOUND["usage"] = whole.usage.total_tokens
stream = client.chat.completions.create(
    model="small", messages=TURN, stream=True, stream_options={"include_usage": True}
)
chunks = list(stream)
FOUND["stream"] = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
FOUND["stream_usage"] = chunks[-1].usage.total_tokens
FOUND["agent"] = agent()
text = client.completions.create(model="large", prompt="12 +", max_tokens=4)
FOUND["completion"] = text.choices[0].text
vectors = client.embeddings.create(model="chat", input=["a", "b"])
FOUND["vectors"] = [len(each.embedding) for each in vectors.data]
FOUND["models"] = [each.id for each in client.models.list()][:2]
FOUND["model"] = client.models.retrieve("small").id
response = client.responses.create(model="chat", input="hello", include=[], stream=False)
FOUND["response"] = response.output_text
events = list(client.responses.create(model="chat", input="hello", stream=True))
FOUND["response_stream"] = events[-1].response.output_text
FOUND["response_agent"] = [responses_agent(stream) for stream in (False, True)]
raw = client.chat.completions.with_raw_response.create(model="small", messages=TURN)
FOUND["tier"] = raw.headers["x-tandem-tier"]
FOUND["request_id"] = whole._request_id is not None
FOUND["unknown"] = error_of(lambda: client.chat.completions.create(model="x", messages=TURN))
try:
    client.chat.completions.create(model="x", messages=TURN)
except openai.APIStatusError as error:
    FOUND["explained"] = error.body["doc_url"]
LONG = [{"role": "user", "content": "word " * 5000}]
FOUND["long"] = error_of(lambda: client.chat.completions.create(model="small", messages=LONG))
print(json.dumps(FOUND))
