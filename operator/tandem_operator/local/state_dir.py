"""Where running local clusters keep their state, and how commands find them."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import socket
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

FIRST_SUBNET, LAST_SUBNET = 16, 126


class RunDirError(Exception):
    """No cluster, or no room for one; the message says what to do."""


@dataclass(frozen=True)
class ClusterInfo:
    """A running cluster as its state file describes it."""

    name: str
    pid: int
    folder: str
    socket: str
    subnet: int


def base_folder() -> Path:
    """The folder of all running clusters of this user."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and os.access(runtime, os.W_OK):
        return Path(runtime) / "tandem"
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache) / "tandem" / "run"


def predictor_cache() -> Path:
    """The folder that keeps trained predictors between runs."""
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache) / "tandem" / "predictors"


def running_clusters(base: Path | None = None) -> list[ClusterInfo]:
    """All clusters that run now; folders that a dead one left are removed."""
    base = base or base_folder()
    found = []
    for folder in sorted(base.glob("*.*")) if base.is_dir() else []:
        if not _locked(folder / "lock"):
            shutil.rmtree(folder, ignore_errors=True)
            continue
        with contextlib.suppress(OSError, ValueError, TypeError):
            found.append(ClusterInfo(**json.loads((folder / "state.json").read_text())))
    return sorted(found, key=lambda c: c.name)


def find_cluster(name: str | None, base: Path | None = None) -> ClusterInfo:
    """The cluster of that name, or the only one.

    Raises RunDirError when there is none or more than one.
    """
    clusters = running_clusters(base)
    if name is not None:
        for cluster in clusters:
            if cluster.name == name:
                return cluster
        known = ", ".join(c.name for c in clusters) or "none"
        raise RunDirError(f"no cluster {name!r} is running; running: {known}")
    if not clusters:
        raise RunDirError("no cluster is running; start one with `tandem up FILE`")
    if len(clusters) > 1:
        names = ", ".join(c.name for c in clusters)
        raise RunDirError(f"several clusters are running; choose with --cluster: {names}")
    return clusters[0]


def _locked(path: Path) -> bool:
    """Whether a living process holds the lock; its end, however sudden, lets go of it."""
    try:
        fd = os.open(path, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    else:
        return False
    finally:
        os.close(fd)


class RunDir:
    """This process's place among the running clusters: a folder, a lock, a block of addresses."""

    def __init__(self, wanted_name: str, base: Path | None = None, *, exact: bool = False) -> None:
        base = base or base_folder()
        try:
            base.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise RunDirError(f"{base} cannot be created: {error.strerror}") from error
        others = running_clusters(base)
        self.name = _free_name(wanted_name, {c.name for c in others}, exact=exact)
        self.folder = base / f"{self.name}.{os.getpid()}"
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(mode=0o700)
        self._lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.subnet, self._claim = _claim_subnet(os.getpid())
        path = self.folder / "socket"
        if len(str(path)) > 100:  # sun_path holds 108 bytes
            path = Path(tempfile.gettempdir()) / f"tandem-{os.getuid()}-{os.getpid()}.sock"
        self.socket = path
        info = ClusterInfo(self.name, os.getpid(), str(self.folder), str(path), self.subnet)
        (self.folder / "state.json").write_text(json.dumps(asdict(info)))

    def close(self) -> None:
        """Give the place back."""
        self._claim.close()
        with contextlib.suppress(OSError):
            self.socket.unlink()
        shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)


def _free_name(wanted: str, taken: set[str], *, exact: bool) -> str:
    name = re.sub(r"[^a-z0-9-]+", "-", wanted.lower()).strip("-")[:40] or "tandem"
    if name not in taken:
        return name
    if exact:
        raise RunDirError(f"a cluster named {name!r} is running already; choose another --cluster")
    return next(f"{name}-{i}" for i in range(2, 1000) if f"{name}-{i}" not in taken)


def _claim_subnet(seed: int) -> tuple[int, socket.socket]:
    """A second byte B of 127.B.0.0/16 that no other cluster on this machine uses."""
    span = LAST_SUBNET - FIRST_SUBNET + 1
    for i in range(span):
        subnet = FIRST_SUBNET + (seed + i) % span
        claim = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            claim.bind((f"127.{subnet}.0.1", 1))
        except PermissionError:
            pass  # ports below 1024 need a right; take a high one
        except OSError as error:
            claim.close()
            if error.errno == errno.EADDRNOTAVAIL:
                raise RunDirError(
                    "this system has no addresses beside 127.0.0.1 for pods; local mode needs "
                    "Linux, where all of 127.0.0.0/8 answers"
                ) from error
            continue
        else:
            return subnet, claim
        try:
            claim.bind((f"127.{subnet}.0.1", 61_999))
        except OSError:
            claim.close()
            continue
        return subnet, claim
    raise RunDirError("no loopback address block is free; stop another `tandem up`")


def free_ports(subnet: int) -> tuple[int, int, int, int]:
    """Router, worker, KV and picker port on which pods can listen.

    A server elsewhere on 0.0.0.0:8000 blocks that port on every address, so the usual ports are
    tried first and then others.
    """
    for offset in (0, 10_000, 20_000, 30_000):
        ports = (8000 + offset, 8100 + offset, 8200 + offset, 9002 + offset)
        try:
            for port in ports:
                with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind((f"127.{subnet}.0.1", port))
        except OSError:
            continue
        return ports
    raise RunDirError("ports 8000, 8100, 8200 and 9002 are in use on all addresses; free them")
