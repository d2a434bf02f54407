"""openai, LangChain and Pydantic AI, unchanged, in conversations with tools of several families.

Its weights are random: what is shown is that calls have the shape that was asked for, streamed and
whole, one or several, and that the turn after them is served.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Literal

import openai
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel
from pydantic_ai import Agent, ModelMessagesTypeAdapter
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

BASE, FOUND = f"{sys.argv[1]}/v1", {}
TURN = [{"role": "user", "content": "Is it warm?"}]


class Weather(BaseModel):
    """Weather of a city."""

    city: Literal["Paris", "Rome"]
    warm: bool


def with_openai() -> None:
    client = openai.OpenAI(base_url=BASE, api_key="none", max_retries=0)
    function = openai.pydantic_function_tool(Weather)
    asked = {"model": "tiny", "messages": TURN, "tools": [function], "tool_choice": "required"}
    asked |= {"seed": 3, "max_tokens": 200}
    called = client.chat.completions.create(**asked).choices[0]
    whole = called.message.tool_calls
    parsed = [Weather.model_validate_json(call.function.arguments) for call in whole[:1]]
    FOUND["whole"] = [isinstance(each, Weather) for each in parsed]
    FOUND["ids"] = len({call.id for call in whole}) == len(whole)
    deltas: dict[int, str] = {}
    for chunk in client.chat.completions.create(**asked, stream=True):
        for call in chunk.choices[0].delta.tool_calls or []:
            deltas[call.index] = deltas.get(call.index, "") + (call.function.arguments or "")
    FOUND["deltas"] = list(deltas.values()) == [call.function.arguments for call in whole]
    named = {"type": "function", "function": {"name": "Weather"}}
    one = client.chat.completions.parse(**asked | {"tool_choice": named, "seed": 4})
    (call,) = one.choices[0].message.tool_calls
    FOUND["named"] = isinstance(call.function.parsed_arguments, Weather)
    history = [
        *TURN,
        one.choices[0].message.model_dump(exclude_none=True, exclude={"parsed"}),
        {"role": "tool", "tool_call_id": call.id, "content": "23 degrees"},
    ]
    done = client.chat.completions.create(
        model="tiny", messages=history, tools=[function], tool_choice="none", max_tokens=8
    )
    FOUND["after"] = bool(done.choices[0].message.content)


@tool
def weather(city: Literal["Paris", "Rome"]) -> str:
    """Tells the weather."""
    return f"warm in {city}"


def with_langchain() -> None:
    chat = ChatOpenAI(model="tiny", base_url=BASE, api_key="none", max_retries=0, max_tokens=200)
    able = chat.bind_tools([weather], tool_choice="any", parallel_tool_calls=False)
    said = None
    for chunk in able.stream([HumanMessage("Is it warm?")]):
        said = chunk if said is None else said + chunk
    (call,) = said.tool_calls
    FOUND["bound"] = [call["name"], call["args"]["city"] in ("Paris", "Rome")]
    result = ToolMessage(weather.invoke(call["args"]), tool_call_id=call["id"])
    answer = able.invoke([HumanMessage("Is it warm?"), said, result])
    FOUND["again"] = [each["args"].keys() == {"city"} for each in answer.tool_calls]
    shaped = chat.with_structured_output(Weather, method="function_calling")
    FOUND["structured"] = isinstance(shaped.invoke("Is it warm?"), Weather)


async def with_pydantic_ai() -> None:
    provider = OpenAIProvider(base_url=BASE, api_key="none")
    settings = {"parallel_tool_calls": False, "max_tokens": 200}
    agent = Agent(
        OpenAIChatModel("tiny", provider=provider), output_type=Weather, model_settings=settings
    )
    first = await agent.run("Is it warm?")
    # What was said goes on in a second run, as an application stores and continues it.
    stored = ModelMessagesTypeAdapter.validate_json(first.all_messages_json())
    second = await agent.run("And tomorrow?", message_history=stored)
    FOUND["runs"] = [isinstance(each.output, Weather) for each in (first, second)]


with_openai()
with_langchain()
asyncio.run(with_pydantic_ai())
print(json.dumps(FOUND))
