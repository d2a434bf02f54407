"""`kubectl apply -f examples/02-vllm` on a real control plane, over servers that speak as vLLM."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
CLIENT = str(Path(__file__).resolve().parent / "client.py")
ROUTER = "tandem.dev/router=chat"
EXAMPLE = str(ROOT / "examples" / "02-vllm")
RELEASE = ("tandem", str(ROOT / "charts" / "tandem"), "--namespace", "tandem-system")


@pytest.fixture(scope="module")
def two_models(cluster: Any) -> Iterator[Any]:
    """The chart with its defaults, and the example as it stands."""
    options = ("--create-namespace", "--take-ownership", "--wait", "--timeout=60s")
    local = ("--set", "images.pullPolicy=Never")
    installed = cluster.run("helm", "install", *RELEASE, *local, *options)
    try:
        assert installed.returncode == 0, installed.stderr
        cluster.kubectl("apply", "-f", EXAMPLE)
        ready(cluster)
        yield cluster
    finally:
        cluster.run("kubectl", "delete", "-f", EXAMPLE)
        cluster.run("helm", "uninstall", "tandem", "--namespace", "tandem-system")


def ready(cluster: Any) -> None:
    wait = ("wait", "--for=condition=Ready", "--timeout=120s")
    result = cluster.run(
        "kubectl", *wait, "model/small", "model/large", "router/chat", timeout_s=150.0
    )
    if result.returncode != 0:
        found = cluster.kubectl("get", "models,routers,workerpools,pods", "-o", "wide")
        pytest.fail(f"not Ready: {result.stderr}\n{found}")


def pods(cluster: Any, model: str) -> list[str]:
    found = cluster.get("pods", "-l", f"tandem.dev/model={model}")["items"]
    return [p["metadata"]["name"] for p in found if "deletionTimestamp" not in p["metadata"]]


def test_both_tiers_answer(two_models: Any) -> None:
    command = (sys.executable, CLIENT, ROUTER, "3", "4", "small", "large", "chat")

    result = two_models.run(*command, timeout_s=150.0)

    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["broken"] == []
    assert set(found["tiers"]) == {"small", "large"}


def test_a_rollout_and_a_killed_server_cost_no_request(two_models: Any) -> None:
    """Streams on the old server end there; a killed one's go on at the next, token for token."""
    before = pods(two_models, "large")
    args = '{"spec": {"engine": {"args": {"enforce-eager": "true", "max-logprobs": "5"}}}}'

    with two_models.asking(ROUTER, "large", "chat") as found:
        two_models.kubectl("patch", "model", "large", "--type=merge", "-p", args)
        two_models.kubectl(
            "wait", "--for=condition=Progressing=false", "model/large", "--timeout=90s"
        )
        ready(two_models)
        rolled = pods(two_models, "large")
        two_models.kubectl("delete", "pod", *rolled, "--grace-period=0", "--force")
        ready(two_models)

    assert not set(before) & set(rolled)
    assert found["asked"] > 4
    assert found["broken"] == []
    assert found["unequal"] == []


def test_a_sleeping_pool_of_vllm_wakes_for_a_request(two_models: Any) -> None:
    pool = "workerpool/small-unified"
    two_models.kubectl("scale", pool, "--replicas=0")
    two_models.kubectl("wait", "--for=jsonpath={.status.replicas}=0", pool, "--timeout=60s")

    client = subprocess.Popen(
        [*two_models.enter, sys.executable, CLIENT, ROUTER, "1", "1", "small"],
        env=two_models.env,
        stdout=subprocess.PIPE,
        text=True,
    )
    two_models.kubectl("scale", pool, "--replicas=1")
    out, _ = client.communicate(timeout=120.0)

    assert client.returncode == 0
    assert json.loads(out.splitlines()[-1])["broken"] == []


def test_deleting_the_example_leaves_nothing(two_models: Any) -> None:
    two_models.kubectl("delete", "-f", EXAMPLE, "--timeout=120s")

    assert two_models.left() == []
