"""An agent of Pydantic AI: a tool, and its stream."""

from __future__ import annotations

import asyncio
import json
import sys

from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

URL, FOUND = sys.argv[1], {}
model = OpenAIChatModel("chat", provider=OpenAIProvider(base_url=f"{URL}/v1", api_key="none"))
agent = Agent(model)


@agent.tool_plain
def add(a: int, b: int) -> int:
    """Adds two numbers."""
    return a + b


async def main() -> None:
    FOUND["agent"] = (await agent.run("What is 12 + 30?")).output
    async with agent.run_stream("What is 12 + 30?") as streamed:
        FOUND["stream"] = await streamed.get_output()


asyncio.run(main())
print(json.dumps(FOUND))
