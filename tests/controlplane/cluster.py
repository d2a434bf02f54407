"""A real control plane in the foreground, in a network namespace of its own.

`cluster.py` prints the kubeconfig and how to enter and runs until Ctrl-C; `--exec COMMAND` runs
one command inside, with kubectl and helm on PATH and KUBECONFIG set, and exits with its status.
"""

from __future__ import annotations

import argparse
import functools
import http.client
import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import binaries
import network
import pki
from control import ControlServer

START_TIMEOUT_S = 60.0
# Where kube-controller-manager makes a folder for each PersistentVolume, without asking.
PROVISIONED = Path("/tmp/hostpath_pv")
CONTROLLERS = (
    "serviceaccount-token-controller",
    "serviceaccount-controller",
    "root-ca-certificate-publisher-controller",
    "clusterrole-aggregation-controller",
    "namespace-controller",
    "garbage-collector-controller",
    "pod-garbage-collector-controller",
    "replicaset-controller",
    "deployment-controller",
    "statefulset-controller",
    "daemonset-controller",
    "job-controller",
    "cronjob-controller",
    "ttl-after-finished-controller",
    "endpointslice-controller",
    "disruption-controller",
    "horizontal-pod-autoscaler-controller",
    "node-lifecycle-controller",
    "taint-eviction-controller",
    "resourcequota-controller",
    "persistentvolume-binder-controller",
    "persistentvolume-protection-controller",
    "persistentvolumeclaim-protection-controller",
)


# The defaults, 20 requests a second, make the controllers wait for themselves.
QUICK_CLIENT = ("--kube-api-qps=500", "--kube-api-burst=1000")


class StartError(RuntimeError):
    """A component did not come up; the message names it and holds its last log lines."""


class ControlPlane:
    """etcd, kube-apiserver, kube-controller-manager and kube-scheduler as child processes.

    Runs inside the namespace that `network.unshare_command` made. `stop` ends everything.
    """

    def __init__(self, binaries: Path, run_dir: Path, num_nodes: int, family: str) -> None:
        self.binaries = binaries
        self.family = family
        self.addresses = network.FAMILIES[family]
        self.run_dir = run_dir
        self.pki = run_dir / "pki"
        self.nodes = {f"node-{i}": self.addresses.node(i) for i in range(num_nodes)}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.killed: set[str] = set()

    @property
    def kubeconfig(self) -> Path:
        return self.pki / "admin.kubeconfig"

    def start(self) -> None:
        if not self.pki.exists():
            pki.make_pki(
                self.pki,
                address=self.addresses.host,
                service_address=self.addresses.service,
                nodes=self.nodes,
            )
        self.start_etcd()
        self.start_apiserver()
        self.make_storage_class()
        self.start_controllers()
        self.start_nodes()
        for name in self.nodes:
            self._wait(name, functools.partial(self._node_is_ready, name))

    def start_etcd(self) -> None:
        self._spawn(
            "etcd",
            f"--data-dir={self.run_dir / 'etcd'}",
            "--unsafe-no-fsync",
            "--log-level=warn",
            "--listen-client-urls=http://127.0.0.1:2379",
            "--advertise-client-urls=http://127.0.0.1:2379",
            "--listen-peer-urls=http://127.0.0.1:2380",
            "--initial-advertise-peer-urls=http://127.0.0.1:2380",
            "--initial-cluster=default=http://127.0.0.1:2380",
        )
        self._wait(
            "etcd", lambda: self._get(http.client.HTTPConnection("127.0.0.1", 2379), "/health")
        )

    def start_apiserver(self) -> None:
        p = self.pki
        self._spawn(
            "kube-apiserver",
            "--etcd-servers=http://127.0.0.1:2379",
            f"--bind-address={self.addresses.host}",
            "--secure-port=6443",
            f"--advertise-address={self.addresses.host}",
            f"--tls-cert-file={p / 'apiserver.crt'}",
            f"--tls-private-key-file={p / 'apiserver.key'}",
            f"--client-ca-file={p / 'ca.crt'}",
            f"--service-cluster-ip-range={self.addresses.service_ranges}",
            "--allow-privileged=true",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={p / 'sa.pub'}",
            f"--service-account-signing-key-file={p / 'sa.key'}",
            "--authorization-mode=Node,RBAC",
            "--enable-admission-plugins=NodeRestriction,OwnerReferencesPermissionEnforcement",
            # There is no kube-proxy: aggregated APIs are reached at their endpoints.
            "--enable-aggregator-routing=true",
            f"--audit-policy-file={self._audit_policy()}",
            f"--audit-log-path={self.run_dir / 'audit.log'}",
            # Five minutes are too long to wait for the pods of a lost node.
            "--default-not-ready-toleration-seconds=2",
            "--default-unreachable-toleration-seconds=2",
            f"--kubelet-client-certificate={p / 'kubelet-client.crt'}",
            f"--kubelet-client-key={p / 'kubelet-client.key'}",
            f"--kubelet-certificate-authority={p / 'ca.crt'}",
            "--kubelet-preferred-address-types=InternalIP",
            f"--requestheader-client-ca-file={p / 'front-proxy-ca.crt'}",
            "--requestheader-allowed-names=front-proxy-client",
            "--requestheader-username-headers=X-Remote-User",
            "--requestheader-group-headers=X-Remote-Group",
            "--requestheader-extra-headers-prefix=X-Remote-Extra-",
            f"--proxy-client-cert-file={p / 'front-proxy-client.crt'}",
            f"--proxy-client-key-file={p / 'front-proxy-client.key'}",
            "--profiling=false",
        )
        self._wait("kube-apiserver", lambda: self._get(self._secure(6443), "/readyz"))

    def _audit_policy(self) -> Path:
        """Log what ServiceAccounts do, except those of Kubernetes itself."""
        rules = [
            {"level": "None", "userGroups": ["system:serviceaccounts:kube-system"]},
            {"level": "Metadata", "userGroups": ["system:serviceaccounts"]},
            {"level": "None"},
        ]
        policy = {
            "apiVersion": "audit.k8s.io/v1",
            "kind": "Policy",
            "omitStages": ["RequestReceived"],
            "rules": rules,
        }
        path = self.run_dir / "audit-policy.json"
        path.write_text(json.dumps(policy))
        return path

    def make_storage_class(self) -> None:
        """The default one: any claim gets a folder that all nodes share."""
        body = {
            "apiVersion": "storage.k8s.io/v1",
            "kind": "StorageClass",
            "metadata": {
                "name": "folder",
                "annotations": {"storageclass.kubernetes.io/is-default-class": "true"},
            },
            "provisioner": "kubernetes.io/host-path",
        }
        path = "/apis/storage.k8s.io/v1/storageclasses"
        headers = {"content-type": "application/json"}
        connection = self._secure(6443)
        try:
            connection.request("POST", path, json.dumps(body), headers)
            reply = connection.getresponse()
            if reply.status not in (201, 409):
                raise StartError(f"StorageClass: {reply.status} {reply.read().decode()}")
        finally:
            connection.close()

    def start_controllers(self) -> None:
        p = self.pki
        kcm = str(p / "kcm.kubeconfig")
        self._spawn(
            "kube-controller-manager",
            f"--kubeconfig={kcm}",
            f"--authentication-kubeconfig={kcm}",
            f"--authorization-kubeconfig={kcm}",
            "--bind-address=127.0.0.1",
            "--leader-elect=false",
            "--use-service-account-credentials=true",
            f"--service-account-private-key-file={p / 'sa.key'}",
            f"--root-ca-file={p / 'ca.crt'}",
            "--enable-hostpath-provisioner=true",
            "--node-monitor-period=1s",
            "--node-monitor-grace-period=12s",
            "--horizontal-pod-autoscaler-sync-period=1s",
            *QUICK_CLIENT,
            f"--controllers={','.join(CONTROLLERS)}",
        )
        scheduler = str(p / "scheduler.kubeconfig")
        self._spawn(
            "kube-scheduler",
            f"--kubeconfig={scheduler}",
            f"--authentication-kubeconfig={scheduler}",
            f"--authorization-kubeconfig={scheduler}",
            "--bind-address=127.0.0.1",
            "--leader-elect=false",
            *QUICK_CLIENT,
        )

    def start_nodes(self) -> None:
        for name in self.nodes:
            self.start_node(name)

    def start_node(self, name: str) -> None:
        """A process node, which offers 8 GPUs that do not exist."""
        with open(self.run_dir / f"{name}.log", "ab") as log:
            command = [
                sys.executable,
                str(Path(__file__).resolve().parent / "kubelet.py"),
                f"--server=https://{network.url_host(self.addresses.host)}:6443",
                f"--family={self.family}",
                f"--pki={self.pki}",
                f"--folder={self.run_dir / name}",
                f"--name={name}",
                f"--address={self.nodes[name]}",
                f"--subnet={16 * (list(self.nodes).index(name) + 1)}",
            ]
            self.processes[name] = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )

    def kill_one(self, name: str) -> None:
        """End a component or a node without any warning; a node's containers end with it."""
        process = self.processes[name]
        self.killed.add(name)
        process.kill()
        process.wait()

    def start_one(self, name: str) -> None:
        """Start what was killed, as it was: the same data, certificates and addresses."""
        if name not in self.killed:
            raise RuntimeError("runs already")
        if name == "kube-apiserver":
            self.start_apiserver()
        else:
            self.start_node(name)
        self.killed.discard(name)

    def stop(self) -> None:
        """End every component; the apiserver would drain watches for a minute, so it is killed."""
        nodes = [self.processes[name] for name in self.nodes if name in self.processes]
        for node in nodes:
            node.terminate()
        for node in nodes:
            try:
                node.wait(timeout=10)
            except subprocess.TimeoutExpired:
                node.kill()
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()
        for process in self.processes.values():
            process.wait()

    def exited(self) -> str | None:
        """The name of a component that has ended by itself, or None."""
        ended = (name for name, p in self.processes.items() if p.poll() is not None)
        return next((name for name in ended if name not in self.killed), None)

    def _spawn(self, name: str, *arguments: str) -> None:
        with open(self.run_dir / f"{name}.log", "ab") as log:
            self.processes[name] = subprocess.Popen(
                [str(self.binaries / name), *arguments],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
            )

    def _wait(self, name: str, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and self.processes[name].poll() is None:
            if ready():
                return
            time.sleep(0.1)
        log = (self.run_dir / f"{name}.log").read_text(errors="replace").splitlines()
        raise StartError(f"{name} did not become ready:\n" + "\n".join(log[-15:]))

    def _node_is_ready(self, name: str) -> bool:
        connection = self._secure(6443)
        try:
            connection.request("GET", f"/api/v1/nodes/{name}")
            reply = connection.getresponse()
            node = json.loads(reply.read())
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()
        if reply.status != 200:
            return False
        conditions = node.get("status", {}).get("conditions", [])
        return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)

    def _secure(self, port: int) -> http.client.HTTPSConnection:
        context = ssl.create_default_context(cafile=str(self.pki / "ca.crt"))
        context.load_cert_chain(self.pki / "admin.crt", self.pki / "admin.key")
        return http.client.HTTPSConnection(self.addresses.host, port, context=context, timeout=5)

    @staticmethod
    def _get(connection: http.client.HTTPConnection, path: str) -> bool:
        try:
            connection.request("GET", path)
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()


def run_inside(arguments: argparse.Namespace) -> int:
    """What happens in the namespace: start everything, then wait or run one command."""
    network.configure_loopback(network.FAMILIES[arguments.family])
    run_dir = Path(arguments.run_dir)
    network.keep_in(run_dir / "volumes", PROVISIONED)
    tools = binaries.installed(binaries.RELEASES[arguments.kubernetes])
    if tools is None:
        print("cluster: run tests/controlplane/binaries.py first", file=sys.stderr)
        return 1
    plane = ControlPlane(tools, run_dir, arguments.nodes, arguments.family)
    stopping = False

    def stop(*_: object) -> None:
        nonlocal stopping
        stopping = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    try:
        plane.start()
        venv_bin = str(Path(sys.executable).parent)
        path = os.pathsep.join([str(tools), venv_bin, os.environ.get("PATH", "/usr/bin:/bin")])
        # All clusters have one address; what one of them serves is not for the others.
        cache = str(run_dir / "kubectl-cache")
        settings = {"PATH": path, "KUBECONFIG": str(plane.kubeconfig), "KUBECACHEDIR": cache}
        env = {**os.environ, **settings}
        if arguments.exec:
            return subprocess.run(["bash", "-c", arguments.exec], env=env).returncode
        control = ControlServer(run_dir, {"kill": plane.kill_one, "start": plane.start_one})
        ready = {"pid": os.getpid(), "kubeconfig": str(plane.kubeconfig), "binaries": str(tools)}
        partial = run_dir / "ready.partial"
        partial.write_text(json.dumps(ready))
        partial.rename(run_dir / "ready.json")
        enter = " ".join(network.enter_command(os.getpid()))
        print(
            "cluster: ready\n"
            "its network is its own; a shell inside it, for a second terminal:\n"
            f"  {enter} env KUBECONFIG={plane.kubeconfig} KUBECACHEDIR={cache} "
            f'PATH="{tools}:{venv_bin}:$PATH" bash\n'
            "Ctrl-C here stops the cluster",
            flush=True,
        )
        while not stopping:
            name = plane.exited()
            if name:
                print(f"cluster: {name} ended; its log is {run_dir / name}.log", file=sys.stderr)
                return 1
            control.serve_one(0.2)
        return 0
    except StartError as error:
        print(f"cluster: {error}", file=sys.stderr)
        return 1
    finally:
        plane.stop()


def main() -> int:
    parser = argparse.ArgumentParser(prog="cluster", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--exec", metavar="COMMAND", help="run COMMAND inside and exit with its status"
    )
    parser.add_argument("--run-dir", help="where state and logs go (default: a temporary folder)")
    parser.add_argument("--nodes", type=int, default=2, help="process nodes to start (default: 2)")
    parser.add_argument(
        "--family",
        choices=network.FAMILIES,
        default="ipv4",
        help="addresses of pods, nodes and Services: ipv4 (default), ipv6, or dual for both",
    )
    parser.add_argument(
        "--kubernetes",
        choices=binaries.RELEASES,
        default=binaries.NEWEST.minor,
        help=f"release to run (default: {binaries.NEWEST.minor})",
    )
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        return run_inside(arguments)
    try:
        binaries.build(binaries.RELEASES[arguments.kubernetes])
    except binaries.BuildError as error:
        print(f"cluster: {error}", file=sys.stderr)
        return 1
    temporary = arguments.run_dir is None
    run_dir = Path(arguments.run_dir or tempfile.mkdtemp(prefix="tandem-cluster-"))
    run_dir.mkdir(parents=True, exist_ok=True)
    command = [
        *network.unshare_command(),
        sys.executable,
        __file__,
        "--inside",
        "--run-dir",
        str(run_dir),
        "--nodes",
        str(arguments.nodes),
        "--family",
        arguments.family,
        "--kubernetes",
        arguments.kubernetes,
    ]
    if arguments.exec:
        command += ["--exec", arguments.exec]
    process = subprocess.Popen(command)
    # Ctrl-C reaches the whole foreground group; SIGTERM is passed on.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    status = process.wait()
    if temporary:
        shutil.rmtree(run_dir, ignore_errors=True)
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main())
