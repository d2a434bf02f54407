"""LiteLLM before the router, as a proxy of proxies: its fallbacks look at the words of errors."""

from __future__ import annotations

import json
import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import litellm

URL, FOUND = sys.argv[1], {}
CALL = {"api_base": f"{URL}/v1", "api_key": "none", "num_retries": 0}
TURN = [{"role": "user", "content": "hello"}]


def error_of(**changes) -> str:
    try:
        litellm.completion(**{"model": "openai/chat", "messages": TURN, **CALL, **changes})
    except Exception as error:
        return type(error).__name__
    return "none"


whole = litellm.completion(model="openai/chat", messages=TURN, **CALL)
FOUND["whole"] = whole.choices[0].message.content
stream = litellm.completion(model="openai/chat", messages=TURN, stream=True, **CALL)
FOUND["stream"] = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
vectors = litellm.embedding(model="openai/vectors", input=["a"], encoding_format="float", **CALL)
FOUND["vectors"] = len(vectors.data[0]["embedding"])
claude = litellm.completion(
    model="anthropic/chat", messages=TURN, api_base=URL, api_key="none", max_tokens=9
)
FOUND["anthropic"] = claude.choices[0].message.content
FOUND["unknown"] = error_of(model="openai/nobody")
FOUND["long"] = error_of(messages=[{"role": "user", "content": "word " * 5000}])
FOUND["long_small"] = error_of(
    model="openai/small", messages=[{"role": "user", "content": "word " * 5000}]
)
FOUND["long_worker"] = error_of(
    model="openai/pool", messages=[{"role": "user", "content": "word " * 5000}]
)
print(json.dumps(FOUND))
