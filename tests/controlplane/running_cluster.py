"""A running control plane as tests use it: commands inside, kills, and what it was asked."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import audit
import binaries
import control
import network
from eventually import eventually_in_another_process

HERE = Path(__file__).resolve().parent
CLUSTER = HERE / "cluster.py"
CLIENT = HERE / "client.py"
START_TIMEOUT_S = 90.0


@dataclass(frozen=True)
class Cluster:
    """A running control plane; commands run inside its network namespace."""

    enter: tuple[str, ...]
    env: dict[str, str]
    run_dir: Path
    # What `kill` ended and nobody has started again.
    down: set[str] = field(default_factory=set)

    def run(
        self, *command: str, stdin: str | None = None, timeout_s: float = 60.0
    ) -> subprocess.CompletedProcess[str]:
        """Run a command inside and return it, whatever its status."""
        return subprocess.run(
            [*self.enter, *command],
            env=self.env,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )

    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        """Output of a kubectl command that has to succeed."""
        result = self.run("kubectl", *arguments, stdin=stdin)
        assert result.returncode == 0, f"kubectl {' '.join(arguments)}: {result.stderr}"
        return result.stdout

    @contextmanager
    def asking(self, selector: str, *models: str, concurrency: int = 3) -> Iterator[dict[str, Any]]:
        """Steady requests to the routers of a Service while the body runs.

        The summary that `client.py` prints is in the dictionary when the body has ended.
        """
        found: dict[str, Any] = {}
        client = subprocess.Popen(
            [*self.enter, sys.executable, str(CLIENT), selector, "0", str(concurrency), *models],
            env=self.env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            # The client prints a line when every one of its askers has got its first answer.
            assert client.stdout is not None
            first = client.stdout.readline()
            assert first == "answered\n", client.communicate()[1]
            yield found
            out, err = client.communicate(input="", timeout=120.0)
            assert client.returncode == 0, err
            found.update(json.loads(out))
        finally:
            client.kill()
            client.wait()

    def kill(self, name: str) -> None:
        """SIGKILL to a component, or to a node with all its containers."""
        control.ask(self.run_dir, "kill", name)
        self.down.add(name)

    def start(self, name: str) -> None:
        """Start again what `kill` ended."""
        control.ask(self.run_dir, "start", name)
        self.down.discard(name)

    def requests(self, namespace: str, account: str) -> list[Any]:
        """What a ServiceAccount has asked the apiserver for so far; see audit.py."""
        return audit.requests(self.run_dir, namespace, account)

    def get(self, *arguments: str) -> Any:
        """What `kubectl get -o json` returns."""
        return json.loads(self.kubectl("get", *arguments, "-o", "json"))

    def left(self, timeout_s: float = 120.0) -> list[str]:
        """What is still in the default namespace once garbage collection had its time."""
        kinds = (
            "deployments,replicasets,services,pods,workerpools,poddisruptionbudgets,networkpolicies"
        )

        def there() -> list[str]:
            found = [f"{i['kind']}/{i['metadata']['name']}" for i in self.get(kinds)["items"]]
            return [name for name in found if name != "Service/kubernetes"]

        with contextlib.suppress(AssertionError):
            eventually_in_another_process(lambda: not there(), timeout_s, 0.5)
        return there()


@contextmanager
def operating(cluster: Cluster, namespace: str, *flags: str) -> Iterator[None]:
    """A namespace of its own, with an operator that is no pod; both are gone afterwards."""
    cluster.kubectl("create", "namespace", namespace)
    command = ["-m", "tandem_operator", "--namespace", namespace, *flags]
    command += ["--kubeconfig", cluster.env["KUBECONFIG"], "--port", "0"]
    with open(cluster.run_dir / f"{namespace}-operator.log", "wb") as out:
        operator = subprocess.Popen(
            [*cluster.enter, sys.executable, *command],
            env={**cluster.env, "POD_IP": "127.0.0.1"},
            stdout=out,
            stderr=out,
            stdin=subprocess.DEVNULL,
        )
    try:
        yield
    finally:
        cluster.run("kubectl", "delete", "models,workerpools", "--all", "-n", namespace)
        operator.terminate()
        operator.wait(timeout=30)
        cluster.run("kubectl", "delete", "namespace", namespace, "--wait=false")


@contextmanager
def run_cluster(run_dir: Path, *options: str, release: binaries.Release) -> Iterator[Cluster]:
    """A control plane of its own. options: of cluster.py."""
    log = run_dir / "cluster.log"
    command = [sys.executable, str(CLUSTER), "--run-dir", str(run_dir), *options]
    command += ["--kubernetes", release.minor]
    with open(log, "wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True
        )
    try:
        ready = run_dir / "ready.json"
        binaries.build(release)
        eventually_in_another_process(
            ready.exists,
            START_TIMEOUT_S,
            told=lambda: log.read_text(errors="replace"),
            process=process,
        )
        facts = json.loads(ready.read_text())
        path = os.pathsep.join([facts["binaries"], os.environ.get("PATH", "/usr/bin:/bin")])
        yield Cluster(
            enter=tuple(network.enter_command(facts["pid"])),
            env={
                **os.environ,
                "PATH": path,
                "KUBECONFIG": facts["kubeconfig"],
                # All clusters have one address; what one of them serves is not for the others.
                "KUBECACHEDIR": str(run_dir / "kubectl-cache"),
            },
            run_dir=run_dir,
        )
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(timeout=30)
