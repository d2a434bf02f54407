"""Worker configuration: defaults that work, errors that say what to do."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tandem_worker.cli import NO_WEIGHTS, main
from tandem_worker.config import WorkerConfig
from tandem_worker.errors import ConfigError


def test_a_name_is_all_a_config_needs() -> None:
    config = WorkerConfig.parse({"served_model": "m"})

    assert config.role == "unified"
    assert WorkerConfig.parse(json.loads(config.model_dump_json())) == config


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "served_model is required"),
        ({"served_model": "m", "rol": "decode"}, "rol is not a known field"),
        ({"served_model": "m", "role": "both"}, "role='both': should be 'unified'"),
        ({"served_model": "m", "block_size": 24}, "block_size=24: should be 64"),
        ({"served_model": "m", "max_num_seqs": 0}, "max_num_seqs=0: should be greater than"),
        (
            {"served_model": "m", "kv_cache_bytes": 10**8, "num_kv_blocks": 9},
            "kv_cache_bytes and num_kv_blocks are both set",
        ),
        (
            {"served_model": "m", "max_num_seqs": 64, "max_batched_tokens": 32},
            "max_batched_tokens=32 is below max_num_seqs=64",
        ),
        ({"served_model": "m", "transfer": {"transport": "inproc"}}, "transfer.transport='inproc'"),
        (
            {"served_model": "m", "tensor_parallel": 65},
            "tensor_parallel=65",
        ),
        (
            {"served_model": "m", "tensor_parallel": 4, "device": "cuda"},
            "tensor_parallel=4 with device='cuda'",
        ),
        ([], "expected a JSON object, got list"),
    ],
)
def test_a_broken_rule_is_named_with_its_value(data: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        WorkerConfig.parse(data)

    assert message in str(caught.value)


def test_a_file_that_is_no_json_is_located(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text('{"served_model": }')

    with pytest.raises(ConfigError, match="line 1, column 18"):
        WorkerConfig.load(tmp_path / "c.json")


def test_config_and_the_pure_modules_import_without_torch() -> None:
    code = (
        "import sys, tandem_worker.config, tandem_worker.scheduling.scheduler, "
        "tandem_worker.scheduling.kv_blocks, "
        "tandem_worker.engine.sampling, tandem_worker.cli, tandem_worker.engine.core; "
        "sys.exit(any(m in sys.modules for m in ('torch', 'triton', 'tokenizers')))"
    )

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_server_can_listen_before_torch_is_imported() -> None:
    code = "import sys, tandem_worker.server.worker; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("busy", ["http", "kv"])
def test_a_busy_port_is_named(
    tmp_path: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str], busy: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
        config = {
            "served_model": "m",
            "role": "decode",
            "num_kv_blocks": 8,
            "kv_port": port if busy == "kv" else 0,
        }
        (tmp_path / "c.json").write_text(json.dumps(config))

        status = main(
            [
                *("--config", str(tmp_path / "c.json"), "--weights", str(tiny_llama)),
                *("--host", "127.0.0.1", "--port", str(port if busy == "http" else 0)),
            ]
        )

    error = capsys.readouterr().err.splitlines()[-1]
    assert status == 1
    assert error.startswith("tandem-worker: cannot listen")
    assert f"127.0.0.1:{port}" in error


def test_sigterm_while_loading_ends_at_once_with_status_zero(
    tmp_path: Path, tiny_llama: Path
) -> None:
    (tmp_path / "c.json").write_text('{"served_model": "m"}')
    slow = (
        "import sys, time, signal, os, threading, tandem_worker.server.worker as w; "
        "from tandem_worker.cli import main; "
        "w._load = lambda *a: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(60)); "
        "sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["--config", str(tmp_path / "c.json"), "--weights", str(tiny_llama), "--port", "0"]

    done = subprocess.run([sys.executable, "-c", slow, *arguments], check=False, timeout=50)

    assert done.returncode == 0


@pytest.mark.parametrize(
    ("config", "weights", "exit_status", "said"),
    [
        ('{"served_model": "m", "x": 1}', ".", 1, "x is not a known field"),
        ('{"served_model": "m"}', "nowhere", NO_WEIGHTS, "nowhere is not a directory"),
        ('{"served_model": "m"}', ".", NO_WEIGHTS, "holds no .safetensors file"),
    ],
)
def test_a_worker_that_cannot_start_says_why_in_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    config: str,
    weights: str,
    exit_status: int,
    said: str,
) -> None:
    """Its exit status says whether the weights are at fault: 66 of the contract."""
    (tmp_path / "c.json").write_text(config)

    status = main(
        [
            *("--config", str(tmp_path / "c.json"), "--weights", str(tmp_path / weights)),
            *("--host", "127.0.0.1", "--port", "0"),
        ]
    )

    error = capsys.readouterr().err
    assert status == exit_status
    assert said in error.splitlines()[-1]
    assert "Traceback" not in error
