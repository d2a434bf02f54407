"""Where Prometheus and promtool come from: the PATH, else Debian's package, unpacked into a cache.

Nothing is installed: the package's service would start beside the tests.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

TOOLS = ("prometheus", "promtool")


def cache_root() -> Path:
    """Outside the checkout, so that a fresh clone on the same machine fetches nothing again."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "tandem" / "prometheus"


def folder() -> Path:
    """The folder that holds both. Raises RuntimeError with what to do where they cannot be had."""
    found = [shutil.which(tool) for tool in TOOLS]
    if found[0] and found[1]:
        return Path(found[0]).parent
    root = cache_root()
    root.mkdir(parents=True, exist_ok=True)
    with open(root / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        target = root / "usr" / "bin"
        if not all((target / tool).exists() for tool in TOOLS):
            _unpack(root)
    return target


def _unpack(root: Path) -> None:
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise RuntimeError(f"no {tool} here; put prometheus and promtool into the PATH")
    with tempfile.TemporaryDirectory() as download:
        Path(download).chmod(0o755)
        fetch = ["apt-get", "download", "-q", "prometheus"]
        got = subprocess.run(fetch, cwd=download, capture_output=True, text=True)
        if got.returncode != 0:
            # The lists may be older than the package, or not there yet.
            subprocess.run(["apt-get", "update", "-q"], capture_output=True)
            got = subprocess.run(fetch, cwd=download, capture_output=True, text=True)
        packages = sorted(Path(download).glob("*.deb"))
        if got.returncode != 0 or not packages:
            raise RuntimeError(f"apt-get download prometheus: {got.stderr.strip()}")
        subprocess.run(["dpkg-deb", "-x", str(packages[0]), str(root)], check=True)
