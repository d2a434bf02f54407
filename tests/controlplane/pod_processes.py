"""The processes of pods of a test cluster, which its nodes start on this machine."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any


def of(cluster: Any, addresses: Iterable[str], program: bytes) -> list[int]:
    """Those of the pods at these addresses whose command names this program.

    Clusters that run beside this one have the same addresses, each in a network of its own.
    """
    own = _network(Path("/proc") / cluster.enter[cluster.enter.index("--target") + 1])
    wanted, found = {f"POD_IP={address}".encode() for address in addresses}, []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if _network(entry) != own:
                continue
            variables = (entry / "environ").read_bytes().split(b"\0")
            command = (entry / "cmdline").read_bytes()
        except OSError:  # ended meanwhile
            continue
        if wanted.intersection(variables) and program in command:
            found.append(int(entry.name))
    return found


def _network(process: Path) -> Path:
    return (process / "ns" / "net").readlink()
