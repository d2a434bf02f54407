"""Unchanged clients of other people against a router over fakes: what they print is what they got.

A program per client in `programs/` runs in the environment of its set (`scripts/clients_setup.py`).
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tandem_router.testing.live_router import LiveRouter

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
PROGRAMS = Path(__file__).parent / "programs"
SAID, ADDED = "The answer is 42.", "The result is 42."


def load_setup() -> Any:
    spec = importlib.util.spec_from_file_location("setup", ROOT / "scripts" / "clients_setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def found_by(name: str, program: str, router: LiveRouter, *steps: str) -> dict[str, Any]:
    """What a program of a set printed last; skips where this machine cannot run the set."""
    setup = load_setup()
    if why := setup.unable(name):
        pytest.skip(why)
    home = setup.prepared(name)
    script, runner = PROGRAMS / program, str(home / "bin" / "python")
    if name == setup.NODE:
        # Node looks for packages beside the program.
        script, runner = Path(shutil.copy(script, home)), shutil.which("node") or "node"
    done = subprocess.run(
        [runner, str(script), router.url, *steps],
        capture_output=True,
        text=True,
        timeout=300,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", ["current", "openai2", "openai1"])
def test_openais_python_client_of_three_majors(router: LiveRouter, name: str) -> None:
    assert found_by(name, "openai_client.py", router) == {
        "whole": SAID,
        "usage": 10,
        "stream": SAID,
        "stream_usage": 10,
        "agent": ADDED,
        "completion": " 42",
        "vectors": [8, 8],
        "models": ["chat", "small"],
        "model": "small",
        "response": SAID,
        "response_stream": SAID,
        "tier": "small",
        "request_id": True,
        "unknown": ["NotFoundError", 404, "model_not_found"],
        "long": ["BadRequestError", 400, "context_length_exceeded"],
    }


def test_nodes_clients_of_openai_and_anthropic(router: LiveRouter) -> None:
    assert found_by("npm", "node_client.mjs", router) == {
        "whole": SAID,
        "stream": SAID,
        "agent": ADDED,
        "vectors": 8,
        "response": SAID,
        "unknown": ["NotFoundError", "model_not_found"],
        "anthropic": SAID,
    }


def test_anthropics_client_with_tools_and_errors(router: LiveRouter) -> None:
    assert found_by("current", "anthropic_client.py", router) == {
        "whole": SAID,
        "usage": [5, 5],
        "stream": SAID,
        "agent": ADDED,
        "count": 2,
        "unknown": ["NotFoundError", "not_found_error"],
        "long": ["BadRequestError", "invalid_request_error"],
    }


def test_langchain_with_tools_and_embeddings(router: LiveRouter) -> None:
    assert found_by("current", "langchain_client.py", router) == {
        "whole": SAID,
        "stream": SAID,
        "call": ["add", {"a": 12, "b": 30}],
        "agent": ADDED,
        "vectors": [8, 8],
    }


def test_litellm_knows_a_prompt_that_is_too_long_from_every_tier(router: LiveRouter) -> None:
    """Its fallbacks to models with more room look at the words."""
    assert found_by("current", "litellm_client.py", router) == {
        "whole": SAID,
        "stream": SAID,
        "vectors": 8,
        "anthropic": SAID,
        "unknown": "NotFoundError",
        "long": "ContextWindowExceededError",
        "long_small": "ContextWindowExceededError",
        "long_worker": "ContextWindowExceededError",
    }


def test_an_agent_of_pydantic_ai(router: LiveRouter) -> None:
    found = found_by("current", "pydantic_ai_client.py", router)

    assert found == {"agent": ADDED, "stream": ADDED}


def test_lm_eval_chooses_by_token_ids_and_generates(router: LiveRouter) -> None:
    """By the fake's log-probabilities " a" is likelier than " b", three times of three."""
    found = found_by("evaluations", "evaluate.py", router, "evaluate")

    assert found == {"choose": 1.0, "say": [" 42"] * 3}


def test_guidellm_measures(router: LiveRouter) -> None:
    found = found_by("evaluations", "evaluate.py", router, "measure")

    assert found == {"guidellm": {"successful": 3}}
