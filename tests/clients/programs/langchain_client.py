"""LangChain's chat model, tools and embeddings, as its users use them."""

from __future__ import annotations

import json
import sys

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings

URL, FOUND = f"{sys.argv[1]}/v1", {}


@tool
def add(a: int, b: int) -> int:
    """Adds two numbers."""
    return a + b


chat = ChatOpenAI(model="chat", base_url=URL, api_key="none", max_retries=0)
FOUND["whole"] = chat.invoke("hello").content
FOUND["stream"] = "".join(chunk.content for chunk in chat.stream("hello"))
able = chat.bind_tools([add])
messages = [HumanMessage("What is 12 + 30?")]
said = None
for chunk in able.stream(messages):
    said = chunk if said is None else said + chunk
call = said.tool_calls[0]
FOUND["call"] = [call["name"], call["args"]]
messages += [said, ToolMessage(str(add.invoke(call["args"])), tool_call_id=call["id"])]
FOUND["agent"] = able.invoke(messages).content
# Its own counting of tokens would fetch a vocabulary from elsewhere.
vectors = OpenAIEmbeddings(
    model="vectors", base_url=URL, api_key="none", check_embedding_ctx_length=False
)
FOUND["vectors"] = [len(each) for each in vectors.embed_documents(["a", "b"])]
print(json.dumps(FOUND))
