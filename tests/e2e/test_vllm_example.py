"""`tandem up examples/02-vllm` as it stands, over servers that answer as vLLM does."""

from __future__ import annotations

import sys
from pathlib import Path

import httpx
import pytest

from stack_kit import ROOT, start, stop

pytestmark = pytest.mark.slow


def test_the_example_of_two_vllm_models_serves_and_routes(tmp_path: Path) -> None:
    command = tmp_path / "vllm"
    command.write_text(
        f'#!/bin/sh\nexec {sys.executable} -m tandem_router.testing.fake_vllm "$@"\n'
    )
    command.chmod(0o755)

    stack = start(
        tmp_path, "vllm", "--image", f"vllm={command}", example=ROOT / "examples" / "02-vllm"
    )
    try:
        replies = {
            model: httpx.post(
                f"{stack.url}/v1/chat/completions",
                json={
                    "model": model,
                    "messages": [{"role": "user", "content": "2 + 3 ="}],
                    "max_tokens": 4,
                },
                timeout=60,
            )
            for model in ("small", "large", "chat")
        }
        engines = {
            pod["metadata"]["labels"].get("tandem.dev/engine")
            for pod in stack.get("pods")["items"]
            if "tandem.dev/role" in pod["metadata"]["labels"]
        }
    finally:
        status = stop(stack)

    assert {model: reply.status_code for model, reply in replies.items()} == dict.fromkeys(
        ("small", "large", "chat"), 200
    )
    assert [replies[tier].headers["x-tandem-tier"] for tier in ("small", "large")] == [
        "small",
        "large",
    ]
    assert engines == {"VLLM"}
    assert status == 0
