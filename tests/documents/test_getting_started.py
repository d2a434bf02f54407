"""Every command and YAML of docs/getting-started.md, typed in order: local ones here, on the real
pair under a reader's names; those of the cluster in tests/controlplane/test_documents.py."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from document_kit import GETTING_STARTED as PAGE
from document_kit import ROOT, blocks, commands, here
from eventually import eventually_in_another_process
from tandem_operator.demo import suite

NUM_QUESTIONS = 64


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A folder with the reader's models and questions, and what each command printed there."""
    folder = tmp_path_factory.mktemp("reader")
    for ours, theirs in (("small", "tiny-1b"), ("large", "giant-70b")):
        shutil.copytree(ROOT / "examples" / "models" / ours, folder / "models" / theirs)
    with open(folder / "questions.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["prompt", "reference", "grader"])
        for q in suite.generate("test", 5, NUM_QUESTIONS):
            rows.writerow([q.prompt, rf"(^|>)\s*{re.escape(q.answer)}\s*$", "regex"])
    shims = folder / "bin"
    shims.mkdir()
    (shims / "tandem").write_text(
        f'#!/bin/sh\nexec "{sys.executable}" -m tandem_operator.cli "$@"\n'
    )
    (shims / "tandem").chmod(0o755)
    env = {
        **os.environ,
        "PATH": f"{shims}:{os.environ['PATH']}",
        "XDG_CACHE_HOME": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    env.pop("XDG_RUNTIME_DIR", None)
    seen: dict[str, Any] = {"folder": folder, "printed": {}}
    up: subprocess.Popen[bytes] | None = None
    try:
        for line in here(PAGE):
            if line.startswith("tandem up"):
                up = _started(line, folder, env)
                continue
            line = _on_our_port(line, folder)
            if line.startswith("tandem apply"):
                _plug_in(folder / "chat.yaml")
            result = subprocess.run(
                ["bash", "-c", line],
                cwd=folder,
                env=env,
                capture_output=True,
                text=True,
                timeout=240,
            )
            seen["printed"][line.split("|")[0]] = result.stdout
            assert result.returncode == 0, f"{line}\n{result.stdout}{result.stderr}"
            if line.startswith("tandem apply"):
                _until_loaded(folder, env)
        yield seen
    finally:
        if up is not None:
            up.send_signal(signal.SIGTERM)
            seen["ended"] = up.wait(60)


def _started(line: str, folder: Path, env: dict[str, str]) -> subprocess.Popen[bytes]:
    with open(folder / "up.log", "wb") as out:
        process = subprocess.Popen(
            ["bash", "-c", f"exec {line}"],
            cwd=folder,
            env=env,
            stdout=out,
            stderr=out,
            stdin=subprocess.DEVNULL,
        )
    log = folder / "up.log"
    eventually_in_another_process(
        lambda: "ready after" in log.read_text(), 240.0, told=log.read_text, process=process
    )
    return process


def _on_our_port(line: str, folder: Path) -> str:
    """The same line where another test's endpoint has port 8000."""
    if "127.0.0.1:8000" not in line:
        return line
    found = re.search(r"chat: http://(127\.0\.0\.1:\d+)/v1", (folder / "up.log").read_text())
    assert found is not None
    return line.replace("127.0.0.1:8000", found[1])


def _plug_in(path: Path) -> None:
    """What step 6 tells the reader to replace, with what."""
    new = next(b.text for b in blocks(PAGE) if b.language == "yaml")
    old = "  predictor: {type: Length}\n"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, "".join(f"  {line}\n" for line in new.splitlines())))


def _until_loaded(folder: Path, env: dict[str, str]) -> None:
    def has_it() -> bool:
        answer = subprocess.run(
            ["tandem", "get", "router", "chat", "--json"], cwd=folder, env=env, capture_output=True
        )
        status = json.loads(answer.stdout)["status"]
        conditions = {c["type"]: c["status"] for c in status["conditions"]}
        return conditions["PredictorReady"] == "True" == conditions["Ready"]

    eventually_in_another_process(has_it, 90.0, 0.2)


def test_the_way_from_two_folders_to_a_measured_saving(reader: dict[str, Any]) -> None:
    printed = {line.split(" http")[0]: text for line, text in reader["printed"].items()}
    verify = next(text for line, text in printed.items() if line.startswith("tandem verify"))

    assert printed["tandem --version"].startswith("tandem ")
    assert f"chat answered {NUM_QUESTIONS} questions" in verify
    assert "large calls saved" in verify
    assert "the floor of 95.0%" in verify
    head = ["quality", "95 % interval", "large calls", "cost"]
    assert re.split(r"\s{2,}", verify.splitlines()[1].strip()) == head


def test_what_the_page_prints_has_the_form_of_what_is_printed(reader: dict[str, Any]) -> None:
    """Numbers are those of the author's run; every word is that of the command."""
    page = next(b.text for b in blocks(PAGE) if "tandem verify" in b.text)
    said = [re.sub(r"[\d.$%]+", "#", line) for line in page.splitlines()[1:]]
    verify = next(t for line, t in reader["printed"].items() if line.startswith("tandem verify"))
    printed = [re.sub(r"[\d.$%]+", "#", line) for line in verify.splitlines()]

    assert [line.split()[:2] for line in said[:5]] == [line.split()[:2] for line in printed[:5]]
    assert said[5].split("#")[1] == printed[5].split("#")[1]


def test_images_are_built_from_the_files_that_are_there() -> None:
    lines = commands(PAGE)
    built = [line for line in lines if line.startswith("docker build")]
    helm = next(line for line in lines if line.startswith("helm install"))

    assert len(built) == 3
    for line in built:
        file, tag = re.findall(r"-f (\S+) -t (\S+) \.$", line)[0]
        assert (ROOT / file).is_file()
        assert f"docker push {tag}" in lines
        assert f"={tag}" in helm
