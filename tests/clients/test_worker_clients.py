"""Unchanged agent frameworks against one of our workers: every answer has the shape asked for."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from clients_kit import found_by
from family_kit import save_family

pytestmark = pytest.mark.slow


class Served:
    """A running ``tandem serve``."""

    def __init__(self, url: str, think: int) -> None:
        self.url = url
        self.think = think


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The command, for a random model of Qwen3's form that ends whatever may end."""
    with serving(tmp_path_factory.mktemp("models") / "tiny", "hermes") as running:
        yield running


@contextmanager
def serving(folder: Path, family: str) -> Iterator[Served]:
    """``tandem serve`` of a random model of a family."""
    save_family(folder, family)
    think = Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id("<think>")
    process = subprocess.Popen(
        [sys.executable, "-m", "tandem_operator.cli", "serve", str(folder), "--port", "0"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if found := re.search(r"ready at (\S+)/v1", line):
                yield Served(found[1], think)
                break
    finally:
        process.terminate()
        process.wait(30)
        if process.stdout is not None:
            process.stdout.close()


def test_openais_parse_langchain_and_pydantic_ai(served: Served) -> None:
    found = found_by("current", "worker_current.py", served.url, str(served.think))

    assert found == {
        "parse": True,
        "parse_tools": True,
        "finish_reason": "tool_calls",
        "stream_tools": True,
        "events": True,
        "same": True,
        "after": True,
        "thought": True,
        "thought_tokens": 4,
        "vectors": [64, 64],
        "models": ["tiny"],
        "model": "tiny",
        "unknown": "model_not_found",
        "structured": [True, True],
        "bound": ["weather", True],
        "history": True,
        "langchain_vectors": [64, 64],
        "outputs": [True, True],
        "output_stream": True,
    }


def test_instructor_and_llama_index(served: Served) -> None:
    found = found_by("agents", "worker_agents.py", served.url)

    assert found == {
        "tool_call": True,
        "tools_strict": True,
        "json_schema_mode": True,
        "structured": True,
        "calls": [True],
    }


@pytest.mark.parametrize("family", ["llama3_json", "mistral"])
def test_tools_of_every_family_in_three_clients(family: str, tmp_path: Path) -> None:
    with serving(tmp_path / "tiny", family) as running:
        found = found_by("current", "worker_dialects.py", running.url)

    assert found == {
        "whole": [True],
        "ids": True,
        "deltas": True,
        "named": True,
        "after": True,
        "bound": ["weather", True],
        "again": [True],
        "structured": True,
        "runs": [True, True],
    }
