"""What /openapi.json says holds for whatever a client sends by it, or beside it."""

from __future__ import annotations

import subprocess
import sys

import httpx

from tandem_router.api.inference import ABOUT, POSTS
from tandem_router.testing.live_router import LiveRouter

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "unsupported_method",
)


def test_every_route_of_clients_is_described(router: LiveRouter) -> None:
    described = httpx.get(f"{router.url}/openapi.json").json()["paths"].keys()

    assert described >= {*POSTS, *ABOUT} - {"/v1/tokenize", "/v1/detokenize"}


def test_schemathesis_finds_no_reply_that_is_not_described(router: LiveRouter) -> None:
    command = [
        sys.executable,
        "-m",
        "schemathesis.cli",
        "run",
        f"{router.url}/openapi.json",
        "--checks",
        ",".join(CHECKS),
        "--max-examples=8",
        "--phases=examples,fuzzing",
        "--generation-deterministic",
        "--no-color",
    ]

    done = subprocess.run(command, capture_output=True, text=True, timeout=300)

    assert done.returncode == 0, done.stdout + done.stderr
