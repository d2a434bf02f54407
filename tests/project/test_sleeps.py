"""Tests wait for what they wait for, not for a time.

A sleep is too short on a busy machine and too long on every other. `tests/support/eventually.py`
polls what only shows from outside; `asyncio.wait({task}, timeout=...)` shows that something has not
ended; a clock that is passed in is moved.
"""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]

# file: how many sleeps it may hold, and what for.
ALLOWED = {
    "support/eventually.py": (2, "the polling itself"),
    # Stand-ins whose slowness is what is tested.
    "grading/fake_provider.py": (1, "a provider's slow answer"),
    "project/doors_probes.py": (2, "a predictor and a verifier that take 30 ms"),
    "router/test_choices.py": (1, "a predictor that is late"),
    "router/test_failover.py": (1, "a worker's restart"),
    "router/test_upstream.py": (1, "a stream with pauses"),
    "operator/test_up.py": (1, "a server that starts late"),
    "transfer/test_random_lives.py": (1, "a writer with pauses"),
    "worker/test_stress.py": (1, "requests spread over time"),
    "worker/test_hostile_clients.py": (1, "a client that reads nothing"),
    # Bytes in flight between two ends that show nothing of them.
    "transfer/test_hostile_strangers.py": (1, "connections that are being refused"),
    "transfer/test_tcp_receiver.py": (1, "half a frame"),
    "transfer/test_tcp_sender.py": (2, "frames that nobody reads"),
    "transfer/test_transports.py": (1, "a write that must not arrive"),
    # Programs of their own beside the control plane: kubelets, proxies and users in a script.
    "controlplane/apiproxy.py": (2, "late answers of an apiserver"),
    "controlplane/client.py": (3, "a client's pace"),
    "controlplane/cluster.py": (1, "a program that starts, run without tests/support"),
    "controlplane/faults_scenario.py": (6, "a user's pace, and time in which nothing is written"),
    "controlplane/kubelet.py": (5, "a kubelet's pace"),
    "controlplane/kubelet_server.py": (1, "following a log"),
    "controlplane/ramp_client.py": (1, "requests that come when they come"),
    "controlplane/rights.py": (1, "an authorizer that hears late, run without tests/support"),
    "controlplane/test_faults_e2e.py": (1, "an apiserver that is away"),
    "controlplane/test_hybrid.py": (1, "time in which nothing is written"),
}


def sleeps(source: str) -> list[int]:
    """Lines that sleep for longer than a turn of the loop."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or ast.unparse(node.func) not in (
            "time.sleep",
            "asyncio.sleep",
            "anyio.sleep",
            "sleep",
        ):
            continue
        turn = [isinstance(each, ast.Constant) and each.value == 0 for each in node.args[:1]]
        endless = [isinstance(each, ast.Constant) and each.value >= 30 for each in node.args[:1]]
        if not any(turn) and not any(endless):
            found.append(node.lineno)
    return found


def test_no_test_sleeps_but_those_that_say_why() -> None:
    """More than 30 s is a stand-in that never ends by itself."""
    found = {
        path.relative_to(TESTS).as_posix(): lines
        for path in TESTS.rglob("*.py")
        if (lines := sleeps(path.read_text(encoding="utf-8")))
    }
    counts = Counter({name: len(lines) for name, lines in found.items()})
    allowed = Counter({name: number for name, (number, _) in ALLOWED.items()})

    more = {name: found[name] for name in counts - allowed}
    assert not more, f"use eventually, asyncio.wait or a clock: {more}"


def test_a_sleep_is_seen() -> None:
    source = "import time\ntime.sleep(0.2)\nawait asyncio.sleep(0)\ntime.sleep(600)\nsleep(x)\n"

    assert sleeps(source) == [2, 5]
