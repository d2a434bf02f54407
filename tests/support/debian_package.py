"""Programs of a Debian package: the PATH's, else the package's own, unpacked into a cache.

Nothing is installed: a package's service would start beside the tests.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
from pathlib import Path


def folder(package: str, *tools: str) -> Path:
    """The folder that holds the tools. Raises RuntimeError that says what to do without them."""
    found = [shutil.which(tool) for tool in tools]
    if found[0] and all(found):
        return Path(found[0]).parent
    # Outside the checkout, so that a fresh clone on the same machine fetches nothing again.
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    root = Path(base) / "tandem" / package
    root.mkdir(parents=True, exist_ok=True)
    with open(root / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        target = root / "usr" / "bin"
        if not all((target / tool).exists() for tool in tools):
            _unpack(package, root, tools)
    return target


def _unpack(package: str, root: Path, tools: tuple[str, ...]) -> None:
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise RuntimeError(f"no {tool} here; put {' and '.join(tools)} into the PATH")
    with tempfile.TemporaryDirectory() as download:
        Path(download).chmod(0o755)
        fetch = ["apt-get", "download", "-q", package]
        got = subprocess.run(fetch, cwd=download, capture_output=True, text=True)
        if got.returncode != 0:
            # The lists may be older than the package, or not there yet.
            subprocess.run(["apt-get", "update", "-q"], capture_output=True)
            got = subprocess.run(fetch, cwd=download, capture_output=True, text=True)
        packages = sorted(Path(download).glob("*.deb"))
        if got.returncode != 0 or not packages:
            raise RuntimeError(f"apt-get download {package}: {got.stderr.strip()}")
        subprocess.run(["dpkg-deb", "-x", str(packages[0]), str(root)], check=True)
