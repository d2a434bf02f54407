"""Sets up clients of other people for the tests once, outside the tree; run again it costs nothing.

usage: clients_setup.py [SET ...]     prints each set's folder, or says why there is none

One environment for each set of packages that can be installed together (`clients/*.txt`, pinned),
and one for Node's (`clients/npm`). Evaluation tools want a torch of several gigabytes and ask it
nothing here: the project's is shared by a .pth file.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

PINNED = Path(__file__).parent / "clients"
PYTHON_SETS = ("current", "openai2", "openai1", "openai_agents", "agents", "evaluations")
NODE = "npm"
SHARES_TORCH = frozenset({"evaluations"})
UNABLE = 3  # exit status where this machine cannot run a set, whatever is installed


def folder(name: str) -> Path:
    """Where a set belongs: another one for other pins, Python or project."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    pins = PINNED / NODE / "package-lock.json" if name == NODE else PINNED / f"{name}.txt"
    parts = [pins.read_text(), sys.version, sys.prefix, Path(__file__).read_text()]
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]
    return Path(cache) / "tandem" / "clients" / f"{name}-{key}"


def unable(name: str) -> str:
    """Why this machine cannot run a set; empty where it can."""
    if name == NODE and (shutil.which("npm") is None or shutil.which("node") is None):
        return "node and npm were not found; on Debian and Ubuntu: apt-get install nodejs npm"
    return ""


def install(name: str, home: Path) -> None:
    """Raises subprocess.CalledProcessError where an installer fails."""
    shutil.rmtree(home, ignore_errors=True)
    if name == NODE:
        shutil.copytree(PINNED / NODE, home)
        command = ["npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts", "--silent"]
        subprocess.run(command, cwd=home, check=True)
    else:
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        pip = [str(home / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check"]
        pins = ["--no-deps", "--no-compile", "-r", str(PINNED / f"{name}.txt")]
        subprocess.run([*pip, "-q", *pins], check=True)
    if name in SHARES_TORCH:
        torch = importlib.util.find_spec("torch")
        if torch is None or torch.origin is None:
            raise OSError("the project has no torch; run scripts/setup.sh first")
        site = next(home.glob("lib/python3*/site-packages"))
        (site / "project.pth").write_text(str(Path(torch.origin).parents[1]) + "\n")
    (home / "done").touch()


def prepared(name: str) -> Path:
    """A set's folder, installed. Raises CalledProcessError, OSError."""
    home = folder(name)
    home.parent.mkdir(parents=True, exist_ok=True)
    with (home.parent / f"{home.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (home / "done").exists():
            began = time.monotonic()
            print(f"clients: setting up {name} in {home}", file=sys.stderr)
            install(name, home)
            print(f"clients: {name} after {time.monotonic() - began:.0f} s", file=sys.stderr)
    return home


def main(names: Sequence[str]) -> int:
    status = 0
    for name in names or (*PYTHON_SETS, NODE):
        if why := unable(name):
            print(f"clients: {name}: {why}", file=sys.stderr)
            status = status or UNABLE
            continue
        try:
            print(prepared(name))
        except (subprocess.CalledProcessError, OSError) as error:
            print(f"clients: {name}: the set-up failed: {error}", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
