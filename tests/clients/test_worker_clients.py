"""Unchanged agent frameworks against one of our workers: every answer has the shape asked for."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator

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
    folder = save_family(tmp_path_factory.mktemp("models") / "tiny", "hermes")
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
