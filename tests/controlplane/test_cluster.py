"""The control plane of the tests is a real one, on a network of its own."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

CLUSTER = Path(__file__).resolve().parent / "cluster.py"


def test_a_real_apiserver_answers_with_its_version(cluster) -> None:
    assert "Server Version: v1.36" in cluster.kubectl("version")


def test_controllers_run(cluster) -> None:
    """The default ServiceAccount of a new namespace is made by the controller manager."""
    cluster.kubectl("create", "namespace", "controllers-run")

    cluster.kubectl(
        "wait", "--for=create", "serviceaccount/default", "-n", "controllers-run", "--timeout=30s"
    )


def test_endpoint_addresses_of_the_cluster_range_are_reachable_inside(cluster) -> None:
    code = (
        "import socket; s = socket.create_server(('10.77.3.4', 0)); "
        "socket.create_connection(s.getsockname(), timeout=5); print('reached')"
    )

    assert cluster.run(sys.executable, "-c", code).stdout == "reached\n"


def test_exec_runs_one_command_and_exits_with_its_status(cluster, tmp_path: Path) -> None:
    command = [sys.executable, str(CLUSTER), "--run-dir", str(tmp_path / "run")]

    result = subprocess.run(
        [
            *command,
            "--exec",
            "kubectl get namespace default -o name && helm version --short"
            " && kubectl get nodes --no-headers | awk '{print $1, $2}'; exit 7",
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )

    assert result.returncode == 7, result.stderr
    assert result.stdout.startswith("namespace/default\nv4.")
    assert result.stdout.endswith("\nnode-0 Ready\nnode-1 Ready\n")


def test_a_pod_runs_as_a_process_and_its_log_can_be_read(cluster) -> None:
    script = (
        "import os, pathlib, time; "
        "account = pathlib.Path('/var/run/secrets/kubernetes.io/serviceaccount'); "
        "print('address', os.environ['MY_IP'], (account / 'namespace').read_text(), "
        "sorted(p.name for p in account.iterdir()), flush=True); "
        "time.sleep(600)"
    )
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "hello"},
        "spec": {
            "terminationGracePeriodSeconds": 1,
            "containers": [
                {
                    "name": "main",
                    "image": "python",
                    "command": ["python", "-c", script],
                    "env": [
                        {"name": "MY_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}
                    ],
                }
            ],
        },
    }
    cluster.kubectl("wait", "--for=create", "serviceaccount/default", "--timeout=30s")

    cluster.kubectl("create", "-f", "-", stdin=json.dumps(pod))
    cluster.kubectl("wait", "--for=condition=Ready", "pod/hello", "--timeout=30s")
    log = cluster.kubectl("logs", "hello")
    cluster.kubectl("delete", "pod", "hello", "--timeout=30s")

    assert log.startswith("address 10.77.")
    assert log.endswith("default ['ca.crt', 'namespace', 'token']\n")
    assert not Path("/var/run/secrets/kubernetes.io").exists()
    assert cluster.run("kubectl", "get", "pod", "hello").returncode == 1


def test_a_cluster_that_is_told_to_end_leaves_nothing_running(tmp_path: Path) -> None:
    command = [sys.executable, str(CLUSTER), "--run-dir", str(tmp_path / "run"), "--nodes", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "cluster: ready\n"
        inside = json.loads((tmp_path / "run" / "ready.json").read_text())["pid"]

        process.send_signal(signal.SIGTERM)

        assert process.wait(timeout=30) == 0
    assert not Path(f"/proc/{inside}").exists()
