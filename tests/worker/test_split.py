"""Prefill on one worker, decode on another, KV blocks over tcp: nobody can tell from the answer."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.torch import load_file, save_file

from eventually import eventually
from tandem_worker.config import WorkerConfig
from tandem_worker.disaggregation.protocol import PrefillJob
from tandem_worker.engine.requests import EngineRequest, ReservedEvent
from tandem_worker.engine.sampling import SamplingParams
from tandem_worker.scheduling.sequence import Sequence
from tandem_worker.server.worker import Worker

TEXT = "a router sends each question to a small or a large model, the quick brown fox "
Greedy = Callable[[list[int], int], list[int]]


async def complete(
    worker: Worker, prompt: list[int], prefill_url: str | None, **body: Any
) -> tuple[list[int], dict[str, Any]]:
    """Token ids and the choice of one completion."""
    headers = {"x-tandem-token-ids": "1"}
    if prefill_url:
        headers["x-tandem-prefill"] = prefill_url
    if worker.peer_token:
        headers["x-tandem-peer-token"] = worker.peer_token.decode()
    async with httpx.AsyncClient(base_url=worker.url, timeout=60) as client:
        reply = await client.post(
            "/v1/completions", json={"prompt": prompt} | body, headers=headers
        )
    assert reply.status_code == 200, reply.text
    choice = reply.json()["choices"][0]
    return choice["token_ids"], choice


def metric(worker: Worker, name: str) -> float:
    for line in worker.metrics.render().decode().splitlines():
        if line.startswith(name + "{"):
            return float(line.rsplit(" ", 1)[1])
    raise AssertionError(f"no metric {name}")


async def used_blocks(worker: Worker) -> int:
    """Blocks still referred to once everything has settled."""

    async def none_used() -> bool:
        return not await worker.engine.call(lambda core: core.scheduler.blocks.num_used)

    await eventually(none_used)
    return 0


@pytest.fixture
async def pair(start_worker: Any) -> tuple[Worker, Worker]:
    """A prefill and a decode worker."""
    prefill = await start_worker("prefill", token=b"secret")
    decode = await start_worker("decode", token=b"secret")
    return prefill, decode


async def test_greedy_over_the_split_is_that_of_transformers(
    start_worker: Any, greedy: Greedy
) -> None:
    settings = {"transfer": {"checksum": True}}
    prefill = await start_worker("prefill", **settings)
    decode = await start_worker("decode", **settings)
    long = decode.tokenizer.encode(TEXT * 12)
    lengths = [1, 2, 63, 64, 65, 127, 128, 129, 200, 333]

    answers = await asyncio.gather(
        *(
            complete(decode, long[:length], prefill.url, temperature=0, max_tokens=8)
            for length in lengths
        )
    )

    for length, (tokens, _) in zip(lengths, answers, strict=True):
        assert tokens == greedy(long[:length], 8), f"prompt of {length} tokens"
    assert metric(decode, "tandem_worker_remote_prefills_total") == len(lengths)
    assert metric(decode, "tandem_worker_remote_prefill_failures_total") == 0
    assert await used_blocks(decode) == await used_blocks(prefill) == 0


async def test_prefix_hits_on_either_side_change_nothing(
    pair: tuple[Worker, Worker], greedy: Greedy
) -> None:
    prefill, decode = pair
    long = decode.tokenizer.encode(TEXT * 12)
    cold, extended = long[:150], long[:290]
    first, _ = await complete(decode, cold, prefill.url, temperature=0, max_tokens=6)

    hit, _ = await complete(decode, cold, prefill.url, temperature=0, max_tokens=6)
    longer, _ = await complete(decode, extended, prefill.url, temperature=0, max_tokens=6)
    await decode.engine.call(lambda core: core.scheduler.blocks.forget_cached())
    prefill_only, _ = await complete(decode, extended, prefill.url, temperature=0, max_tokens=6)

    assert first == hit == greedy(cold, 6)
    assert longer == prefill_only == greedy(extended, 6)
    assert metric(prefill, "vllm:prefix_cache_hits_total") > 0
    assert metric(decode, "vllm:prefix_cache_hits_total") > 0


async def test_a_prefill_worker_keeps_salts_apart_too(
    pair: tuple[Worker, Worker], greedy: Greedy
) -> None:
    prefill, decode = pair
    prompt = decode.tokenizer.encode(TEXT * 12)[:150]
    answers = []

    for salt in ("mine", "yours"):
        tokens, _ = await complete(
            decode, prompt, prefill.url, temperature=0, max_tokens=6, cache_salt=salt
        )
        answers.append(tokens)

    assert answers == [greedy(prompt, 6)] * 2
    assert metric(prefill, "tandem_worker_kv_pushes_total") == 2
    assert metric(prefill, "vllm:prefix_cache_hits_total") == 0


async def test_a_sample_is_the_same_wherever_it_runs(
    start_worker: Any, pair: tuple[Worker, Worker]
) -> None:
    prefill, decode = pair
    unified = await start_worker()
    prompt = decode.tokenizer.encode(TEXT * 4)
    body = {
        "seed": 17,
        "max_tokens": 20,
        "top_p": 0.9,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.3,
        "logprobs": 2,
        "logit_bias": {"40": 3},
    }

    there, there_choice = await complete(decode, prompt, prefill.url, **body)
    here, here_choice = await complete(unified, prompt, None, **body)

    assert there == here
    assert there_choice["text"] == here_choice["text"]
    assert there_choice["logprobs"]["token_logprobs"] == pytest.approx(
        here_choice["logprobs"]["token_logprobs"], abs=2e-4
    )
    assert [list(top) for top in there_choice["logprobs"]["top_logprobs"]] == [
        list(top) for top in here_choice["logprobs"]["top_logprobs"]
    ]


async def test_a_prompt_whose_first_token_ends_it_needs_no_decode(
    pair: tuple[Worker, Worker], greedy: Greedy
) -> None:
    prefill, decode = pair
    prompt = decode.tokenizer.encode(TEXT)

    tokens, choice = await complete(decode, prompt, prefill.url, temperature=0, max_tokens=1)

    assert tokens == greedy(prompt, 1)
    assert choice["finish_reason"] == "length"


@pytest.mark.parametrize(
    "prefill_url", ["http://127.0.0.1:9", "http://127.255.255.254:1", "http://127.0.0.1:port"]
)
async def test_an_absent_prefill_worker_means_a_local_prefill(
    start_worker: Any, greedy: Greedy, prefill_url: str
) -> None:
    decode = await start_worker("decode")
    prompt = decode.tokenizer.encode(TEXT * 3)

    tokens, _ = await complete(decode, prompt, prefill_url, temperature=0, max_tokens=8)

    assert tokens == greedy(prompt, 8)
    assert metric(decode, "tandem_worker_local_prefill_fallbacks_total") == 1
    assert await used_blocks(decode) == 0


async def test_a_prefill_worker_with_other_weights_is_refused_and_costs_no_answer(
    start_worker: Any, tiny_llama: Path, tmp_path: Path, greedy: Greedy, caplog: Any
) -> None:
    """It fits in every other respect, and its blocks once made wrong answers silently."""
    other = tmp_path / "other"
    shutil.copytree(tiny_llama, other)
    tensors = load_file(other / "model.safetensors")
    name = "model.layers.0.self_attn.k_proj.weight"
    tensors[name] = -tensors[name]
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    prefill = await start_worker("prefill", weights=other, revision="r1")
    decode = await start_worker("decode", revision="r1")
    prompt = decode.tokenizer.encode(TEXT * 3)

    tokens, _ = await complete(decode, prompt, prefill.url, temperature=0, max_tokens=8)

    assert tokens == greedy(prompt, 8)
    assert metric(decode, "tandem_worker_remote_prefill_failures_total") > 0
    assert "must load the same files" in caplog.text
    assert decode.kv_address is not None
    report = await prefill.check_kv_link(decode.kv_address)
    assert not report["ok"]
    assert "has the weights" in report["error"]
    assert prefill.load()["revision"] != decode.load()["revision"]


async def test_a_draining_prefill_worker_means_a_local_prefill(
    pair: tuple[Worker, Worker], greedy: Greedy
) -> None:
    prefill, decode = pair
    prefill.start_draining()
    prompt = decode.tokenizer.encode(TEXT * 3)

    tokens, _ = await complete(decode, prompt, prefill.url, temperature=0, max_tokens=8)

    assert tokens == greedy(prompt, 8)


async def test_a_preempted_answer_is_filled_remotely_once_more_and_goes_on(
    start_worker: Any, greedy: Greedy
) -> None:
    prefill = await start_worker("prefill")
    decode = await start_worker("decode", num_kv_blocks=6, prefix_cache=False)
    long = decode.tokenizer.encode(TEXT * 12)
    first, second = long[:190], long[7:137]  # three blocks each; the first soon needs a fourth

    answers = await asyncio.gather(
        *(
            complete(decode, prompt, prefill.url, temperature=0, max_tokens=40, ignore_eos=True)
            for prompt in (first, second)
        )
    )

    assert decode.engine.core.counters.num_preemptions > 0
    for prompt, (tokens, _) in zip((first, second), answers, strict=True):
        until_end = greedy(prompt, 40)
        assert tokens[: len(until_end)] == until_end
    assert metric(decode, "tandem_worker_remote_prefills_total") == 3
    assert metric(decode, "tandem_worker_remote_prefill_failures_total") == 0
    assert await used_blocks(decode) == 0


async def test_a_request_for_no_token_at_all_is_not_sent_to_a_prefill_worker(
    pair: tuple[Worker, Worker],
) -> None:
    prefill, decode = pair
    prompt = decode.tokenizer.encode(TEXT * 3)

    tokens, choice = await complete(decode, prompt, prefill.url, max_tokens=0)

    assert (tokens, choice["finish_reason"]) == ([], "length")
    assert metric(decode, "tandem_worker_remote_prefill_failures_total") == 0
    assert metric(decode, "tandem_worker_remote_prefills_total") == 0


async def test_short_prompts_stay_here_when_told_so(
    start_worker: Any, pair: tuple[Worker, Worker]
) -> None:
    prefill, _ = pair
    decode = await start_worker("decode", token=b"secret", local_prefill_max_tokens=100)
    long = decode.tokenizer.encode(TEXT * 12)

    await complete(decode, long[:100], prefill.url, max_tokens=2)
    await complete(decode, long[:400], prefill.url, max_tokens=2)

    assert metric(decode, "tandem_worker_remote_prefills_total") == 1


async def test_a_client_that_leaves_during_a_remote_prefill_leaks_nothing(
    pair: tuple[Worker, Worker],
) -> None:
    prefill, decode = pair
    prompt = decode.tokenizer.encode(TEXT * 12)[:900]
    headers = {"x-tandem-prefill": prefill.url, "x-tandem-peer-token": "secret"}

    for delay in (0.0, 0.01, 0.03, 0.06):
        async with httpx.AsyncClient(base_url=decode.url) as client:
            request = asyncio.create_task(
                client.post("/v1/completions", json={"prompt": prompt}, headers=headers)
            )
            await asyncio.wait({request}, timeout=delay)
            request.cancel()
            await asyncio.gather(request, return_exceptions=True)

    assert await used_blocks(decode) == await used_blocks(prefill) == 0
    await eventually(lambda: not decode.num_requests and not prefill.num_requests)


async def test_a_remote_prefill_cancelled_before_it_began_gives_its_blocks_back(
    pair: tuple[Worker, Worker],
) -> None:
    prefill, decode = pair
    remote = decode.remote_prefill
    assert remote is not None
    reserved: asyncio.Queue[ReservedEvent] = asyncio.Queue()
    sequence = Sequence("r", [5] * 100, 100, remote_prefill=True)
    decode.engine.add(EngineRequest(sequence, SamplingParams(), reserved.put_nowait))  # type: ignore[arg-type]
    event = await reserved.get()
    held = decode.engine.load.blocks_used

    task = remote.start(prefill.url, PrefillJob("r", event.token_ids, 100, SamplingParams()), event)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)

    assert held == 2
    assert await used_blocks(decode) == 0


async def test_the_kv_link_can_be_tested(pair: tuple[Worker, Worker]) -> None:
    prefill, decode = pair

    async with httpx.AsyncClient(base_url=prefill.url) as client:
        reply = await client.post(
            "/internal/kv-link",
            json={"address": decode.kv_address},
            headers={"x-tandem-peer-token": "secret"},
        )

    assert reply.json()["ok"] is True


async def test_a_unified_worker_has_no_kv_link_and_says_so(start_worker: Any) -> None:
    unified = await start_worker()

    async with httpx.AsyncClient(base_url=unified.url) as client:
        replies = [
            await client.post(path, json={"request_id": "r", "address": "127.0.0.1:1"})
            for path in ("/internal/prefill", "/internal/abort", "/internal/kv-link")
        ]

    assert unified.kv_address is None
    assert {reply.status_code for reply in replies} == {409}
    assert "role is unified" in replies[0].json()["error"]["message"]


@pytest.fixture
async def prefill_process(
    tiny_llama: Path, tmp_path: Path
) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """A prefill worker of its own process, so that it can be killed."""
    config = WorkerConfig(
        served_model="tiny", role="prefill", num_kv_blocks=64, max_batched_tokens=16, max_num_seqs=4
    )
    (tmp_path / "config.json").write_text(config.model_dump_json())
    host = f"127.{32 + os.getpid() // 250 % 32}.{os.getpid() % 250}.2"  # per test process
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "tandem_worker", "--config", str(tmp_path / "config.json")),
        *("--weights", str(tiny_llama), "--host", host),
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    url = f"http://{host}:8100"
    assert process.stderr is not None
    async with asyncio.timeout(60):
        while b"ready at" not in (line := await process.stderr.readline()):
            assert line, "the prefill worker ended before it was ready"
    yield process, url
    if process.returncode is None:
        process.kill()
        await process.wait()


async def test_killing_the_prefill_worker_during_a_prefill_only_delays_the_request(
    start_worker: Any,
    prefill_process: tuple[asyncio.subprocess.Process, str],
    greedy: Greedy,
) -> None:
    process, url = prefill_process
    decode = await start_worker("decode")
    prompt = decode.tokenizer.encode(TEXT * 40)[:900]
    warm, _ = await complete(decode, prompt[:50], url, temperature=0, max_tokens=4)

    request = asyncio.create_task(complete(decode, prompt, url, temperature=0, max_tokens=8))
    async with httpx.AsyncClient(base_url=url) as client:

        async def runs() -> bool:
            return bool((await client.get("/v1/load")).json()["num_running"])

        await eventually(runs)
    process.send_signal(signal.SIGKILL)
    tokens, _ = await request

    assert warm == greedy(prompt[:50], 4)
    assert tokens == greedy(prompt, 8)
    assert metric(decode, "tandem_worker_local_prefill_fallbacks_total") == 1
    assert await used_blocks(decode) == 0


async def test_a_frozen_prefill_worker_only_delays_the_request(
    start_worker: Any,
    prefill_process: tuple[asyncio.subprocess.Process, str],
    greedy: Greedy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tandem_worker.disaggregation import decode_side as remote_prefill

    process, url = prefill_process
    decode = await start_worker("decode")
    prompt = decode.tokenizer.encode(TEXT * 3)
    monkeypatch.setattr(remote_prefill, "_LOOK_AFTER_S", 0.2)
    process.send_signal(signal.SIGSTOP)

    tokens, _ = await complete(decode, prompt, url, temperature=0, max_tokens=8)

    assert tokens == greedy(prompt, 8)
    assert metric(decode, "tandem_worker_local_prefill_fallbacks_total") == 1
    process.kill()
    assert await used_blocks(decode) == 0


async def test_sigterm_ends_a_worker_with_status_zero(
    prefill_process: tuple[asyncio.subprocess.Process, str],
) -> None:
    process, url = prefill_process
    async with httpx.AsyncClient(base_url=url) as client:
        assert json.loads((await client.get("/ready")).text) == {"status": "ready"}

    process.send_signal(signal.SIGTERM)

    async with asyncio.timeout(20):
        assert await process.wait() == 0
