"""A tiny Llama, what transformers makes of it, and workers that are stopped at the end."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from family_kit import save_family
from hub_kit import FakeHub, serving
from tandem_worker.config import WorkerConfig
from tandem_worker.server.worker import Worker
from worker_kit import Served, save_model


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    """A hub with one small model."""
    with serving(FakeHub()) as hub:
        yield hub


@pytest.fixture(scope="session")
def build_model() -> Callable[..., Path]:
    """(directory, family, **config) -> directory."""
    return save_model


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny model with the template and tokens of a family, by its name in ``family_kit``."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = save_family(tmp_path_factory.mktemp(name), name)
        return made[name]

    return get


@pytest.fixture(scope="session")
def reference(tiny_llama: Path) -> Any:
    """transformers' own model of ``tiny_llama``."""
    import transformers

    torch.set_num_threads(1)
    return transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def greedy(reference: Any) -> Callable[[list[int], int], list[int]]:
    """Greedy continuation by transformers, end token included."""

    def run(prompt: list[int], max_tokens: int) -> list[int]:
        with torch.inference_mode():
            out = reference.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=max_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        return out[0, len(prompt) :].tolist()

    return run


StartWorker = Callable[..., Awaitable[Worker]]


@pytest.fixture
async def start_worker(tiny_llama: Path) -> AsyncIterator[StartWorker]:
    """Start workers on free loopback ports; all are stopped at the end."""
    started: list[Served] = []

    async def start(
        role: str = "unified",
        *,
        token: bytes = b"",
        weights: Path = tiny_llama,
        **settings: Any,
    ) -> Worker:
        config = WorkerConfig.parse(
            {
                "served_model": "tiny",
                "role": role,
                "num_kv_blocks": 64,
                "max_batched_tokens": 128,
                "max_num_seqs": 16,
                "kv_port": 0,
                "local_prefill_max_tokens": 0,
            }
            | settings
        )
        served = await Served.start(config, weights, token)
        started.append(served)
        return served.worker

    yield start
    for served in started:
        await served.stop()
