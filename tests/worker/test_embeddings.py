"""Vectors are transformers' hidden states, pooled; and what a worker says it serves."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hub_kit import FakeHub, get
from tandem_worker.models.embedding_settings import read_embedding_settings
from tandem_worker.server.worker import Worker
from worker_kit import save_model

KINDS = ("last", "mean", "cls")
TEXTS = ["the quick brown fox", "a router sends each question " * 30, "Köln"]


async def post(worker: Worker, **body: Any) -> Any:
    async with httpx.AsyncClient(base_url=worker.url, timeout=60) as client:
        return await client.post("/v1/embeddings", json=body)


def expected(model: Any, worker: Worker, text: str, pooling: str) -> np.ndarray:
    ids = torch.tensor([worker.tokenizer.encode(text)])
    with torch.inference_mode():
        hidden = model.model(ids).last_hidden_state[0]
    kinds = {"last": hidden[-1], "mean": hidden.mean(0), "cls": hidden[0]}
    vector: np.ndarray = kinds[pooling].numpy()
    return vector / np.linalg.norm(vector)


async def test_vectors_are_those_of_transformers_beside_running_answers(
    start_worker: Any, reference: Any
) -> None:
    # Few tokens a step, so that prompts come in several chunks, and few blocks, so that they wait.
    worker = await start_worker(max_batched_tokens=64, num_kv_blocks=12)
    chat = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 40}
    async with httpx.AsyncClient(base_url=worker.url, timeout=60) as client:
        answer = asyncio.create_task(client.post("/v1/chat/completions", json=chat))
        replies = [await post(worker, input=TEXTS, pooling=kind) for kind in KINDS]
        assert (await answer).status_code == 200

    for kind, reply in zip(KINDS, replies, strict=True):
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


def sentence_transformer(
    directory: Path, *modules: str, folder: str = "1_Pooling", **mode: Any
) -> None:
    """What sentence-transformers saves beside a model."""
    listed = [
        {"idx": i, "name": str(i), "path": folder if kind == "Pooling" else ""}
        | {"type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(modules)
    ]
    (directory / "modules.json").write_text(json.dumps(listed))
    (directory / folder).mkdir(exist_ok=True)
    flags = {f"pooling_mode_{kind}_tokens": False for kind in ("cls", "mean", "max")}
    settings = {"word_embedding_dimension": 64, **flags, "pooling_mode_lasttoken": False, **mode}
    (directory / folder / "config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ({"pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_lasttoken": True, "include_prompt": True}, "last"),
        ({"pooling_mode_cls_token": True, "pooling_mode_cls_tokens": False}, "cls"),
        ({"pooling_mode": "mean"}, "mean"),
    ],
)
@pytest.mark.parametrize("normalize", [True, False])
async def test_a_checkpoint_says_how_its_texts_become_vectors(
    mode: dict[str, Any],
    kind: str,
    normalize: bool,
    tiny_llama: Path,
    tmp_path: Path,
    start_worker: Any,
    reference: Any,
) -> None:
    shutil.copytree(tiny_llama, tmp_path / "m")
    sentence_transformer(
        tmp_path / "m", "Transformer", "Pooling", *(["Normalize"] if normalize else []), **mode
    )
    worker = await start_worker(weights=tmp_path / "m")

    found = np.array((await post(worker, input=TEXTS[0])).json()["data"][0]["embedding"])

    length = float(np.linalg.norm(found))
    assert (abs(length - 1) < 1e-6) is normalize
    np.testing.assert_allclose(
        found / length, expected(reference, worker, TEXTS[0], kind), atol=2e-5
    )


@pytest.mark.parametrize(
    ("modules", "mode", "said"),
    [
        (("Transformer", "Pooling"), {"pooling_mode_max_tokens": True}, "pooling_mode_max_tokens"),
        (
            ("Transformer", "Pooling"),
            {"pooling_mode_mean_tokens": True, "pooling_mode_lasttoken": True},
            "pooling_mode_mean_tokens and pooling_mode_lasttoken",
        ),
        (("Transformer", "Pooling"), {"pooling_mode": "weightedmean"}, "asks for weightedmean"),
        (("Transformer", "Pooling"), {}, "asks for nothing"),
        (("Transformer", "Pooling", "Dense"), {"pooling_mode": "mean"}, "a module 'Dense'"),
        (("Transformer",), {"pooling_mode": "mean"}, "has 0 modules 'Pooling'"),
    ],
)
def test_a_pooling_that_is_not_served_is_named(
    modules: tuple[str, ...], mode: dict[str, Any], said: str, tmp_path: Path
) -> None:
    sentence_transformer(tmp_path, *modules, **mode)

    settings = read_embedding_settings(tmp_path)

    assert said in settings.problem
    assert "name pooling (last, mean or cls) in the request" in settings.problem


@pytest.mark.parametrize("content", ["{", "[" * 100_000, "{}", "[1]", "\ud800"])
def test_a_broken_list_of_modules_is_their_problem(content: str, tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_bytes(content.encode("utf-8", "surrogatepass"))

    assert "modules.json" in read_embedding_settings(tmp_path).problem


def test_a_pooling_elsewhere_is_named(tmp_path: Path) -> None:
    sentence_transformer(
        tmp_path, "Transformer", "Pooling", folder="2_Pooling", pooling_mode="mean"
    )

    assert "names the pooling '2_Pooling'" in read_embedding_settings(tmp_path).problem


async def test_what_a_checkpoint_cannot_have_is_refused_by_name_and_the_rest_is_served(
    tiny_llama: Path, tmp_path: Path, start_worker: Any
) -> None:
    shutil.copytree(tiny_llama, tmp_path / "m")
    sentence_transformer(tmp_path / "m", "Transformer", "Pooling", pooling_mode_max_tokens=True)
    worker = await start_worker(weights=tmp_path / "m")

    refused, named = await post(worker, input="a"), await post(worker, input="a", pooling="mean")

    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "pooling"
    assert "pooling_mode_max_tokens, which is not served" in refused.json()["error"]["message"]
    assert named.status_code == 200
    assert not worker.capabilities()["embeddings"]
    assert worker.capabilities()["logprobs"]


def test_the_pooling_is_downloaded_and_a_link_in_its_place_is_not_followed(
    hub: FakeHub, tmp_path: Path
) -> None:
    hub.files |= {"modules.json": b"[]", "1_Pooling/config.json": b'{"pooling_mode": "mean"}'}
    hub.files |= {"1_Pooling/other.bin": b"no", "2_Dense/config.json": b"{}"}
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "config.json").write_text("mine")
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "1_Pooling").symlink_to(tmp_path / "elsewhere")

    get(hub, tmp_path / "w")

    assert (tmp_path / "w" / "1_Pooling" / "config.json").read_bytes() == hub.files[
        "1_Pooling/config.json"
    ]
    assert [p.name for p in (tmp_path / "w" / "1_Pooling").iterdir()] == ["config.json"]
    assert (tmp_path / "elsewhere" / "config.json").read_text() == "mine"
    assert get(hub, tmp_path / "w")[0].startswith("there already")
