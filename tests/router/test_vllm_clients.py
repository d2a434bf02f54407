"""An unchanged openai client before a router whose tier is vLLM, of each recorded version."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from eventually import eventually_in_another_process
from tandem_router.api.app import RouterApp
from tandem_router.config import parse_config
from tandem_router.testing.fake_vllm import VERSIONS, FakeVLLM, next_ids, prompt_ids, recording
from tandem_router.testing.fake_worker import token_text
from tandem_router.testing.live_router import LiveRouter, live_router

WORDS: Any = [{"role": "user", "content": "How are you?"}]
ASKED: Any = {"messages": WORDS, "temperature": 0, "max_tokens": 8}
SAID = "".join(map(token_text, next_ids(prompt_ids({"messages": WORDS}), 8)))


@pytest.fixture(scope="module", params=VERSIONS)
def version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def router(version: str) -> Iterator[LiveRouter]:
    server = FakeVLLM(served_model="m", plays=version, adapters=("poems",), tools=True)

    async def make_app() -> RouterApp:
        await server.start()
        tier = {"name": "large", "served_model": "m", "engine": "VLLM"}
        config = {"name": "chat", "tiers": [tier], "fallback_tier": "large"}
        endpoints = Path(tempfile.mkdtemp()) / "endpoints.json"
        endpoints.write_text(json.dumps({"tiers": {"large": {"unified": [server.url]}}}))
        return RouterApp(parse_config(json.dumps(config)), endpoints_path=endpoints)

    with live_router(make_app) as running:
        yield running
        running.run(server.stop())


@pytest.fixture
def client(router: LiveRouter) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{router.url}/v1", api_key="none", max_retries=0) as made:
        made.chat.completions.create(model="large", **ASKED)  # by then the server is known
        yield made


def test_answers_streams_and_usage_are_openais(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="chat", **ASKED)
    streamed = list(
        client.chat.completions.create(
            model="chat", stream=True, stream_options={"include_usage": True}, **ASKED
        )
    )
    text = client.completions.create(model="large", prompt="abc", max_tokens=3, temperature=0)

    assert whole.choices[0].message.content == SAID
    assert "".join(c.choices[0].delta.content or "" for c in streamed if c.choices) == SAID
    assert whole.usage is not None
    assert streamed[-1].usage is not None
    assert whole.usage.completion_tokens == streamed[-1].usage.completion_tokens == 8
    assert text.choices[0].text == "".join(
        map(token_text, next_ids(prompt_ids({"prompt": "abc"}), 3))
    )
    assert all("token_ids" not in chunk.model_dump_json(exclude_none=True) for chunk in streamed)


def test_models_are_the_routers_with_what_the_server_has_loaded(client: openai.OpenAI) -> None:
    # What a server has loaded is asked once in a while.
    known = ["chat", "large", "m", "poems"]
    eventually_in_another_process(lambda: [model.id for model in client.models.list()] == known)
    assert client.chat.completions.create(model="poems", **ASKED).model == "poems"


def test_errors_are_raised_as_openais_own_server_raises_them(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="prose", **ASKED)
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="large", prompt=[5] * 600, max_tokens=8)
    picture: Any = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    with pytest.raises(openai.BadRequestError) as image:
        client.chat.completions.create(
            model="large", messages=[{"role": "user", "content": [picture]}]
        )
    with pytest.raises(openai.BadRequestError) as vectors:
        client.embeddings.create(model="large", input="a")

    assert unknown.value.code == "model_not_found"
    assert long.value.code == "context_length_exceeded"
    assert image.value.code == vectors.value.code == "unsupported_by_tier"


def test_whoever_asks_for_token_ids_gets_them_where_the_version_has_them(
    client: openai.OpenAI, version: str
) -> None:
    streamed = client.chat.completions.create(
        model="large", stream=True, extra_body={"return_token_ids": True}, **ASKED
    )
    told = [choice.model_extra or {} for chunk in streamed for choice in chunk.choices]
    ids = [token for extra in told for token in extra.get("token_ids") or []]

    has_them = "return_token_ids" in recording(version)["chat_fields"]
    assert ids == (next_ids(prompt_ids({"messages": WORDS}), 8) if has_them else [])
