"""On a real control plane: labels come in, a Job trains, later labels promote what it trained."""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from eventually import eventually_in_another_process
from postgres_server import running

CHART = str(Path(__file__).resolve().parents[2] / "charts" / "tandem")
NAMESPACE = "training"
IN = ("--namespace", NAMESPACE)

RESOURCES = """\
apiVersion: tandem.dev/v1alpha1
kind: Router
metadata: {name: chat}
spec:
  replicas: 2
  tiers:
  - {name: small, external: {url: "http://127.0.0.1:9/v1", model: s, usdPer1MOutputTokens: "1"}}
  - {name: large, external: {url: "http://127.0.0.1:9/v2", model: l, usdPer1MOutputTokens: "9"}}
  store: {postgres: {secretRef: {name: labels, key: url}}}
  predictor:
    training: {data: "configmap://graded/rows.jsonl", fromLabels: true, every: 1h, minLabels: 60}
  learning:
    {shadowShare: "0.5", capture: Prompts, judge: {url: "http://127.0.0.1:9/v3", model: judge}}
"""

# Runs inside the cluster's network: labels, as a router would write them.
WRITE = """
import asyncio, json, sys, time
from tandem_router.store.postgres import PostgresStore
from tandem_router.store.records import Batch, Label

async def write():
    url, name, rows = sys.argv[1], sys.argv[2], json.load(sys.stdin)
    store, now = PostgresStore(url, max_decisions=9), time.time()
    labels = [
        Label(f"{name}-{n}", "judge", now + n / 1e4, "t", "small", 0.5, row["quality"],
              predicted={"small": 0.5, "large": 0.9}, prompt=row["prompt"])
        for n, row in enumerate(rows)
    ]
    await store.write(Batch(name, 1, labels=labels))
    await store.close()

asyncio.run(write())
"""


def rows(right: bool, num: int, seed: int) -> list[dict[str, Any]]:
    """Hard questions are wrong at the small tier; or, where not `right`, easy ones are."""
    rng, found = random.Random(seed), []
    for number in range(num):
        hard = rng.random() < 0.5
        word = "prove that the integral converges" if hard else "name the capital of the country"
        small = float(rng.random() < (0.05 if hard == right else 0.95))
        quality = {"small": small, "large": float(rng.random() < 0.95)}
        found.append({"prompt": f"{word} number {number} please", "quality": quality})
    return found


@pytest.fixture(scope="module")
def routed(cluster: Any) -> Iterator[tuple[Any, str]]:
    """The chart with its rights, a database, and two router pods that have it the wrong way."""
    # Below /tmp itself: the server's user may not enter the folders that pytest makes for root.
    folder = Path(tempfile.mkdtemp(prefix="tandem-postgres-"))
    folder.chmod(0o755)
    try:
        with running(folder) as database:
            # A socket of the file system: the pods have a network of their own.
            url = f"postgresql://tandem@/postgres?host={folder}&port={database.port}"
            yield from installed_over(cluster, url)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def installed_over(cluster: Any, url: str) -> Iterator[tuple[Any, str]]:
    own = f"operator.replicas=1,operator.watchNamespace={NAMESPACE},allow.ownNamespace=true"
    values = ("--set", own, "--set", "allow.externalNetworks={127.0.0.0/8}")
    values = (*values, "--set", "images.pullPolicy=Never")
    options = ("--create-namespace", "--take-ownership", "--wait", "--timeout=60s")
    installed = cluster.run("helm", "install", "tandem", CHART, *IN, *values, *options)
    try:
        assert installed.returncode == 0, installed.stderr
        data = "".join(json.dumps(row) + "\n" for row in rows(False, 160, 0))
        graded = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "graded"}}
        secret = {"apiVersion": "v1", "kind": "Secret"}
        named = {"name": "labels", "labels": {"tandem.dev/usable-by": "routers"}}
        for obj in (
            {**graded, "data": {"rows.jsonl": data}},
            {**secret, "metadata": named, "stringData": {"url": url}},
        ):
            cluster.kubectl("apply", *IN, "-f", "-", stdin=json.dumps(obj))
        cluster.kubectl("apply", *IN, "-f", "-", stdin=RESOURCES)
        ready = "--for=jsonpath={.status.ready}=2/2"
        cluster.kubectl("wait", *IN, ready, "router/chat", "--timeout=120s")
        yield cluster, url
    finally:
        cluster.run("kubectl", "delete", "routers", "--all", *IN)
        cluster.run("helm", "uninstall", "tandem", *IN)


def predictor(cluster: Any) -> dict[str, Any]:
    found: dict[str, Any] = cluster.get("router", "chat", *IN)["status"].get("predictor") or {}
    return found


def changes(cluster: Any) -> list[str]:
    """What Events tell of the predictor, each as often as it was told."""
    events = cluster.get("events", *IN)["items"]
    found = [e for e in events if e["reason"] == "PredictorChanged"]
    return [e["message"] for e in found for _ in range(e["count"])]


def told(cluster: Any, kind: str) -> str:
    """The Event of the predictor's change of that kind; the status may be a step further."""

    def found() -> str | None:
        return next((text for text in changes(cluster) if f" {kind} " in text), None)

    said = eventually_in_another_process(found, 120.0, 0.5, lambda: json.dumps(predictor(cluster)))
    assert said is not None
    return said


def test_a_job_trains_from_labels_and_later_labels_promote_it_in_every_pod(
    routed: tuple[Any, str],
) -> None:
    cluster, url = routed

    def write(name: str, num: int, seed: int) -> None:
        done = cluster.run(
            *(*cluster.enter, sys.executable, "-c", WRITE, url, name),
            stdin=json.dumps(rows(True, num, seed)),
        )
        assert done.returncode == 0, done.stderr

    before = predictor(cluster)["version"]
    write("first", 80, 1)
    told(cluster, "trained")
    trained = predictor(cluster)
    candidate = trained["candidate"]
    assert trained["version"] == before
    write("later", 300, 2)
    promoted = told(cluster, "promoted")

    assert candidate in promoted
    assert "squared error" in promoted
    eventually_in_another_process(lambda: candidate in predictor(cluster)["version"], every_s=0.5)
    # The labels that are left over hold it against the one before, within seconds.
    told(cluster, "kept")
    said = changes(cluster)
    assert sorted(said) == predictor(cluster)["changes"]
    assert [text.split()[1] for text in sorted(said)] == ["trained", "promoted", "kept"]
    # Once nobody asks for it, it goes, and its pod with it.
    eventually_in_another_process(
        lambda: not cluster.get("jobs,pods", *IN, "-l", "tandem.dev/training=chat")["items"],
        every_s=0.5,
    )
