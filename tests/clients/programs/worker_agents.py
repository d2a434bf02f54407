"""instructor and LlamaIndex, unchanged, asking one of our workers directly."""

import json
import sys
from typing import Literal

import instructor
import openai
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel, Field

BASE, FOUND = f"{sys.argv[1]}/v1", {}


class Weather(BaseModel):
    """Weather of a city."""

    city: Literal["Paris", "Rome"]
    warm: bool
    days: list[Literal[1, 2]] = Field(max_length=2)


def with_instructor() -> None:
    asked = {
        "model": "tiny",
        "response_model": Weather,
        "max_retries": 0,
        "reasoning_effort": "none",
        "messages": [{"role": "user", "content": "Is it warm?"}],
    }
    for mode in (instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT, instructor.Mode.JSON_SCHEMA):
        client = instructor.from_openai(openai.OpenAI(base_url=BASE, api_key="none"), mode=mode)
        FOUND[mode.value] = isinstance(client.chat.completions.create(**asked), Weather)


def weather(city: Literal["Paris", "Rome"]) -> str:
    """Tells the weather."""
    return f"warm in {city}"


def with_llama_index() -> None:
    llm = OpenAILike(
        model="tiny",
        api_base=BASE,
        api_key="none",
        is_chat_model=True,
        is_function_calling_model=True,
        context_window=2048,
        max_tokens=900,
        max_retries=0,
        additional_kwargs={"extra_body": {"reasoning_effort": "none"}},
    )
    reply = llm.as_structured_llm(Weather).chat([ChatMessage("Is it warm?")])
    FOUND["structured"] = isinstance(reply.raw, Weather)
    chosen = llm.chat_with_tools(
        [FunctionTool.from_defaults(weather)], "Is it warm?", tool_required=True
    )
    calls = llm.get_tool_calls_from_response(chosen)
    FOUND["calls"] = [
        call.tool_name == "weather" and call.tool_kwargs["city"] in ("Paris", "Rome")
        for call in calls
    ][:1]


with_instructor()
with_llama_index()
print(json.dumps(FOUND))
