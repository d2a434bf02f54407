"""Breaking and mending a running cluster from outside, over a socket in its run folder.

One line per connection, `kill NAME` or `start NAME`; NAME is a component or a node, as its log file
is called. The answer is `ok` or a sentence.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from pathlib import Path

REPLY_TIMEOUT_S = 90.0


def _path(run_dir: Path) -> str:
    return str(run_dir / "control")


class ControlServer:
    """The cluster's side; actions maps each verb to a function of a name."""

    def __init__(self, run_dir: Path, actions: Mapping[str, Callable[[str], None]]) -> None:
        self._actions = actions
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(_path(run_dir))
        self._listener.listen()

    def serve_one(self, timeout_s: float) -> None:
        """Wait this long for a request and carry it out."""
        self._listener.settimeout(timeout_s)
        try:
            connection, _ = self._listener.accept()
        except TimeoutError:
            return
        with connection:
            connection.settimeout(5.0)
            verb, _, name = connection.recv(256).decode().strip().partition(" ")
            connection.sendall(self._carry_out(verb, name).encode())

    def _carry_out(self, verb: str, name: str) -> str:
        action = self._actions.get(verb)
        if action is None:
            return f"{verb!r} is not one of {', '.join(self._actions)}"
        try:
            action(name)
        except (KeyError, RuntimeError) as error:
            return f"{verb} {name}: {error}"
        return "ok"


def ask(run_dir: Path, verb: str, name: str) -> None:
    """Have the cluster of this folder do something; raises RuntimeError when it refuses."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(REPLY_TIMEOUT_S)
        connection.connect(_path(run_dir))
        connection.sendall(f"{verb} {name}\n".encode())
        answer = connection.recv(4096).decode()
    if answer != "ok":
        raise RuntimeError(answer)
