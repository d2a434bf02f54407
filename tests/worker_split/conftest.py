"""Real worker processes on loopback addresses of their own, as `tandem up` starts them."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from eventually import eventually
from worker_kit import save_model

TOKEN = "split-secret"
START_S = 90.0


@dataclass
class WorkerProcess:
    """One `python -m tandem_worker` and how to talk to it."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path
    client: httpx.AsyncClient = field(init=False)

    def __post_init__(self) -> None:
        self.client = httpx.AsyncClient(
            base_url=self.url, timeout=120, headers={"x-tandem-peer-token": TOKEN}
        )

    async def ready(self) -> None:
        """Wait until it serves; a worker that dies shows its log."""

        async def serves() -> bool:
            if self.process.poll() is not None:
                raise AssertionError(f"the worker ended:\n{self.log.read_text()[-4000:]}")
            try:
                return (await self.client.get("/ready")).status_code == 200
            except httpx.TransportError:
                return False

        await eventually(serves, START_S, 0.1)

    async def complete(
        self, prompt: list[int], prefill: str | None = None, **body: Any
    ) -> dict[str, Any]:
        """The choice of one completion, token ids included."""
        headers = {"x-tandem-token-ids": "1"}
        if prefill is not None:
            headers["x-tandem-prefill"] = prefill
        reply = await self.client.post(
            "/v1/completions", json={"prompt": prompt, **body}, headers=headers
        )
        assert reply.status_code == 200, reply.text
        choice: dict[str, Any] = reply.json()["choices"][0]
        return choice

    async def load(self) -> dict[str, Any]:
        """GET /v1/load."""
        answer: dict[str, Any] = (await self.client.get("/v1/load")).json()
        return answer

    async def metric(self, name: str) -> float:
        """One value of GET /metrics."""
        text = (await self.client.get("/metrics")).text
        for line in text.splitlines():
            if line.startswith(name + "{"):
                return float(line.rsplit(" ", 1)[1])
        raise AssertionError(f"{self.url} has no metric {name}")

    async def idle(self) -> None:
        """Wait until no block is in use, and check that none is lost."""

        async def unused() -> dict[str, Any]:
            blocks: dict[str, Any] = (await self.load())["kv_blocks"]
            return {} if blocks["used"] else blocks

        blocks = await eventually(unused, 60.0, 0.05)
        assert blocks["free"] + blocks["cached"] == blocks["total"]

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal."""
        self.process.send_signal(number)

    async def stop(self) -> int:
        """SIGTERM; the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
        try:
            return await asyncio.to_thread(self.process.wait, 20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return await asyncio.to_thread(self.process.wait)
        finally:
            await self.client.aclose()


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose greedy answers have clear winners."""
    return save_model(tmp_path_factory.mktemp("split") / "llama", "llama")


@pytest.fixture(scope="session")
def reference(tiny_llama: Path) -> Any:
    """transformers' own model."""
    import transformers

    torch.set_num_threads(1)
    return transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()


Start = Callable[..., Awaitable[list[WorkerProcess]]]


@pytest.fixture
async def start(tiny_llama: Path, tmp_path: Path) -> AsyncIterator[Start]:
    """(role, role, ...) -> ready workers, each on its own 127.x address and the same ports."""
    workers: list[WorkerProcess] = []
    token_file = tmp_path / "token"
    token_file.write_text(TOKEN + "\n")

    async def start_all(*roles: str, **settings: Any) -> list[WorkerProcess]:
        started = []
        for role in roles:
            # pid and number: two runs of the suite on one machine do not meet
            number = len(workers) + 1
            host = f"127.{64 + os.getpid() // 250 % 64}.{os.getpid() % 250}.{number}"
            config = {
                "served_model": "tiny",
                "role": role,
                "num_kv_blocks": 96,
                "max_batched_tokens": 128,
                "max_num_seqs": 16,
                "local_prefill_max_tokens": 0,
                **settings,
            }
            path = tmp_path / f"worker-{number}.json"
            path.write_text(json.dumps(config))
            log = tmp_path / f"worker-{number}.log"
            command = [sys.executable, "-m", "tandem_worker", "--config", str(path)]
            command += ["--weights", str(tiny_llama), "--host", host]
            command += ["--peer-token-file", str(token_file)]
            with log.open("wb") as out:
                process = subprocess.Popen(  # noqa: ASYNC220 - returns at once
                    command, stdout=out, stderr=out, env={**os.environ, "OMP_NUM_THREADS": "1"}
                )
            worker = WorkerProcess(f"http://{host}:8100", process, log)
            workers.append(worker)
            started.append(worker)
        for worker in started:
            await worker.ready()
        return started

    yield start_all
    for worker in workers:
        await worker.stop()
