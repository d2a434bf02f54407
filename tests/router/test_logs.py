"""Log lines: one JSON object each where asked for, with the id of the request they are about."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from typing import Any

import pytest

from tandem_router.logs import REQUESTS

SPEAK = """
import logging, os, sys
from {package}.logs import REQUEST_ID, configure
configure("info")
logging.getLogger("a").info("outside")
REQUEST_ID.set("r1")
logging.getLogger("b").warning("inside %s", 1, extra={{"tier": "large"}})
"""


def lines(package: str, form: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", SPEAK.format(package=package)],
        env={"TANDEM_LOG_FORMAT": form},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr.splitlines()


@pytest.mark.parametrize("package", ["tandem_router", "tandem_worker"])
def test_a_line_is_an_object_that_names_its_request(package: str) -> None:
    outside, inside = map(json.loads, lines(package, "json"))

    assert (outside["message"], outside["logger"], outside["level"]) == ("outside", "a", "INFO")
    assert "request_id" not in outside
    assert (inside["message"], inside["request_id"], inside["tier"]) == ("inside 1", "r1", "large")


@pytest.mark.parametrize("package", ["tandem_router", "tandem_worker"])
def test_lines_are_text_by_default(package: str) -> None:
    assert [line.split(" ", 2)[2] for line in lines(package, "text")] == [
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
