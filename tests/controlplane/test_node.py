"""A process node does for its pods what a kubelet does, asked through the real apiserver."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from eventually import eventually_in_another_process
from tandem_operator.resources.base import Object

NAMESPACE = "node"
TOKEN = "/var/run/secrets/kubernetes.io/serviceaccount"


@pytest.fixture(scope="module")
def node(cluster: Any) -> Iterator[Any]:
    """The cluster with a namespace of this file's own."""
    cluster.kubectl("create", "namespace", NAMESPACE)
    cluster.kubectl("wait", "--for=create", "serviceaccount/default", "-n", NAMESPACE)
    yield cluster
    cluster.kubectl("delete", "namespace", NAMESPACE, "--wait=false")


def python(script: str, **container: Any) -> Object:
    return {
        "name": "main",
        "image": "python",
        "command": ["python", "-u", "-c", script],
    } | container


def pod(name: str, *containers: Object, **spec: Any) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": NAMESPACE, "labels": {"app": name}},
        "spec": {"containers": list(containers), "terminationGracePeriodSeconds": 1, **spec},
    }


def create(cluster: Any, *objects: Object) -> None:
    text = json.dumps({"apiVersion": "v1", "kind": "List", "items": list(objects)})
    cluster.kubectl("create", "-f", "-", stdin=text)


def kubectl(cluster: Any, *arguments: str) -> str:
    return str(cluster.kubectl("-n", NAMESPACE, *arguments))


def wait(cluster: Any, name: str, condition: str) -> None:
    kubectl(cluster, "wait", f"--for={condition}", f"pod/{name}", "--timeout=45s")


def until(what: str, condition: Callable[[], bool], timeout_s: float = 45.0) -> None:
    eventually_in_another_process(condition, timeout_s, 0.2, lambda: what)


def test_a_node_tells_its_capacity_and_keeps_its_lease(node: Any) -> None:
    def renewed() -> str:
        lease = node.get("lease", "node-0", "-n", "kube-node-lease")
        return str(lease["spec"]["renewTime"])

    found = node.get("node", "node-0")["status"]
    before = renewed()
    until("the lease is renewed", lambda: renewed() > before)

    assert found["capacity"]["nvidia.com/gpu"] == found["allocatable"]["nvidia.com/gpu"] == "8"
    assert {"type": "InternalIP", "address": "10.77.0.10"} in found["addresses"]
    # Where the node was silent for a moment, the controller adds conditions that it does not know.
    assert ("Ready", "True") in [(c["type"], c["status"]) for c in found["conditions"]]


def test_gpus_go_to_one_pod_each_and_too_many_are_not_scheduled(node: Any) -> None:
    script = "import os, time; print(os.environ['CUDA_VISIBLE_DEVICES']); time.sleep(600)"

    def asking(name: str, count: int) -> Object:
        limits = {"nvidia.com/gpu": str(count)}
        return pod(name, python(script, resources={"limits": limits}), nodeName="node-0")

    create(node, asking("five", 5), asking("three", 3))
    greedy = asking("nine", 9)
    del greedy["spec"]["nodeName"]
    create(node, greedy)
    for name in ("five", "three"):
        wait(node, name, "condition=Ready")
    given = [kubectl(node, "logs", name).strip().split(",") for name in ("five", "three")]
    wait(node, "nine", "condition=PodScheduled=False")
    conditions = node.get("pod", "nine", "-n", NAMESPACE)["status"]["conditions"]
    kubectl(node, "delete", "pod", "five", "three", "nine")

    assert [len(ids) for ids in given] == [5, 3]
    assert len({i for ids in given for i in ids}) == 8
    assert "Insufficient nvidia.com/gpu" in conditions[0]["message"]


def test_environment_and_volumes_are_as_the_manifest_says(node: Any) -> None:
    """Every source of the environment; every kind of volume at its real path."""
    script = f"""
import json, os, pathlib, sys, time
files = ("/etc/settings/a.txt", "/etc/keys/k", "/etc/pod/name", "/scratch/from-init", "/data/kept")
try:
    pathlib.Path("/etc/settings/new").write_text("x")
    writable = True
except OSError:
    writable = False
print(json.dumps({{
    "env": {{k: v for k, v in os.environ.items() if k.startswith("MY_")}},
    "files": {{f: pathlib.Path(f).read_text() for f in files}},
    "token": pathlib.Path("{TOKEN}/token").read_text().count("."),
    "writable": writable,
}}))
time.sleep(600)
"""
    write = (
        "import pathlib\n"
        "for path in ('/scratch/from-init', '/data/kept'): pathlib.Path(path).write_text('by init')"
    )
    shared = [
        {"name": "scratch", "mountPath": "/scratch"},
        {"name": "data", "mountPath": "/data"},
    ]

    def ref(kind: str, name: str, key: str) -> Object:
        return {"valueFrom": {kind: {"name": name, "key": key}}}

    def field(path: str) -> Object:
        return {"valueFrom": {"fieldRef": {"fieldPath": path}}}

    main = python(
        script,
        env=[
            {"name": "MY_VALUE", "value": "plain"},
            {"name": "MY_EXPANDED", "value": "$(MY_VALUE)/x"},
            {"name": "MY_CONFIG", **ref("configMapKeyRef", "settings", "a.txt")},
            {"name": "MY_SECRET", **ref("secretKeyRef", "keys", "k")},
            {"name": "MY_NODE", **field("spec.nodeName")},
            {"name": "MY_LABEL", **field("metadata.labels['app']")},
        ],
        envFrom=[{"prefix": "MY_ALL_", "configMapRef": {"name": "settings"}}],
        volumeMounts=[
            *shared,
            {"name": "settings", "mountPath": "/etc/settings", "readOnly": True},
            {"name": "keys", "mountPath": "/etc/keys", "readOnly": True},
            {"name": "pod", "mountPath": "/etc/pod", "readOnly": True},
        ],
    )
    reader = "import pathlib, time; print(pathlib.Path('/data/kept').read_text()); time.sleep(600)"
    claim = {"name": "data", "persistentVolumeClaim": {"claimName": "data"}}
    projected = [
        {"downwardAPI": {"items": [{"path": "name", "fieldRef": {"fieldPath": "metadata.name"}}]}}
    ]
    meta = {"namespace": NAMESPACE}
    create(
        node,
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {**meta, "name": "settings"},
            "data": {"a.txt": "from a map"},
        },
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {**meta, "name": "keys"},
            "data": {"k": base64.b64encode(b"from a secret").decode()},
        },
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {**meta, "name": "data"},
            "spec": {
                "accessModes": ["ReadWriteOnce"],
                "resources": {"requests": {"storage": "1Mi"}},
            },
        },
        pod(
            "volumes",
            main,
            nodeName="node-0",
            initContainers=[{**python(write), "name": "first", "volumeMounts": shared}],
            volumes=[
                {"name": "scratch", "emptyDir": {}},
                claim,
                {"name": "settings", "configMap": {"name": "settings"}},
                {"name": "keys", "secret": {"secretName": "keys"}},
                {"name": "pod", "projected": {"sources": projected}},
            ],
        ),
    )
    wait(node, "volumes", "condition=Ready")
    create(
        node,
        pod("reader", python(reader, volumeMounts=shared[1:]), nodeName="node-1", volumes=[claim]),
    )
    found = json.loads(kubectl(node, "logs", "volumes", "-c", "main"))
    wait(node, "reader", "condition=Ready")
    elsewhere = kubectl(node, "logs", "reader")
    change = json.dumps({"data": {"a.txt": "changed"}})
    kubectl(node, "patch", "configmap", "settings", "--type=merge", "-p", change)
    kubectl(node, "annotate", "pod", "volumes", "look=again")
    show = ("exec", "volumes", "-c", "main", "--", "cat", "/etc/settings/a.txt")
    until("the change is seen", lambda: kubectl(node, *show) == "changed")
    kubectl(node, "delete", "pod", "volumes", "reader")

    assert found["env"] == {
        "MY_VALUE": "plain",
        "MY_EXPANDED": "plain/x",
        "MY_CONFIG": "from a map",
        "MY_SECRET": "from a secret",
        "MY_NODE": "node-0",
        "MY_LABEL": "volumes",
        "MY_ALL_a.txt": "from a map",
    }
    assert found["files"] == {
        "/etc/settings/a.txt": "from a map",
        "/etc/keys/k": "from a secret",
        "/etc/pod/name": "volumes",
        "/scratch/from-init": "by init",
        "/data/kept": "by init",
    }
    assert found["token"] == 2
    assert not found["writable"]
    assert elsewhere == "by init\n"


def test_probes_decide_over_readiness_and_restarts(node: Any) -> None:
    """Ready once the file is there; restarted once the other one is."""
    script = "import time; print('run'); time.sleep(600)"
    there = {"exec": {"command": ["test", "-e", "/state/ready"]}, "periodSeconds": 1}
    well = {"exec": {"command": ["test", "!", "-e", "/state/ill"]}, "periodSeconds": 1}
    main = python(
        script,
        readinessProbe={**there, "failureThreshold": 1},
        livenessProbe={**well, "failureThreshold": 1},
        volumeMounts=[{"name": "state", "mountPath": "/state"}],
    )
    create(node, pod("probed", main, volumes=[{"name": "state", "emptyDir": {}}]))

    def status() -> Object:
        found: Object = node.get("pod", "probed", "-n", NAMESPACE)["status"]["containerStatuses"][0]
        return found

    wait(node, "probed", "jsonpath={.status.phase}=Running")
    before = status()["ready"]
    kubectl(node, "exec", "probed", "--", "touch", "/state/ready")
    wait(node, "probed", "condition=Ready")
    kubectl(node, "exec", "probed", "--", "touch", "/state/ill")
    until("the container is restarted", lambda: status()["restartCount"] > 0)
    kubectl(node, "exec", "probed", "--", "rm", "/state/ill")
    kubectl(node, "delete", "pod", "probed", "--wait=false")

    assert before is False


def test_a_crashing_container_backs_off_and_keeps_its_last_log(node: Any) -> None:
    script = "import time; print('run', time.time_ns()); raise SystemExit(3)"
    create(node, pod("crashing", python(script)))

    def status() -> Object:
        found: Object = node.get("pod", "crashing", "-n", NAMESPACE)["status"]
        return (found.get("containerStatuses") or [{}])[0]

    until(
        "it backs off",
        lambda: status().get("state", {}).get("waiting", {}).get("reason") == "CrashLoopBackOff",
    )
    last = status()["lastState"]["terminated"]
    until("it is started again", lambda: status()["restartCount"] >= 2)
    previous = kubectl(node, "logs", "crashing", "--previous")
    kubectl(node, "delete", "pod", "crashing", "--wait=false")

    assert last["exitCode"] == 3
    assert previous.startswith("run ")
    assert previous.count("\n") == 1


def test_logs_are_followed_to_the_end_and_cut_to_the_tail(node: Any) -> None:
    script = "import time\nfor i in range(8): print('line', i); time.sleep(0.2)"
    create(node, pod("talking", python(script), restartPolicy="Never"))
    wait(node, "talking", "jsonpath={.status.phase}=Running")

    followed = kubectl(node, "logs", "-f", "talking")
    wait(node, "talking", "jsonpath={.status.phase}=Succeeded")
    tail = kubectl(node, "logs", "talking", "--tail=2")
    kubectl(node, "delete", "pod", "talking", "--wait=false")

    assert followed == "".join(f"line {i}\n" for i in range(8))
    assert tail == "line 6\nline 7\n"


@pytest.fixture
def sleeper(node: Any) -> Iterator[str]:
    create(node, pod("sleeper", python("import time; time.sleep(600)")))
    wait(node, "sleeper", "condition=Ready")
    yield "sleeper"
    kubectl(node, "delete", "pod", "sleeper", "--wait=false")


def test_exec_gives_output_errors_input_and_exit_status(node: Any, sleeper: str) -> None:
    execute = ("kubectl", "-n", NAMESPACE, "exec")
    script = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(7)"

    failing = node.run(*execute, sleeper, "--", "python", "-c", script)
    fed = node.run(*execute, "-i", sleeper, "--", "wc", "-c", stdin="x" * 300_000)
    unknown = node.run(*execute, sleeper, "-c", "other", "--", "true")
    older = node.run(
        "env", "KUBECTL_REMOTE_COMMAND_WEBSOCKETS=false", *execute, sleeper, "--", "true"
    )

    assert (failing.returncode, failing.stdout) == (7, "out\n")
    assert failing.stderr == "err\ncommand terminated with exit code 7\n"
    assert (fed.returncode, fed.stdout.strip()) == (0, "300000")
    assert "container other is not valid for pod sleeper" in unknown.stderr
    assert "this node speaks WebSocket with v5.channel.k8s.io" in older.stderr


def test_port_forward_carries_several_connections_and_says_which_port_is_closed(node: Any) -> None:
    serve = (
        "import http.server as h, os; "
        "h.test(h.SimpleHTTPRequestHandler, port=8099, bind=os.environ['IP'])"
    )
    served = pod("web", python(serve))
    served["spec"]["containers"][0]["env"] = [
        {"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}
    ]
    create(node, served)
    wait(node, "web", "condition=Ready")
    script = (
        f"kubectl -n {NAMESPACE} port-forward pod/web 18099:8099 18100:1 >log 2>&1 & "
        "until grep -q 18100 log; do sleep 0.1; done; "
        "get='curl -s --noproxy *'; "
        'for i in 1 2 3; do $get -f -o out$i http://127.0.0.1:18099/ & p="$p $!"; done; '
        "wait $p && cat out1 out2 out3 | grep -c 'Directory listing'; "
        "$get http://127.0.0.1:18100/; kill %1; cat log"
    )
    result = node.run("bash", "-c", f"set -f; cd $(mktemp -d); {script}")
    kubectl(node, "delete", "pod", "web", "--wait=false")

    assert result.stdout.startswith("6\n"), result.stdout + result.stderr
    assert "port 1 of the pod is not reached" in result.stdout


def test_a_deleted_pod_runs_its_hook_and_ends_within_its_grace_period(
    node: Any, tmp_path: Any
) -> None:
    """preStop first, then SIGTERM; what ignores SIGTERM is killed when the time is over."""
    story = tmp_path / "story"
    script = (
        "import pathlib, signal, sys, time\n"
        "def told(*_):\n"
        "    with open('/story/story', 'a') as f: f.write('SIGTERM ')\n"
        "    if sys.argv[1:] == ['obey']: sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, told)\n"
        "print('up')\n"
        "while True: time.sleep(0.1)\n"
    )
    hook = {"preStop": {"exec": {"command": ["sh", "-c", "printf 'hook ' >> /story/story"]}}}
    mounts = [{"name": "story", "mountPath": "/story"}]
    volumes = [{"name": "story", "hostPath": {"path": str(tmp_path)}}]
    told = []
    for name, arguments, grace in (("obeys", ["obey"], 30), ("ignores", [], 2)):
        main = python(script, args=arguments, lifecycle=hook, volumeMounts=mounts)
        create(node, pod(name, main, volumes=volumes, terminationGracePeriodSeconds=grace))
        until(
            "it is up",
            lambda name=name: "up" in node.run("kubectl", "-n", NAMESPACE, "logs", name).stdout,
        )
        started = time.monotonic()
        kubectl(node, "delete", "pod", name, "--timeout=25s")
        told.append((story.read_text(), time.monotonic() - started >= grace))
        story.unlink()

    assert told == [("hook SIGTERM ", False), ("hook SIGTERM ", True)]


def test_an_evicted_pod_ends_and_budgets_are_honoured(node: Any) -> None:
    create(
        node,
        pod("evicted", python("import time; time.sleep(600)")),
        {
            "apiVersion": "policy/v1",
            "kind": "PodDisruptionBudget",
            "metadata": {"name": "evicted", "namespace": NAMESPACE},
            "spec": {"minAvailable": 1, "selector": {"matchLabels": {"app": "evicted"}}},
        },
    )
    wait(node, "evicted", "condition=Ready")
    body = json.dumps(
        {
            "apiVersion": "policy/v1",
            "kind": "Eviction",
            "metadata": {"name": "evicted", "namespace": NAMESPACE},
        }
    )
    path = f"/api/v1/namespaces/{NAMESPACE}/pods/evicted/eviction"
    evict = ("kubectl", "create", "--raw", path, "-f", "-")

    refused = node.run(*evict, stdin=body)
    kubectl(node, "delete", "poddisruptionbudget", "evicted")
    allowed = node.run(*evict, stdin=body)
    kubectl(node, "wait", "--for=delete", "pod/evicted", "--timeout=30s")

    assert refused.returncode == 1
    assert "disruption budget" in refused.stderr
    assert allowed.returncode == 0, allowed.stderr


def test_an_image_without_a_command_of_ours_is_told(node: Any) -> None:
    create(node, pod("foreign", {"name": "main", "image": "registry.example/nginx:1"}))

    wait(
        node, "foreign", "jsonpath={.status.containerStatuses[0].state.waiting.reason}=ErrImagePull"
    )
    waiting = node.get("pod", "foreign", "-n", NAMESPACE)["status"]["containerStatuses"][0]["state"]
    kubectl(node, "delete", "pod", "foreign", "--wait=false")

    message = waiting["waiting"]["message"]
    assert "image 'registry.example/nginx:1' has no local command; use one of" in message
    assert "tandem/operator" in message
