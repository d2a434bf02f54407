"""A network of the cluster's own: a namespace whose loopback owns 10.77.0.0/16.

EndpointSlices refuse loopback addresses, so nodes and pods need others. One address with a
16-bit mask on `lo` makes the kernel deliver the whole range locally, as it does for 127.0.0.0/8.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import subprocess
from pathlib import Path

HOST_ADDRESS = "10.77.0.1"
NETMASK = "255.255.0.0"


def node_address(index: int) -> str:
    """The address of a node; its pods get 10.77.(16 * (index + 1)).x onwards."""
    return f"10.77.0.{10 + index}"


_SIOCSIFADDR = 0x8916
_SIOCSIFNETMASK = 0x891C
_SIOCGIFFLAGS = 0x8913
_SIOCSIFFLAGS = 0x8914
_IFF_UP = 0x1


def unshare_command() -> list[str]:
    """Prefix that starts a command in a new network namespace, as root or as a normal user."""
    mapped = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    # Without a fork: unshare would keep SIGTERM from the command that it started.
    return ["unshare", *mapped, "--net", "--mount"]


def enter_command(pid: int) -> list[str]:
    """Prefix that runs a command in the network (and mounts) of the process PID."""
    user = [] if os.geteuid() == 0 else ["--user", "--preserve-credentials"]
    return ["nsenter", "--target", str(pid), *user, "--net", "--mount"]


def _address_request(name: bytes, address: str) -> bytes:
    return struct.pack("16sHH4s8x", name, socket.AF_INET, 0, socket.inet_aton(address))


def configure_loopback() -> None:
    """Bring `lo` up and give it 127.0.0.1/8 and, as the alias lo:1, the cluster's range."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        flags = struct.unpack(
            "16sH", fcntl.ioctl(control, _SIOCGIFFLAGS, struct.pack("16sH", b"lo", 0))
        )[1]
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sH", b"lo", flags | _IFF_UP))
        fcntl.ioctl(control, _SIOCSIFADDR, _address_request(b"lo:1", HOST_ADDRESS))
        fcntl.ioctl(control, _SIOCSIFNETMASK, _address_request(b"lo:1", NETMASK))


def keep_in(folder: Path, path: Path) -> None:
    """Inside the namespace, what is written at path goes to folder; outside, path stays empty."""
    folder.mkdir(exist_ok=True)
    path.mkdir(exist_ok=True)
    subprocess.run(["mount", "--bind", str(folder), str(path)], check=True)
