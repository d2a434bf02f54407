"""Runs the programs of other people's clients, each in the environment of its set."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PROGRAMS = Path(__file__).parent / "programs"


def load_setup() -> Any:
    spec = importlib.util.spec_from_file_location("setup", ROOT / "scripts" / "clients_setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def found_by(name: str, program: str, url: str, *steps: str) -> dict[str, Any]:
    """What a program of a set printed last; skips where this machine cannot run the set."""
    setup = load_setup()
    if why := setup.unable(name):
        pytest.skip(why)
    home = setup.prepared(name)
    script, runner = PROGRAMS / program, str(home / "bin" / "python")
    if name == setup.NODE:
        # Node looks for packages beside the program.
        script, runner = Path(shutil.copy(script, home)), shutil.which("node") or "node"
    done = subprocess.run(
        [runner, str(script), url, *steps],
        capture_output=True,
        text=True,
        timeout=300,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
