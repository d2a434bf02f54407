"""One `tandem up` of the example pair for a module's tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# importlib mode puts no test folder on the path; the kit beside this file is shared by its tests
sys.path.insert(0, str(Path(__file__).parent))

from stack_kit import Stack, start, stop


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    running = start(tmp_path_factory.mktemp("stack"), "e2e")
    try:
        yield running
    finally:
        stop(running)
