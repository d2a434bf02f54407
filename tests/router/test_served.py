"""The whole thing on a real server: the openai client in front, fake workers behind."""

from __future__ import annotations

import asyncio
import json
import signal
from pathlib import Path
from typing import Any

import openai
import pytest

from eventually import eventually
from router_process import router_process

CONFIG = {
    "name": "chat",
    "tiers": [{"name": "small", "served_model": "s"}, {"name": "large", "served_model": "l"}],
    "fallback_tier": "large",
    "predictor": {"type": "Fixed"},
    "picking": {"load_poll_s": 0.1},
}


def served(folder: Path, table: dict[str, Any]) -> Any:
    (folder / "endpoints.json").write_text(json.dumps({"tiers": table}))
    return router_process(folder, CONFIG, endpoints=folder / "endpoints.json")


async def ready(client: openai.AsyncOpenAI) -> None:
    async def tokenizes() -> bool:
        try:
            await client.with_options(max_retries=0).post(
                "/tokenize", body={"model": "large", "prompt": "x"}, cast_to=object
            )
        except openai.InternalServerError:
            return False
        return True

    await eventually(tokenizes)


async def test_the_openai_client_is_served_and_sigterm_lets_streams_finish(
    make_worker: Any, tmp_path: Path
) -> None:
    worker = await make_worker(num_tokens=12, pause_s=0.02, write_size=400)
    expected = await make_worker(num_tokens=12)

    async with served(tmp_path, {"large": {"decode": [worker.url]}}) as (url, process):
        client = openai.AsyncOpenAI(base_url=url + "/v1", api_key="none")
        await ready(client)
        messages: Any = [{"role": "user", "content": "hello"}]
        seed = {"seed": 1}
        whole = await client.chat.completions.create(model="chat", messages=messages, seed=1)
        response = await client.responses.create(model="chat", input="hello", extra_body=seed)
        async with client.responses.stream(model="chat", input="hello", extra_body=seed) as events:
            streamed = [
                event.delta async for event in events if event.type == "response.output_text.delta"
            ]
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            await client.chat.completions.create(model="nothing", messages=messages)

        stream = await client.chat.completions.create(
            model="chat",
            messages=messages,
            seed=1,
            stream=True,
            stream_options={"include_usage": True},
        )
        text = ""
        async for chunk in stream:
            if not text:
                process.send_signal(signal.SIGTERM)
            text += "".join(choice.delta.content or "" for choice in chunk.choices)
            last = chunk
        async with asyncio.timeout(10):
            status = await process.wait()
        await client.close()

    assert whole.choices[0].message.content == text
    assert response.output_text == "".join(streamed) == text
    assert last.usage is not None
    assert last.usage.completion_tokens == expected.num_tokens
    assert status == 0


async def test_finished_streams_are_not_taken_for_clients_that_left(
    make_worker: Any, tmp_path: Path
) -> None:
    worker = await make_worker()

    async with served(tmp_path, {"large": {"decode": [worker.url]}}) as (url, _):
        client = openai.AsyncOpenAI(base_url=url + "/v1", api_key="none")
        await ready(client)
        for stream in (True, False):
            reply: Any = await client.chat.completions.create(
                model="large", messages=[{"role": "user", "content": "x"}], stream=stream
            )
            if stream:
                async for _ in reply:
                    pass
        await client.close()
        other = openai.AsyncOpenAI(base_url=url, api_key="none")
        log: Any = await other.get("/admin/decisions", cast_to=object)
        await other.close()

    assert [record["status"] for record in log["decisions"]] == [200, 200]
