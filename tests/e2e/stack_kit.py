"""The whole system as a user starts it: `tandem up examples/01-hybrid` in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eventually import eventually_in_another_process

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "01-hybrid"
READY_TIMEOUT_S = 240.0


def tandem_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "tandem_operator.cli", *arguments]


@dataclass
class Stack:
    """One running `tandem up`."""

    process: subprocess.Popen[bytes]
    name: str
    env: dict[str, str]
    log: Path
    url: str = ""
    extra: dict[str, Any] = field(default_factory=dict)

    def tandem(self, command: str, *arguments: str, ok: bool = True) -> str:
        """Output of a command that talks to this cluster."""
        result = subprocess.run(
            tandem_command(command, *arguments, "--cluster", self.name),
            env=self.env,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (result.returncode == 0) == ok, result.stdout + result.stderr
        return result.stdout + result.stderr

    def get(self, kind: str, name: str | None = None) -> Any:
        return json.loads(self.tandem("get", kind, *([name] if name else []), "-o", "json"))

    def pods(self) -> dict[str, dict[str, Any]]:
        """Pods by component: small, prefill, decode, router."""
        found = {}
        for pod in self.get("pods")["items"]:
            labels = pod["metadata"]["labels"]
            role = labels.get("tandem.dev/role", "router")
            found["small" if role == "unified" else role] = pod
        return found

    def wait_ready(self, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Until every Model and Router is Ready."""

        def is_ready() -> bool:
            objects = [*self.get("models")["items"], *self.get("routers")["items"]]
            conditions = [c for o in objects for c in (o.get("status") or {}).get("conditions", [])]
            ready = [c["status"] for c in conditions if c["type"] == "Ready"]
            return len(ready) == len(objects) and set(ready) == {"True"}

        eventually_in_another_process(is_ready, timeout_s, 0.2, lambda: self.tandem("get"))


def process_of(pod: dict[str, Any]) -> int:
    """The process of a pod's container, found by the POD_IP in its environment.

    Engines start helpers with the same environment: the container's own process is the oldest.
    """
    wanted = f"POD_IP={pod['status']['podIP']}".encode()
    own = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                variables = (entry / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if wanted in variables:
                own.append(int(entry.name))
    assert own, f"pod {pod['metadata']['name']} has no process"
    return min(own)


def processes_below(folder: Path) -> list[str]:
    """Command lines of processes that name a folder, to find what was left behind."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if str(folder) in line:
                found.append(line)
    return found


def start(
    folder: Path, name: str, *arguments: str, example: Path = EXAMPLE, router: str = "chat"
) -> Stack:
    """Run `tandem up` with its state under `folder` and wait until it says ready."""
    env = {**os.environ, "XDG_CACHE_HOME": str(folder), "OMP_NUM_THREADS": "1"}
    env.pop("XDG_RUNTIME_DIR", None)
    log = folder / f"{name}.log"
    with open(log, "wb") as out:
        process = subprocess.Popen(
            tandem_command("up", str(example), "--cluster", name, *arguments),
            env=env,
            stdout=out,
            stderr=out,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    stack = Stack(process, name, env, log)
    try:
        eventually_in_another_process(
            lambda: "ready after" in log.read_text(),
            READY_TIMEOUT_S,
            told=log.read_text,
            process=process,
        )
    except AssertionError:
        process.kill()
        raise
    endpoint = stack.get("router", router)["status"]["endpoint"]
    stack.url = endpoint.removesuffix("/v1")
    return stack


def stop(stack: Stack) -> int:
    """End with SIGINT, as Ctrl-C does; the exit status."""
    if stack.process.poll() is None:
        stack.process.send_signal(signal.SIGINT)
    return stack.process.wait(timeout=60)
