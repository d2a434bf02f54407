"""Log lines: one JSON object each where asked for, with the id of the request they are about."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from typing import Any

import pytest

from tandem_router.telemetry.logs import REQUESTS

SPEAK = """
import logging, os, sys
from {module} import REQUEST_ID, configure
configure("info")
logging.getLogger("a").info("outside")
REQUEST_ID.set("r1")
logging.getLogger("b").warning("inside %s", 1, extra={{"tier": "large"}})
"""


MODULES = ["tandem_router.telemetry.logs", "tandem_worker.telemetry.logs"]


def lines(module: str, form: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", SPEAK.format(module=module)],
        env={"TANDEM_LOG_FORMAT": form},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr.splitlines()


@pytest.mark.parametrize("module", MODULES)
def test_a_line_is_an_object_that_names_its_request(module: str) -> None:
    outside, inside = map(json.loads, lines(module, "json"))

    assert (outside["message"], outside["logger"], outside["level"]) == ("outside", "a", "INFO")
    assert "request_id" not in outside
    assert (inside["message"], inside["request_id"], inside["tier"]) == ("inside 1", "r1", "large")


@pytest.mark.parametrize("module", MODULES)
def test_lines_are_text_by_default(module: str) -> None:
    assert [line.split(" ", 2)[2] for line in lines(module, "text")] == [
        "INFO a: outside",
        "WARNING b: inside 1",
    ]


async def test_a_finished_request_is_one_line_without_its_text(
    run_router: Any, make_worker: Any, caplog: pytest.LogCaptureFixture
) -> None:
    worker = await make_worker()
    caplog.set_level(logging.INFO, REQUESTS.name)

    async with run_router({"large": {"decode": [worker]}}) as (client, _):
        reply = await client.chat(model="large")

    (line,) = [r for r in caplog.records if r.name == REQUESTS.name]
    said = vars(line)
    assert said["request_id"] == reply.headers["x-request-id"]
    assert (said["status"], said["tier"], said["output_tokens"]) == (200, "large", 8)
    assert said["decode_worker"] == worker.url
