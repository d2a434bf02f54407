"""Custom resources in, answers out: the example pair on this machine, and what happens to it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from eventually import eventually_in_another_process
from stack_kit import EXAMPLE, Stack, process_of, processes_below, start, stop, tandem_command
from tandem_operator.demo.suite import generate

MODELS = EXAMPLE.parent / "models"


def body(model: str, prompt: str, **more: Any) -> dict[str, Any]:
    return {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": 96,
        **more,
    }


def streamed(
    client: httpx.Client, request: dict[str, Any], after: int = 0, hook: Any = None
) -> str:
    """Text of a streamed answer; hook() runs once after a number of text chunks."""
    pieces: list[str] = []
    done = False
    with client.stream("POST", "/v1/chat/completions", json={**request, "stream": True}) as reply:
        assert reply.status_code == 200, reply.read()
        for line in reply.iter_lines():
            if line == "data: [DONE]":
                done = True
            elif line.startswith("data: "):
                event = json.loads(line.removeprefix("data: "))
                assert "error" not in event, event
                pieces += [c["delta"].get("content") or "" for c in event["choices"]]
                if hook is not None and len(pieces) >= after:
                    hook()
                    hook = None
    assert done
    return "".join(pieces)


@pytest.fixture
def client(stack: Stack) -> Any:
    with httpx.Client(base_url=stack.url, timeout=90, trust_env=False) as opened:
        yield opened


async def answer_tokens(client: httpx.AsyncClient, tier: str, prompt: str) -> list[int]:
    """Token ids of a streamed greedy answer, the end token included."""
    ids: list[int] = []
    request = body(tier, prompt, stream=True)
    async with client.stream("POST", "/v1/chat/completions", json=request) as reply:
        async for line in reply.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                assert "error" not in event, event
                ids += [i for choice in event["choices"] for i in choice["token_ids"]]
    return ids


@pytest.mark.parametrize("tier", ["small", "large"])
async def test_greedy_tokens_are_those_of_transformers(stack: Stack, tier: str) -> None:
    """Small is unified; large goes through prefill, transfer and decode. 200 prompts, 16 at once.

    One forward pass over prompt and answer tells for each position what greedy decoding takes.
    """
    model = AutoModelForCausalLM.from_pretrained(MODELS / tier, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(MODELS / tier)
    prompts = [question.prompt for question in generate("test", 11, 150)]
    prompts += prompts[:25]  # whole prompts again: prefix hits
    prompts += [" ".join(prompts[i : i + 6]) for i in range(25)]  # several blocks long
    gate = asyncio.Semaphore(16)

    async def ask(client: httpx.AsyncClient, prompt: str) -> list[int]:
        async with gate:
            return await answer_tokens(client, tier, prompt)

    async with httpx.AsyncClient(base_url=stack.url, timeout=90, trust_env=False) as client:
        answers = await asyncio.gather(*(ask(client, prompt) for prompt in prompts))

    different = []
    for prompt, answer in zip(prompts, answers, strict=True):
        chat = [{"role": "user", "content": prompt}]
        given = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        with torch.no_grad():
            logits = model(torch.tensor([[*given, *answer]])).logits[0]
        greedy = logits.argmax(-1)[len(given) - 1 : -1].tolist()
        if greedy != answer:
            different.append((prompt, answer, greedy))
    assert different == []
    assert len(answers) == 200


def test_a_stream_survives_the_death_of_its_decode_worker(
    stack: Stack, client: httpx.Client
) -> None:
    request = body("large", "Sort the letters QZSRLUXK.", max_tokens=300, ignore_eos=True)
    whole = streamed(client, request)
    victim = process_of(stack.pods()["decode"])

    text = streamed(client, request, after=20, hook=lambda: os.kill(victim, signal.SIGKILL))

    assert text == whole
    assert len(text) > 100
    stack.wait_ready()


@pytest.mark.parametrize("component", ["small", "prefill", "decode", "router"])
def test_a_killed_process_comes_back_and_questions_are_answered(
    stack: Stack, client: httpx.Client, component: str
) -> None:
    pod = stack.pods()[component]
    victim = process_of(pod)

    os.kill(victim, signal.SIGKILL)
    eventually_in_another_process(
        lambda: stack.pods()[component]["status"]["containerStatuses"][0]["restartCount"],
        within_s=120.0,
        told=lambda: stack.tandem("get", "pods"),
    )
    stack.wait_ready()

    for model in ("chat", "small", "large"):
        reply = client.post("/v1/chat/completions", json=body(model, "What is 2*9?"))
        assert reply.status_code == 200, reply.text


def test_a_seeded_sample_is_the_same_every_time(client: httpx.Client) -> None:
    request = body("large", "What is 14+5?", temperature=1.5, seed=42, max_tokens=40)

    first, second = (
        client.post("/v1/chat/completions", json=request).json()["choices"][0]["message"]["content"]
        for _ in range(2)
    )

    assert first == second


def test_the_openai_client_works(stack: Stack) -> None:
    from openai import OpenAI

    openai = OpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0)

    names = {model.id for model in openai.models.list()}
    answer = openai.chat.completions.create(
        model="chat", messages=[{"role": "user", "content": "What is 14+5?"}], temperature=0
    )

    assert {"chat", "small", "large"} <= names
    assert ">" in (answer.choices[0].message.content or "")


def test_get_reads_well(stack: Stack) -> None:
    lines = stack.tandem("get", "routers").splitlines()

    assert lines[0].split() == [
        "NAME",
        "READY",
        "REASON",
        "SLO",
        "BUDGET",
        "$/H",
        "GPUS",
        "ENDPOINT",
        "QUALITY",
        "AGE",
    ]
    assert lines[1].split()[:2] == ["chat", "True"]


def test_a_pool_is_scaled_and_the_new_worker_answers(stack: Stack, client: httpx.Client) -> None:
    stack.tandem("scale", "workerpool", "small-unified", "--replicas", "2")
    eventually_in_another_process(
        lambda: stack.get("workerpool", "small-unified")["status"].get("readyReplicas") == 2,
        within_s=120.0,
        told=lambda: stack.tandem("get", "workerpools"),
    )

    reply = client.post("/v1/chat/completions", json=body("small", "What is 14+5?"))
    stack.tandem("scale", "workerpool", "small-unified", "--replicas", "1")

    assert reply.status_code == 200


def test_a_second_up_beside_the_first_gets_its_own_ports_and_ctrl_c_leaves_nothing(
    stack: Stack, tmp_path: Path
) -> None:
    second = start(tmp_path, "second")

    assert second.url != stack.url
    assert httpx.get(f"{second.url}/ready", trust_env=False).status_code == 200
    assert stop(second) == 0
    assert processes_below(tmp_path) == []
    assert list((tmp_path / "tandem" / "run").glob("*")) == []


def test_a_port_that_is_taken_is_named(stack: Stack, tmp_path: Path) -> None:
    port = stack.url.rpartition(":")[2]
    env = {**stack.env, "XDG_CACHE_HOME": str(tmp_path)}

    result = subprocess.run(
        tandem_command("up", str(EXAMPLE), "--port", port),
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert result.returncode == 1
    assert f"port {port}" in result.stderr
    assert "Traceback" not in result.stderr
