"""Chart, operator, workers and router on a real control plane, from install to nothing left."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
CLIENT = str(Path(__file__).resolve().parent / "client.py")
ROUTER = "tandem.dev/router=chat"
NAMESPACE = "tandem-system"
EXAMPLE = str(ROOT / "examples" / "01-hybrid")


def commands() -> list[str]:
    """The lines of the README's cluster section that a user types, word for word."""
    section = (ROOT / "README.md").read_text().split("\n## On a cluster\n")[1]
    block = section.split("```console\n")[1].split("```")[0]
    return [line.removeprefix("$ ") for line in block.splitlines() if line.startswith("$ ")]


@pytest.fixture(scope="module")
def hybrid(cluster: Any) -> Iterator[Any]:
    """What the README says, typed: the chart installed and the example Ready."""
    install, *others = commands()
    # The definitions may be there already, kept from another test's release.
    kept = cluster.run("kubectl", "get", "crd", "models.tandem.dev").returncode == 0
    typed(cluster, f"{install} --take-ownership" if kept else install)
    try:
        for line in others:
            typed(cluster, line)
        ready(cluster)
        yield cluster
    finally:
        cluster.run("kubectl", "delete", "-f", EXAMPLE)
        cluster.run("helm", "uninstall", "tandem", "--namespace", NAMESPACE)


def typed(cluster: Any, line: str) -> str:
    """Output of a command line given in the checkout."""
    result = cluster.run("sh", "-c", f"cd '{ROOT}' && exec {line}", timeout_s=320.0)
    if result.returncode != 0:
        state = cluster.kubectl("get", "models,routers,pods", "-o", "wide")
        pytest.fail(f"{line}: {result.stderr}\n{state}")
    return str(result.stdout)


def ready(cluster: Any) -> None:
    wait = ("wait", "--for=condition=Ready", "--timeout=180s")
    result = cluster.run(
        "kubectl", *wait, "model/small", "model/large", "router/chat", timeout_s=200.0
    )
    if result.returncode != 0:
        state = cluster.kubectl("get", "models,routers,workerpools,pods", "-o", "wide")
        log = cluster.kubectl("logs", "deployment/tandem-operator", "-n", NAMESPACE, "--tail=30")
        pytest.fail(f"not Ready: {result.stderr}\n{state}\n{log}")


def ask(cluster: Any, seconds: float, concurrency: int, *models: str) -> dict[str, Any]:
    """Run the client inside; its summary."""
    command = (sys.executable, CLIENT, ROUTER, str(seconds), str(concurrency), *models)
    result = cluster.run(*command, timeout_s=seconds + 150.0)
    assert result.returncode == 0, result.stderr
    summary: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return summary


def pod_of(cluster: Any, selector: str) -> str:
    pods = cluster.get("pods", "-l", selector)["items"]
    return str(pods[0]["metadata"]["name"])


def test_both_tiers_answer_and_prefill_and_decode_are_different_pods(hybrid: Any) -> None:
    found = ask(hybrid, 3, 4, "small", "large", "chat")
    large = hybrid.get("pods", "-l", "tandem.dev/model=large")["items"]

    assert found["broken"] == []
    assert set(found["tiers"]) == {"small", "large"}
    assert {p["metadata"]["labels"]["tandem.dev/role"] for p in large} == {"prefill", "decode"}
    assert len({p["status"]["podIP"] for p in large}) == 2


def test_the_kv_link_was_tested_with_a_real_block(hybrid: Any) -> None:
    conditions = hybrid.get("model", "large")["status"]["conditions"]

    found = {c["type"]: c["status"] for c in conditions}
    assert found["KVLinkReady"] == "True"
    assert found["Ready"] == "True"


def test_a_second_look_writes_nothing(hybrid: Any) -> None:
    """Level-triggered and idempotent: the versions stand still, but for what a Router measures."""
    kinds = "models,routers,workerpools,deployments,services,configmaps"
    counted = {"Router": "generation"}

    def versions() -> dict[str, str]:
        items = hybrid.get(kinds)["items"]
        return {
            f"{i['kind']}/{i['metadata']['name']}": str(
                i["metadata"][counted.get(i["kind"], "resourceVersion")]
            )
            for i in items
        }

    before = versions()
    time.sleep(8)

    assert versions() == before


def test_a_deleted_child_comes_back(hybrid: Any) -> None:
    hybrid.kubectl("delete", "service", "chat-router", "--wait=true")

    hybrid.kubectl("wait", "--for=create", "service/chat-router", "--timeout=30s")


def test_killed_pods_cost_no_request(hybrid: Any) -> None:
    """The only decode and the only prefill worker are killed; requests wait for the next ones."""
    with hybrid.asking(ROUTER, "large", "chat") as found:
        for role in ("decode", "prefill"):
            pod = pod_of(hybrid, f"tandem.dev/model=large,tandem.dev/role={role}")
            hybrid.kubectl("delete", "pod", pod, "--grace-period=0", "--force")
        ready(hybrid)

    assert found["asked"] > 4
    assert found["broken"] == []
    assert found["unequal"] == []


def test_scale_is_the_users_and_stays(hybrid: Any) -> None:
    hybrid.kubectl("scale", "workerpool", "small-unified", "--replicas=2")
    hybrid.kubectl(
        "wait",
        "--for=jsonpath={.status.readyReplicas}=2",
        "workerpool/small-unified",
        "--timeout=120s",
    )

    pods = hybrid.get("pods", "-l", "tandem.dev/model=small")["items"]
    hybrid.kubectl("scale", "workerpool", "small-unified", "--replicas=1")

    assert len(pods) == 2


def test_deleting_the_resources_leaves_nothing(hybrid: Any) -> None:
    hybrid.kubectl("delete", "-f", EXAMPLE, "--timeout=120s")

    assert hybrid.left() == []
