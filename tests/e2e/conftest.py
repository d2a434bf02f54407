"""One `tandem up` of the example pair for a module's tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# importlib mode puts no test folder on the path; the kit beside this file is shared by its tests
sys.path.insert(0, str(Path(__file__).parent))

from stack_kit import EXAMPLE, Stack, start, stop

WEIGHTS = [EXAMPLE.parent / "models" / tier / "model.safetensors" for tier in ("small", "large")]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    if not all(path.exists() for path in WEIGHTS):
        pytest.skip("the demo pair is not in this checkout; examples/models/train.py makes it")
    running = start(tmp_path_factory.mktemp("stack"), "e2e")
    try:
        yield running
    finally:
        stop(running)
