"""`tandem serve`: one command, one server for one model, and a sentence where it cannot."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tandem_operator.cli import main


def test_a_folder_is_served_on_ipv6_with_a_line_to_try_it(tiny_llama: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "tandem_operator.cli", "serve", str(tiny_llama), "--port", "0"]
        + ["--host", "::1", "--name", "it's"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    try:
        said = [process.stdout.readline() for _ in range(4)]
        url = said[1].split(" is ready at ")[1].strip()
        curl = subprocess.run(["bash", "-c", said[3]], capture_output=True, text=True, check=True)
        model = httpx.get(f"{url}/models/it%27s")
        other = httpx.get(f"{url}/models/gpt-4")
        unknown = httpx.post(f"{url}/completions", json={"model": "gpt-4", "prompt": "x"})
    finally:
        process.send_signal(signal.SIGINT)
        status = process.wait(20)
        process.stdout.close()

    assert url.startswith("http://[::1]:")
    assert json.loads(curl.stdout)["choices"][0]["message"]["role"] == "assistant"
    assert model.json()["id"] == "it's"
    assert (other.status_code, unknown.status_code) == (404, 404)
    assert unknown.json()["error"]["code"] == "model_not_found"
    assert status == 0


def test_what_is_no_folder_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["serve", "/nowhere"])

    assert status == 1
    assert "tandem serve: /nowhere is not a directory" in capsys.readouterr().err
