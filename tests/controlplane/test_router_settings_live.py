"""On a real control plane: settings reach running router pods within seconds, by the operator's own
rights, and no pod is replaced."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import gateway_kinds
import pod_processes
from eventually import eventually_in_another_process

CHART = str(Path(__file__).resolve().parents[2] / "charts" / "tandem")
NAMESPACE = "settings"
IN = ("--namespace", NAMESPACE)

RESOURCES = """\
apiVersion: tandem.dev/v1alpha1
kind: Router
metadata: {name: chat}
spec:
  replicas: 2
  tiers:
  - {name: mini, external: {url: "http://127.0.0.1:9/v1", model: mini, usdPer1MOutputTokens: "1"}}
  - {name: full, external: {url: "http://127.0.0.1:9/v2", model: full, usdPer1MOutputTokens: "9"}}
  budget: {usdPerHour: "2"}
"""
CHANGE = {
    "spec": {
        "threshold": "0.31",
        "budget": {"usdPerHour": "4"},
        "tenants": [{"name": "team", "usdPerHour": "1"}],
    }
}

ENTRANCE = json.dumps(
    {
        "serviceAnnotations": {"lb.example.com/internal": "true"},
        "ingress": {
            "host": "{router}.{namespace}.example.com",
            "className": "nginx",
            "tlsSecret": "{router}-tls",
            "clusterIssuer": "letsencrypt",
        },
        "httpRoute": {
            "host": "{router}.{namespace}.gateway.example.com",
            "parentRefs": [{"name": "public", "namespace": "gateways"}],
        },
    }
)

# Runs inside the cluster's network: the settings in force in each pod.
ASK = """
import json, sys, httpx
found = []
for host in sys.argv[2:]:
    url = f"http://{host}:8000/admin/state"
    reply = httpx.get(url, headers={"x-tandem-peer-token": sys.argv[1]}, timeout=5, trust_env=False)
    nobody = httpx.get(url, timeout=5, trust_env=False).status_code
    found.append([reply.json()["set_points"]["gain_threshold"], nobody])
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def routed(cluster: Any) -> Iterator[Any]:
    """The chart with its rights, and a Router of two pods over external tiers."""
    gateway_kinds.install(cluster)
    own = f"operator.replicas=1,operator.watchNamespace={NAMESPACE},allow.ownNamespace=true"
    values = ("--set", own, "--set", "allow.externalNetworks={127.0.0.0/8}")
    values = (*values, "--set", "images.pullPolicy=Never", "--set-json", f"routers={ENTRANCE}")
    options = ("--create-namespace", "--take-ownership", "--wait", "--timeout=60s")
    installed = cluster.run("helm", "install", "tandem", CHART, *IN, *values, *options)
    try:
        assert installed.returncode == 0, installed.stderr
        cluster.kubectl("apply", *IN, "-f", "-", stdin=RESOURCES)
        cluster.kubectl("wait", *IN, "--for=condition=Ready", "router/chat", "--timeout=60s")
        cluster.kubectl(
            "wait", *IN, "--for=jsonpath={.status.ready}=2/2", "router/chat", "--timeout=60s"
        )
        yield cluster
    finally:
        cluster.run("kubectl", "delete", "routers", "--all", *IN)
        cluster.run("helm", "uninstall", "tandem", *IN)
        gateway_kinds.remove(cluster)


def router_pods(cluster: Any) -> list[Any]:
    return list(cluster.get("pods", *IN, "-l", "tandem.dev/router=chat")["items"])


def ready_condition(pod: Any) -> Any:
    return next(c for c in pod["status"]["conditions"] if c["type"] == "Ready")


def pods(cluster: Any) -> dict[str, str]:
    """Address of each router pod, by uid."""
    return {pod["metadata"]["uid"]: pod["status"]["podIP"] for pod in router_pods(cluster)}


def test_settings_are_in_force_within_seconds_in_the_same_pods(routed: Any) -> None:
    before = pods(routed)
    secret = routed.get("secret", "tandem-peer-token", *IN)["data"]["token"]
    token = routed.run("sh", "-c", f"echo {secret} | base64 -d").stdout.strip()

    routed.kubectl("patch", *IN, "router/chat", "--type=merge", "-p", json.dumps(CHANGE))
    deadline = time.monotonic() + 20.0  # five on a machine that is not busy with other tests
    seen: Any = None
    while seen != [[0.31, 401], [0.31, 401]] and time.monotonic() < deadline:
        asked = routed.run(*routed.enter, sys.executable, "-c", ASK, token, *before.values())
        seen = json.loads(asked.stdout) if asked.returncode == 0 else asked.stderr

    assert seen == [[0.31, 401], [0.31, 401]]
    assert pods(routed) == before
    events = routed.get("events", *IN)["items"]
    told = [e["message"] for e in events if e["reason"] == "SettingsChanged"]
    assert any("budget.usd_per_hour: 2.0 -> 4.0" in text for text in told)
    assert any("threshold: null -> 0.31" in text for text in told)


def test_router_pods_are_on_different_nodes_and_one_node_alone_will_do(routed: Any) -> None:
    assert {pod["spec"]["nodeName"] for pod in router_pods(routed)} == {"node-0", "node-1"}
    (leaving,) = [p for p in router_pods(routed) if p["spec"]["nodeName"] == "node-1"]
    routed.kubectl("cordon", "node-1")
    try:
        routed.kubectl("delete", "pod", leaving["metadata"]["name"], *IN, "--grace-period=2")
        ready = "--for=jsonpath={.status.ready}=2/2"
        routed.kubectl("wait", *IN, ready, "router/chat", "--timeout=60s")
    finally:
        routed.kubectl("uncordon", "node-1")

    assert [pod["spec"]["nodeName"] for pod in router_pods(routed)] == ["node-0", "node-0"]


def test_routers_that_get_no_cpu_for_a_while_stay_in_the_service(routed: Any) -> None:
    """Both are stopped for ten seconds, as on a machine that gives them nothing: not one of them
    is taken out, since a Service without routers answers nobody."""
    addresses = pods(routed)
    stopped = pod_processes.of(routed, addresses.values(), b"tandem_router")
    assert len(stopped) == len(addresses) == 2
    chosen = ("endpointslices", *IN, "-l", "kubernetes.io/service-name=chat-router")
    each = "-o=jsonpath={range .endpoints[*]}{.conditions.ready} {end}{'\\n'}"
    try:
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        seen = routed.run("kubectl", "get", *chosen, each, "--watch", "--request-timeout=10s")
        states = {state["status"] for state in map(ready_condition, router_pods(routed))}
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)

    assert set(seen.stdout.split()) == {"true"}, seen
    assert states == {"True"}
    healthy = "import sys, httpx; [httpx.get(f'http://{h}:8000/health') for h in sys.argv[1:]]"
    answered = routed.run(sys.executable, "-c", healthy, *addresses.values())
    assert answered.returncode == 0, answered.stderr
    assert pods(routed) == addresses
    for pod in router_pods(routed):
        assert pod["spec"]["containers"][0]["resources"]["requests"]["cpu"] == "500m"


MORE_TIERS = {
    "spec": {
        "tiers": [
            {"name": "mini", "external": {"url": "http://127.0.0.1:9/v1", "model": "mini"}},
            {"name": "extra", "external": {"url": "http://127.0.0.1:9/v3", "model": "extra"}},
        ],
        "cache": {"enabled": True},
        "predictor": {"type": "Length"},
        "replicas": 3,
    }
}
SETTINGS = """
import json, sys, httpx
headers = {"x-tandem-peer-token": sys.argv[1]}
found = []
for host in sys.argv[2:]:
    live = httpx.get(f"http://{host}:8000/admin/settings", headers=headers, trust_env=False).json()
    found.append([[tier["name"] for tier in live["tiers"]], live["cache"]["enabled"]])
print(json.dumps(found))
"""


def told(cluster: Any, reason: str) -> str:
    events = cluster.get("events", *IN)["items"]
    return "\n".join(e["message"] for e in events if e["reason"] == reason)


def test_tiers_come_and_go_in_the_same_pods_and_a_later_pod_reads_the_same(routed: Any) -> None:
    before = pods(routed)
    secret = routed.get("secret", "tandem-peer-token", *IN)["data"]["token"]
    token = routed.run("sh", "-c", f"echo {secret} | base64 -d").stdout.strip()
    wanted = [[["mini", "extra"], True]]

    routed.kubectl("patch", *IN, "router/chat", "--type=merge", "-p", json.dumps(MORE_TIERS))

    def settings(addresses: list[str]) -> Any:
        asked = routed.run(*routed.enter, sys.executable, "-c", SETTINGS, token, *addresses)
        return json.loads(asked.stdout) if asked.returncode == 0 else asked.stderr

    eventually_in_another_process(lambda: settings(list(before.values())) == wanted * 2, 20.0)
    ready = "--for=jsonpath={.status.ready}=3/3"
    routed.kubectl("wait", *IN, ready, "router/chat", "--timeout=60s")
    after = pods(routed)
    later = [address for uid, address in after.items() if uid not in before]

    assert before.items() <= after.items()
    assert settings(later) == wanted
    assert "tiers: mini, full -> mini, extra" in told(routed, "SettingsChanged")
    assert told(routed, "NewPods") == ""


def test_another_config_maps_predictor_is_read_in_the_same_pods(routed: Any) -> None:
    """The artifact moves from no ConfigMap to a broken one and on to a good one."""
    before = pods(routed)
    good = str(Path(CHART).parents[1] / "examples" / "01-hybrid" / "predictor")
    routed.kubectl("create", "configmap", "broken", *IN, "--from-literal=artifact=nothing")
    routed.kubectl("create", "configmap", "good", *IN, f"--from-file=artifact={good}")

    def says(name: str, text: str) -> bool:
        artifact = {"type": "Learned", "artifact": f"configmap://{name}/artifact"}
        change = json.dumps({"spec": {"predictor": artifact}})
        routed.kubectl("patch", *IN, "router/chat", "--type=merge", "-p", change)
        path = '-o=jsonpath={.status.conditions[?(@.type=="PredictorReady")].message}'
        return bool(
            eventually_in_another_process(
                lambda: text in routed.kubectl("get", *IN, "router/chat", path), 60.0
            )
        )

    assert says("missing", "ConfigMap missing does not exist")
    assert says("broken", "the fallback tier answers meanwhile")
    # It is in use: what is said is that it was trained for other tiers.
    assert says("good", "was trained on tiers small, large")
    assert pods(routed) == before
    assert told(routed, "NewPods") == ""


def test_an_event_says_why_there_are_new_pods(routed: Any) -> None:
    change = {"spec": {"resources": {"cpu": "200m"}}}
    routed.kubectl("patch", *IN, "router/chat", "--type=merge", "-p", json.dumps(change))

    said = eventually_in_another_process(lambda: told(routed, "NewPods"), 20.0)

    assert 'resources: {"requests": {"cpu": ' in said


def test_status_says_that_nothing_outlives_the_pods(routed: Any) -> None:
    wanted = '--for=jsonpath={.status.conditions[?(@.type=="Durable")].reason}=NotDurable'
    routed.kubectl("wait", *IN, wanted, "router/chat", "--timeout=60s")


def test_what_lets_requests_in_is_made_with_the_router(routed: Any) -> None:
    ingress = routed.get("ingress", "chat-router", *IN)
    route = routed.get("httproute", "chat-router", *IN)
    service = routed.get("service", "chat-router", *IN)

    assert service["metadata"]["annotations"]["lb.example.com/internal"] == "true"
    host = f"chat.{NAMESPACE}.example.com"
    assert ingress["spec"]["tls"] == [{"hosts": [host], "secretName": "chat-tls"}]
    assert ingress["metadata"]["annotations"]["cert-manager.io/cluster-issuer"] == "letsencrypt"
    (rule,) = ingress["spec"]["rules"]
    backend = rule["http"]["paths"][0]["backend"]["service"]
    assert (rule["host"], backend) == (host, {"name": "chat-router", "port": {"name": "http"}})
    assert route["spec"]["hostnames"] == [f"chat.{NAMESPACE}.gateway.example.com"]
    assert route["spec"]["rules"][0]["backendRefs"][0]["port"] == 8000
    owners = {o["metadata"]["ownerReferences"][0]["name"] for o in (ingress, route)}
    assert owners == {"chat"}
