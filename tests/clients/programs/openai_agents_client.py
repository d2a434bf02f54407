"""OpenAI's Agents SDK, unchanged: an agent with a tool, over responses and chat completions."""

from __future__ import annotations

import asyncio
import json
import sys

from agents import (
    Agent,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI

URL, FOUND = sys.argv[1], {}


@function_tool
def add(a: int, b: int) -> int:
    """Adds two numbers."""
    return a + b


async def main() -> None:
    set_tracing_disabled(True)
    client = AsyncOpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0)
    models = {"responses": OpenAIResponsesModel, "chat": OpenAIChatCompletionsModel}
    for name, kind in models.items():
        model = kind(model="chat", openai_client=client)
        agent = Agent(name="Adder", instructions="Add.", tools=[add], model=model)
        done = await Runner.run(agent, "What is 12 + 30?")
        FOUND[name] = done.final_output
        FOUND[f"{name}_calls"] = [type(item).__name__ for item in done.new_items]
        streamed = Runner.run_streamed(agent, "What is 12 + 30?")
        pieces = [
            event.data.delta
            async for event in streamed.stream_events()
            if event.type == "raw_response_event"
            and event.data.type == "response.output_text.delta"
        ]
        FOUND[f"{name}_stream"] = ["".join(pieces), streamed.final_output]
    await client.close()


asyncio.run(main())
print(json.dumps(FOUND))
