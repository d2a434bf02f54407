"""What the documents tell a reader to type for a cluster runs on a real control plane, with pods.

Getting started runs with real workers and a real router, from the images' names to a measured
saving, and so do the keys of teams. Where a page needs claims, GPUs or several replicas, workers
and routers are stand-ins, and nothing is downloaded (tests/worker/test_download.py has hubs). What
the other pages apply is checked by the apiserver, and started by `tandem up` in tests/documents.
"""

from __future__ import annotations

import gzip
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from document_kit import DOCS, GETTING_STARTED, ROOT, TASKS, blocks, of_cluster
from eventually import eventually_in_another_process
from tandem_operator.cli import main
from tandem_operator.demo import suite

PAGE = GETTING_STARTED
SYSTEM = "tandem-system"
NUM_QUESTIONS = 12
# Pages whose lines need pods, or what an earlier line made, with stand-ins for workers and routers:
# claims, GPUs, several replicas, another engine, a labelled Secret. The other examples start by
# `tandem up` in tests/documents.
STOOD_IN = ("own-weights", "gpus", "replicas", "vllm", "external-tier")


@dataclass(frozen=True)
class Reader:
    """A terminal of the reader's: the cluster, and the folder in which lines are typed."""

    cluster: Any
    folder: Path

    def types(self, lines: Sequence[str]) -> dict[str, str]:
        """What each line printed; one that forwards a port runs while the later ones do."""
        printed = {}
        for number, line in enumerate(lines):
            if line.startswith("kubectl port-forward "):
                with self._forwarding(line):
                    return printed | {line: ""} | self.types(lines[number + 1 :])
            result = self.cluster.run(
                "bash", "-c", f"cd '{self.folder}' && {line}", timeout_s=330.0
            )
            if result.returncode != 0:
                state = self.cluster.run("kubectl", "get", "models,routers,pods,events", "-A")
                pytest.fail(f"{line}\n{result.stdout}{result.stderr}\n{state.stdout}")
            printed[line] = result.stdout
        return printed

    @contextmanager
    def _forwarding(self, line: str) -> Iterator[None]:
        log = self.folder / "forward.log"
        with open(log, "wb") as out:
            process = subprocess.Popen(
                [*self.cluster.enter, "sh", "-c", f"exec {line}"],
                env=self.cluster.env,
                stdout=out,
                stderr=out,
            )
        try:
            eventually_in_another_process(
                lambda: "Forwarding from" in log.read_text(), told=log.read_text, process=process
            )
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(20)

    def within(self, namespace: str) -> Reader:
        """The same where kubectl without -n means this namespace, which is made."""
        self.cluster.kubectl("create", "namespace", namespace)
        config = json.loads(Path(self.cluster.env["KUBECONFIG"]).read_text())
        for context in config["contexts"]:
            context["context"]["namespace"] = namespace
        copy = self.folder / f"{namespace}.kubeconfig"
        copy.write_text(json.dumps(config))
        env = {**self.cluster.env, "KUBECONFIG": str(copy)}
        return replace(self, cluster=replace(self.cluster, env=env))


def for_cluster(text: str) -> str:
    """chat.yaml with the three lines of step 12's table changed."""
    rows = re.findall(r"^\| (?:Model|Router).*\| `(\S+)` \| `(\S+)` \|$", PAGE.read_text(), re.M)
    assert len(rows) == 3
    for old, new in rows:
        text, changed = re.subn(re.escape(old).replace("…", r"[^\"]*"), new, text)
        assert changed == 1, (old, text)
    return text


@pytest.fixture(scope="module")
def reader(crds: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    """Whoever has done the first half of getting started, with the files that it left, and has
    installed the chart as step 9 says."""
    folder = tmp_path_factory.mktemp("reader")
    models = folder / "models"
    for ours, theirs in (("small", "tiny-1b"), ("large", "giant-70b")):
        shutil.copytree(ROOT / "examples" / "models" / ours, models / theirs)
    chat = folder / "chat.yaml"
    small, large = models / "tiny-1b", models / "giant-70b"
    assert main(["init", "--small", str(small), "--large", str(large), "-o", str(chat)]) == 0
    claim, plugged = (b.text for b in reversed([b for b in blocks(PAGE) if b.language == "yaml"]))
    lines = "".join(f"  {line}\n" for line in plugged.splitlines())
    told = re.sub(r"^ *#.*\n", "", chat.read_text(), flags=re.M)
    local = told.replace("  predictor: {type: Length}\n", lines)
    (folder / "cluster.yaml").write_text(for_cluster(local))
    (folder / "claim.yaml").write_text(claim)
    shutil.copy(ROOT / "examples" / "01-hybrid" / "predictor", folder / "predictor")
    for name in ("charts", "examples"):
        (folder / name).symlink_to(ROOT / name)
    with gzip.open(folder / "graded.jsonl.gz", "wt") as file:
        for q in suite.generate("test", 5, NUM_QUESTIONS):
            answer = rf"(^|>)\s*{re.escape(q.answer)}\s*$"
            row = {"prompt": q.prompt, "reference": answer, "grader": "regex"}
            file.write(json.dumps({**row, "quality": {"small": 0.5, "large": 1.0}}) + "\n")
    tandem = folder / "bin" / "tandem"
    tandem.parent.mkdir()
    tandem.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m tandem_operator.cli "$@"\n')
    tandem.chmod(0o755)
    env = {**crds.env, "PATH": f"{tandem.parent}:{crds.env['PATH']}"}
    there = Reader(replace(crds, env=env), folder)
    try:
        # The definitions are there already, for other tests.
        there.types([f"{of_cluster(PAGE)[0]} --take-ownership"])
        yield there
    finally:
        # While there is an operator to see it; later tests have others.
        everywhere = ("models,routers", "--all", "--all-namespaces")
        crds.run("kubectl", "delete", *everywhere, "--timeout=60s", timeout_s=70.0)
        spaces = ("teams", *(f"stand-in-{name}" for name in STOOD_IN))
        crds.run("kubectl", "delete", "namespace", *spaces, "--ignore-not-found", "--wait=false")
        crds.run("helm", "uninstall", "tandem", "--namespace", SYSTEM)
        crds.run("kubectl", "delete", "pvc/weights", "configmap/predictor", "--wait=false")


def test_the_second_half_of_getting_started_ends_with_a_measured_saving(reader: Reader) -> None:
    install, *lines = of_cluster(PAGE)
    assert install.startswith("helm install ")
    printed = reader.types(lines)

    served = json.loads(next(t for line, t in printed.items() if line.startswith("curl")))
    assert {m["id"] for m in served["data"]} >= {"chat", "small", "large"}
    verified = next(t for line, t in printed.items() if line.startswith("tandem verify"))
    assert f"chat answered {NUM_QUESTIONS} questions" in verified
    assert "large calls saved" in verified


def test_the_two_operators_of_a_plain_installation_are_on_different_nodes(reader: Reader) -> None:
    chosen = ("-n", SYSTEM, "-l", "app.kubernetes.io/name=tandem-operator")
    found = reader.cluster.get("pods", *chosen)["items"]

    assert {pod["spec"]["nodeName"] for pod in found} == {"node-0", "node-1"}


def test_teams_get_their_keys_through_a_forwarded_port(reader: Reader) -> None:
    there = reader.within("teams")
    lines = of_cluster(DOCS / "tasks" / "teams.md")
    ask = (
        "curl -s http://127.0.0.1:8000/v1/chat/completions -H 'content-type: application/json' "
        """-d '{"model": "chat", "messages": [{"role": "user", "content": "Hello"}]}' """
    )
    given = """-H "authorization: Bearer $(awk '/^key/ {print $2}' minted)\""""

    assert lines[-1].startswith("tandem keys create ")
    printed = there.types([*lines[:-1], f"{lines[-1]} > minted", ask, ask + given])

    refused, answered = (json.loads(text) for text in list(printed.values())[-2:])
    assert refused["error"]["code"] == "missing_api_key"
    assert "choices" in answered, answered


def test_claims_gpus_replicas_and_another_engine_become_ready_as_their_pages_say(
    reader: Reader,
) -> None:
    """Each in a namespace of its own, all at the same time."""
    readers = {name: reader.within(f"stand-in-{name}") for name in STOOD_IN}
    for name, there in readers.items():
        there.types(of_cluster(DOCS / "tasks" / f"{name}.md"))
    states = {name: state_of(there) for name, there in readers.items()}

    assert {name: state for name, state in states.items() if state} == {}


def state_of(reader: Reader) -> str:
    """What is not Ready of a namespace; "" where all is."""
    kinds = reader.cluster.run("kubectl", "get", "models,routers", "-o", "name").stdout.split()
    wait = ("kubectl", "wait", "--for=condition=Ready", *kinds, "--timeout=90s")
    result = reader.cluster.run(*wait, timeout_s=100.0)
    if kinds and result.returncode == 0:
        return ""
    state = reader.cluster.run("kubectl", "get", "models,routers,pods", "-o", "wide")
    return f"{result.stderr}\n{state.stdout}"


TAKEN = [p for p in TASKS if p.stem not in (*STOOD_IN, "teams")]


@pytest.mark.parametrize("page", TAKEN, ids=lambda p: p.stem)
def test_what_another_page_applies_is_taken(crds: Any, page: Path) -> None:
    """By the server, which changes nothing; a release is changed in test_upgrade.py."""
    for line in of_cluster(page):
        assert line.startswith(("helm ", "kubectl apply")), f"{line}: add {page.stem} to STOOD_IN"
        result = crds.run("sh", "-c", f"cd '{ROOT}' && {line} --dry-run=server")
        assert result.returncode == 0, f"{line}\n{result.stderr}"
