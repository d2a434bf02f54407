"""Vectors are transformers' hidden states, pooled; and what a worker says it serves."""

from __future__ import annotations

import asyncio
import base64
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tandem_worker.server.worker import Worker
from worker_kit import save_model

TEXTS = ["the quick brown fox", "a router sends each question " * 30, "Köln"]


async def post(worker: Worker, **body: Any) -> Any:
    async with httpx.AsyncClient(base_url=worker.url, timeout=60) as client:
        return await client.post("/v1/embeddings", json=body)


def expected(model: Any, worker: Worker, text: str, pooling: str) -> np.ndarray:
    ids = torch.tensor([worker.tokenizer.encode(text)])
    with torch.inference_mode():
        hidden = model.model(ids).last_hidden_state[0]
    vector = (hidden[-1] if pooling == "last" else hidden.mean(0)).numpy()
    return vector / np.linalg.norm(vector)


async def test_vectors_are_those_of_transformers_beside_running_answers(
    start_worker: Any, reference: Any
) -> None:
    # Few tokens a step, so that prompts come in several chunks, and few blocks, so that they wait.
    worker = await start_worker(max_batched_tokens=64, num_kv_blocks=12)
    chat = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 40}
    async with httpx.AsyncClient(base_url=worker.url, timeout=60) as client:
        answer = asyncio.create_task(client.post("/v1/chat/completions", json=chat))
        replies = [await post(worker, input=TEXTS, pooling=kind) for kind in ("last", "mean")]
        assert (await answer).status_code == 200

    for kind, reply in zip(("last", "mean"), replies, strict=True):
        assert reply.status_code == 200, reply.text
        body = reply.json()
        assert [item["index"] for item in body["data"]] == [0, 1, 2]
        for text, item in zip(TEXTS, body["data"], strict=True):
            wanted = expected(reference, worker, text, kind)
            np.testing.assert_allclose(item["embedding"], wanted, atol=2e-5)
        tokens = sum(len(worker.tokenizer.encode(text)) for text in TEXTS)
        assert body["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    assert worker.engine.core.num_requests == 0
    assert worker.capabilities()["embeddings"]


async def test_forms_of_input_and_output_agree(start_worker: Any) -> None:
    worker = await start_worker()
    ids = worker.tokenizer.encode(TEXTS[0])

    plain = (await post(worker, input=TEXTS[0], model="tiny")).json()["data"][0]["embedding"]
    listed = (await post(worker, input=[ids, ids])).json()["data"]
    packed = (await post(worker, input=ids, encoding_format="base64")).json()["data"][0]

    for item in listed:
        np.testing.assert_allclose(item["embedding"], plain, atol=1e-6)
    raw = np.frombuffer(base64.b64decode(packed["embedding"]), "<f4")
    np.testing.assert_allclose(raw, plain, atol=1e-6)
    assert abs(float(np.linalg.norm(raw)) - 1) < 1e-6
    assert (await post(worker, input=TEXTS[0], dimensions=64)).status_code == 200


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "input is required"),
        ({"input": ""}, "must be a string, a list of strings"),
        ({"input": []}, "must be a string, a list of strings"),
        ({"input": ["a", ""]}, "must be a string, a list of strings"),
        ({"input": [9999]}, "input[0] holds token 9999; the vocabulary ends at 511"),
        ({"input": "word " * 1000}, "maximum context length is"),
        ({"input": "a", "dimensions": 8}, "dimensions=8: this model's vectors have 64"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format='hex' must be"),
        ({"input": "a", "pooling": "max"}, "pooling='max' must be"),
        ({"input": "a", "model": "other"}, "is not served here"),
    ],
)
async def test_what_cannot_be_embedded_is_refused(
    start_worker: Any, body: dict[str, Any], said: str
) -> None:
    worker = await start_worker()

    reply = await post(worker, **body)

    assert reply.status_code in (400, 404), reply.text
    assert said in reply.json()["error"]["message"]


async def test_a_client_that_leaves_ends_its_work(start_worker: Any) -> None:
    worker = await start_worker()

    with pytest.raises(httpx.TimeoutException):
        async with httpx.AsyncClient(base_url=worker.url, timeout=0.05) as client:
            await client.post("/v1/embeddings", json={"input": ["word " * 150] * 300})
    assert await worker.drain(30)

    assert await worker.engine.call(lambda core: core.num_requests) == 0


async def test_a_decoder_saved_alone_gives_the_same_vectors(
    start_worker: Any, tmp_path: Path
) -> None:
    whole = save_model(tmp_path / "whole", "qwen3", tie_word_embeddings=True)
    bare = save_model(tmp_path / "bare", "qwen3", tie_word_embeddings=True)
    path = bare / "model.safetensors"
    save_file({k.removeprefix("model."): v for k, v in load_file(path).items()}, path)

    one = await post(await start_worker(weights=whole), input="a")
    other = await post(await start_worker(weights=bare), input="a")

    assert one.json()["data"] == other.json()["data"]


def named(value: Any) -> set[str]:
    """Everything that a document refers to."""
    if isinstance(value, list):
        return set().union(*map(named, value))
    if not isinstance(value, dict):
        return set()
    here = {value["$ref"]} if isinstance(value.get("$ref"), str) else set()
    return here.union(*map(named, value.values()))


async def test_a_worker_describes_what_it_serves(start_worker: Any) -> None:
    worker = await start_worker()
    async with httpx.AsyncClient(base_url=worker.url) as client:
        document = (await client.get("/openapi.json")).json()
        version = (await client.get("/version")).json()
        one = await client.get("/v1/models/tiny")
        other = await client.get("/v1/models/none")

    assert named(document) <= {
        f"#/components/schemas/{name}" for name in document["components"]["schemas"]
    }
    body = document["components"]["schemas"]["ChatBody"]["properties"]
    assert {"messages", "tools", "reasoning_effort", "response_format"} <= body.keys()
    assert version["version"] == document["info"]["version"]
    assert one.json()["id"] == "tiny"
    assert other.status_code == 404
