"""openai's parse, LangChain and Pydantic AI, unchanged, asking one of our workers directly.

Its weights are random: what is shown is that every answer has the shape that was asked for.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Literal

import openai
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

BASE, FOUND = f"{sys.argv[1]}/v1", {}
TURN = [{"role": "user", "content": "Is it warm?"}]


class Weather(BaseModel):
    """Weather of a city."""

    city: Literal["Paris", "Rome"]
    warm: bool
    days: list[Literal[1, 2]] = Field(max_length=2)


def valid(value: object) -> bool:
    return isinstance(value, Weather)


def with_openai() -> None:
    client = openai.OpenAI(base_url=BASE, api_key="none", max_retries=0)
    parsed = client.chat.completions.parse(
        model="tiny", messages=TURN, response_format=Weather, reasoning_effort="none"
    )
    FOUND["parse"] = valid(parsed.choices[0].message.parsed)
    function = openai.pydantic_function_tool(Weather)
    asked = {
        "model": "tiny",
        "messages": TURN,
        "tools": [function],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "extra_body": {"thinking_token_budget": 4},
        "seed": 3,
    }
    called = client.chat.completions.parse(**asked)
    (call,) = called.choices[0].message.tool_calls
    FOUND["parse_tools"] = valid(call.function.parsed_arguments)
    FOUND["finish_reason"] = called.choices[0].finish_reason
    with client.chat.completions.stream(**asked) as stream:
        kinds = {event.type for event in stream}
        last = stream.get_final_completion().choices[0].message
    FOUND["stream_tools"] = valid(last.tool_calls[0].function.parsed_arguments)
    FOUND["events"] = "tool_calls.function.arguments.delta" in kinds
    FOUND["same"] = last.tool_calls[0].function.arguments == call.function.arguments
    # The turn after the call, as an agent's loop makes it.
    history = [
        *TURN,
        called.choices[0].message.model_dump(exclude_none=True, exclude={"parsed"}),
        {"role": "tool", "tool_call_id": call.id, "content": "23 degrees"},
    ]
    done = client.chat.completions.create(
        model="tiny", messages=history, tools=[function], tool_choice="none", max_tokens=8
    )
    FOUND["after"] = bool(done.choices[0].message.content)
    thought = client.chat.completions.create(
        model="tiny",
        messages=TURN,
        max_tokens=12,
        extra_body={"thinking_token_budget": 4, "logit_bias": {THINK: 100}},
    )
    FOUND["thought"] = bool(thought.choices[0].message.reasoning_content)
    FOUND["thought_tokens"] = thought.usage.completion_tokens_details.reasoning_tokens
    vectors = client.embeddings.create(model="tiny", input=["a", "b"])  # as base64
    FOUND["vectors"] = [len(item.embedding) for item in vectors.data]
    FOUND["models"] = [item.id for item in client.models.list()]
    FOUND["model"] = client.models.retrieve("tiny").id
    try:
        client.chat.completions.create(model="other", messages=TURN)
    except openai.NotFoundError as error:
        FOUND["unknown"] = error.code


@tool
def weather(city: Literal["Paris", "Rome"]) -> str:
    """Tells the weather."""
    return f"warm in {city}"


def with_langchain() -> None:
    chat = ChatOpenAI(
        model="tiny", base_url=BASE, api_key="none", max_retries=0, reasoning_effort="none"
    )
    shaped = [
        chat.with_structured_output(Weather, method=method).invoke("Is it warm?")
        for method in ("json_schema", "function_calling")
    ]
    FOUND["structured"] = [valid(each) for each in shaped]
    able = chat.bind_tools([weather], tool_choice="any", parallel_tool_calls=False)
    said = None
    for chunk in able.stream([HumanMessage("Is it warm?")]):
        said = chunk if said is None else said + chunk
    (call,) = said.tool_calls
    result = ToolMessage(weather.invoke(call["args"]), tool_call_id=call["id"])
    FOUND["bound"] = [call["name"], call["args"]["city"] in ("Paris", "Rome")]
    free = chat.bind_tools([weather]).bind(max_tokens=20)
    answer = free.invoke([HumanMessage("Is it warm?"), said, result])
    FOUND["history"] = all(c["args"].keys() == {"city"} for c in answer.tool_calls)
    embeddings = OpenAIEmbeddings(
        model="tiny", base_url=BASE, api_key="none", check_embedding_ctx_length=False
    )
    FOUND["langchain_vectors"] = [len(each) for each in embeddings.embed_documents(["a", "b"])]


async def with_pydantic_ai() -> None:
    provider = OpenAIProvider(base_url=BASE, api_key="none")
    model = OpenAIChatModel("tiny", provider=provider)
    settings = {"openai_reasoning_effort": "none", "parallel_tool_calls": False}
    outputs = [
        (await Agent(model, output_type=kind, model_settings=settings).run("Is it warm?")).output
        for kind in (Weather, NativeOutput(Weather))
    ]
    FOUND["outputs"] = [valid(each) for each in outputs]
    agent = Agent(model, output_type=Weather, model_settings=settings)
    async with agent.run_stream("Is it warm?") as streamed:
        FOUND["output_stream"] = valid(await streamed.get_output())


THINK = sys.argv[2]
with_openai()
with_langchain()
asyncio.run(with_pydantic_ai())
print(json.dumps(FOUND))
