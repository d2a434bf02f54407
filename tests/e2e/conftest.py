"""One `tandem up` of the example pair for a module's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from stack_kit import Stack, start, stop


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    running = start(tmp_path_factory.mktemp("stack"), "e2e")
    try:
        yield running
    finally:
        stop(running)
