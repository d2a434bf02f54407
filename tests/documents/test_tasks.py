"""docs/tasks: every example starts with `tandem up`, every command is typed beside it.

Workers and routers are stand-ins, but for the pages whose commands or promises are a router's.
What needs claims or GPUs, and all that is typed for a cluster, runs on a real control plane in
tests/controlplane/test_documents.py; that no line is left over, test_every_command.py says.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from document_kit import DOCS, EXAMPLES, ROOT, STARTED_ELSEWHERE, TASKS, example_of, here
from eventually import eventually_in_another_process
from tandem_router.testing.fake_provider import FakeProvider

STUB = f"{sys.executable} -S {ROOT / 'tests' / 'operator' / 'stub_server.py'}"
#: Started below with a provider, so that its key arrives somewhere.
WITH_PROVIDER = "03-external-tier"
STARTED_HERE = [e for e in EXAMPLES if e.name not in {*STARTED_ELSEWHERE, WITH_PROVIDER}]


@dataclass
class Running:
    """One `tandem up`, in an environment in which other commands find it."""

    env: dict[str, str]
    log: Path

    def tandem(self, line: str, cwd: Path = ROOT) -> str:
        result = subprocess.run(
            ["bash", "-c", line], cwd=cwd, env=self.env, capture_output=True, text=True, timeout=120
        )
        assert result.returncode == 0, (
            f"{line}\n{result.stdout}{result.stderr}\n{self.log.read_text()}"
        )
        return result.stdout

    def url(self) -> str:
        return str(json.loads(self.tandem("tandem get router chat --json"))["status"]["endpoint"])


@contextmanager
def up(folder: Path, yaml: Path, *, real: tuple[str, ...] = ()) -> Iterator[Running]:
    """`tandem up` of an example, with stand-ins, until it says ready."""
    shims = folder / "bin"
    shims.mkdir(exist_ok=True)
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
    images = [f"tandem/{name}={STUB}" for name in ("worker", "router") if name not in real]
    arguments = [a for image in images for a in ("--image", image)]
    log = folder / "up.log"
    with open(log, "wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "tandem_operator.cli", "up", str(yaml), *arguments],
            cwd=ROOT,
            env=env,
            stdout=out,
            stderr=out,
            stdin=subprocess.DEVNULL,
        )
    try:
        eventually_in_another_process(
            lambda: "ready after" in log.read_text(), 120.0, told=log.read_text, process=process
        )
        yield Running(env, log)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def page_of(example: Path) -> Path:
    """The page that shows an example's YAML."""
    found = [p for p in TASKS if example_of(p).parent == example]
    assert len(found) == 1, f"{example.name} is shown on {len(found)} pages"
    return found[0]


@pytest.mark.parametrize("example", STARTED_HERE, ids=lambda p: p.name)
def test_an_example_starts_and_its_page_can_be_typed(example: Path, tmp_path: Path) -> None:
    page = page_of(example)
    typed = here(page)
    if example.name == "12-predictor-canary":
        files(tmp_path)

    real = ("worker", "router") if example.name == "05-teams" else ()
    # A route is for a cluster that has a gateway.
    ours = example / "router.yaml" if (example / "route.yaml").exists() else example
    with up(tmp_path, ours, real=real) as running:
        for line in typed:
            cwd = tmp_path if "evaluate" in line else ROOT
            assert running.tandem(line, cwd).strip(), line
        if example.name == "05-teams":
            check_that_a_key_opens_the_endpoint(running)


def files(folder: Path) -> None:
    """Two artifacts and graded questions, few, so that judging them is quick."""
    for name in ("old.tandem", "new.tandem"):
        shutil.copy(ROOT / "examples" / "01-hybrid" / "predictor", folder / name)
    import gzip

    with gzip.open(ROOT / "examples" / "models" / "outcomes.jsonl.gz", "rt") as rows:
        kept = [next(rows) for _ in range(120)]
    with gzip.open(folder / "held-out.jsonl.gz", "wt") as out:
        out.writelines(kept)


def check_that_a_key_opens_the_endpoint(running: Running) -> None:
    minted = json.loads(running.tandem("tandem keys create research --json"))
    key, number = minted["key"], minted["id"]
    limited = json.loads(running.tandem(f"tandem keys limit {number} --usd-per-hour 2 --json"))
    assert limited["usd_per_hour"] == 2
    ask = {"model": "chat", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
    url = f"{running.url().removesuffix('/v1')}/v1/chat/completions"

    with httpx.Client(trust_env=False, timeout=30) as client:
        without = client.post(url, json=ask)
        assert without.status_code == 401
        assert without.json()["error"]["code"] == "missing_api_key"
        answer = client.post(url, json=ask, headers={"authorization": f"Bearer {key}"})
        assert answer.status_code == 200, answer.text
        running.tandem(f"tandem keys revoke {number}")
        refused = client.post(url, json=ask, headers={"authorization": f"Bearer {key}"})
        assert refused.json()["error"]["code"] == "invalid_api_key"


async def test_the_external_tier_gets_its_key_and_its_share_of_the_questions(
    tmp_path: Path,
) -> None:
    provider = await FakeProvider().start()
    text = (ROOT / "examples" / "03-external-tier" / "router.yaml").read_text()
    copy = tmp_path / "router.yaml"
    text = text.replace("https://provider.example/v1", f"{provider.url}/v1")
    copy.write_text(text.replace("image:///opt/tandem", f"file://{ROOT}"))

    def ask() -> httpx.Response:
        with up(tmp_path, copy, real=("router",)) as running:
            url = f"{running.url().removesuffix('/v1')}/v1/chat/completions"
            body = {"model": "large", "messages": [{"role": "user", "content": "Hello"}]}
            return httpx.post(url, json=body, timeout=30, trust_env=False)

    answer = await asyncio.to_thread(ask)
    await provider.stop()

    assert answer.status_code == 200, answer.text
    assert answer.headers["x-tandem-tier"] == "large"
    assert float(answer.headers["x-tandem-cost-usd"]) > 0
    sent = {str(k).lower(): v for k, v in provider.inference[-1].headers.items()}
    assert sent["authorization"].lower() == "bearer put-yours-here"


def test_every_page_shows_a_whole_example_and_the_index_names_it() -> None:
    index = (DOCS / "tasks" / "index.md").read_text()

    for example in EXAMPLES:
        if example.name != "01-hybrid":
            page = page_of(example)
            assert f"({page.name}) | `{example.name}`" in index
    assert {page_of(e) for e in EXAMPLES if e.name != "01-hybrid"} == set(TASKS)
