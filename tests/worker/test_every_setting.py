"""Every setting of a worker reaches what it is for: two workers that differ in it are told apart.

What the parts then make of it is in their own tests; `tests/project/doors_worker.py` names both.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tandem_worker.transfer as transfer
from tandem_worker.cli import worker as cli
from tandem_worker.config import BLOCK_SIZE, WorkerConfig
from tandem_worker.disaggregation import decode_side
from tandem_worker.engine.core import EngineCore
from tandem_worker.errors import WorkerError
from tandem_worker.scheduling.sequence import Sequence
from tandem_worker.server.worker import Worker
from tandem_worker.transfer.tcp_receiver import TcpReceiver

PAIRS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "role": ("unified", "prefill", {}),
    "dtype": ("float32", "bfloat16", {}),
    "kv_cache_dtype": ("auto", "int8", {}),
    "max_loss": (0.0, 1.0, {"kv_cache_dtype": "fp8"}),
    "device": ("cpu", "cuda", {}),
    "num_kv_blocks": (16, 32, {}),
    "max_num_seqs": (4, 8, {}),
    "max_batched_tokens": (64, 128, {}),
    "max_model_len": (64, 128, {}),
    "scheduler": ("fcfs", "sjf", {}),
    "prefix_cache": (True, False, {}),
    "transfer.max_inflight_bytes": (1 << 20, 1 << 21, {"role": "decode"}),
    "transfer.checksum": (False, True, {"role": "prefill"}),
    "transfer.reserve_timeout_s": (1.0, 2.0, {"role": "decode"}),
    "transfer.attempts": (1, 2, {"role": "decode"}),
    "local_prefill_max_tokens": (0, 256, {"role": "decode"}),
    "kv_port": (0, 1, {"role": "decode"}),
    "num_threads": (1, 2, {}),
    "revision": ("one", "two", {}),
}


def decided(core: EngineCore) -> dict[str, Any]:
    """What an engine is made of, and what its scheduler does with three requests that wait."""
    scheduler, runner = core.scheduler, core.runner
    asked = [
        Sequence(str(number), list(range(number * BLOCK_SIZE)), 1, remote_prefill=True)
        for number in (3, 1, 2)
    ]
    for sequence in asked:
        scheduler.add(sequence, 0.0)
    order = [sequence.request_id for sequence in scheduler.waiting]
    step = scheduler.schedule(0.0)
    found = {
        "order": order,
        "remote": [sequence.request_id for sequence in step.reserved],
        "dtype": str(runner.dtype),
        "kv_dtype": str(runner.kv_dtype),
        "device": str(runner.device),
        "limits": scheduler.limits,
        "blocks": scheduler.blocks.num_blocks,
        "prefix_cache": scheduler.blocks.prefix_cache,
    }
    for sequence in step.reserved:
        core.release_blocks(scheduler.remote_abandoned(sequence))
    for sequence in asked:
        if sequence not in step.reserved:
            scheduler.finish(sequence)
    return found


def listening(monkeypatch: pytest.MonkeyPatch, where: Any, name: str) -> dict[Any, Any]:
    """The values that a part is made with, as they come."""
    told: dict[Any, Any] = {}
    make: Callable[..., Any] = getattr(where, name)

    def listen(*arguments: Any, **options: Any) -> Any:
        named = {**dict(enumerate(arguments)), **options}
        told.update({k: v for k, v in named.items() if isinstance(v, int | float)})
        return make(*arguments, **options)

    monkeypatch.setattr(where, name, listen)
    return told


async def seen(start_worker: Any, settings: dict[str, Any]) -> Any:
    """All that can be told of a worker with these settings."""
    with pytest.MonkeyPatch.context() as patch:
        told = [
            listening(patch, transfer, "create_receiver"),
            listening(patch, transfer, "create_sender"),
            listening(patch, decode_side, "RemotePrefill"),
            listening(patch, torch, "set_num_threads"),
            listening(patch, TcpReceiver, "start"),
        ]
        try:
            worker: Worker = await start_worker(**settings)
        except WorkerError as error:
            return str(error)
    load = worker.load()
    return (
        told,
        await worker.engine.call(decided),
        {name: load[name] for name in ("role", "revision", "max_model_len")},
    )


def with_setting(path: str, value: Any, given: dict[str, Any]) -> dict[str, Any]:
    section, _, name = path.rpartition(".")
    free = {"local_prefill_max_tokens": 0, "num_kv_blocks": 32}
    return {**free, **given, **({section: {name: value}} if section else {name: value})}


async def alike(start_worker: Any, path: str, a: Any, b: Any, given: dict[str, Any]) -> bool:
    """Whether nothing tells two values apart, or something does where there is no difference."""
    one, again, other = [
        await seen(start_worker, with_setting(path, value, given)) for value in (a, a, b)
    ]
    return bool(one == other or one != again)


@pytest.mark.parametrize("path", PAIRS)
async def test_two_workers_that_differ_in_a_setting_can_be_told_apart(
    start_worker: Any, path: str
) -> None:
    assert not await alike(start_worker, path, *PAIRS[path])


async def test_a_setting_that_is_wired_to_nothing_is_found(
    start_worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted in place of one that is: it is accepted, and read as its default."""
    read = WorkerConfig.parse

    def without(data: Any) -> WorkerConfig:
        return read({name: value for name, value in data.items() if name != "max_model_len"})

    monkeypatch.setattr(WorkerConfig, "parse", staticmethod(without))

    assert await alike(start_worker, "max_model_len", *PAIRS["max_model_len"])


@pytest.mark.parametrize("name", ["http_port", "drain_timeout_s"])
def test_the_command_serves_and_drains_as_its_configuration_says(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Listening and draining themselves: `test_config.py`, `test_server_life.py`."""
    told: list[Any] = []

    async def serve(config: WorkerConfig, weights: Path, *, port: int, **_: Any) -> int:
        told.append((port, config.drain_timeout_s))
        return 0

    monkeypatch.setattr(cli, "serve", serve)
    monkeypatch.setattr(cli, "configure", lambda level: None)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    for value in (1025, 1026):
        file = tmp_path / "worker.json"
        file.write_text(json.dumps({"served_model": "m", name: value}))
        assert cli.main(["--config", str(file), "--weights", str(tiny_llama)]) == 0

    assert told[0] != told[1]
