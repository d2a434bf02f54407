"""Twenty seconds of mutated bytes; `scripts/fuzz.py --minutes 10` is the long run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_no_mutated_input_crashes_grows_or_shows_a_stack_trace() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "fuzz.py"), "--minutes", "0.33"]

    done = subprocess.run(command, capture_output=True, text=True, timeout=300)

    assert done.returncode == 0, done.stdout + done.stderr
    found = [line.partition(":")[0] for line in done.stdout.splitlines()]
    assert found == [
        *("http", "admin", "provider", "gateway", "worker", "kv", "frames", "resources"),
        *("checkpoints", "formats", "tokenizers", "artifacts", "prompts", "labels", "traces"),
    ]
