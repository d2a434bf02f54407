"""A network of the cluster's own: a namespace whose loopback owns 10.77.0.0/16, fd77::/64 or both.

EndpointSlices refuse loopback addresses, so nodes and pods need others. One address with a
16-bit mask on `lo` makes the kernel deliver the whole range locally, as it does for 127.0.0.0/8.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

NETMASK = "255.255.0.0"
PREFIX_V6, PREFIX_LENGTH_V6 = "fd77::", 64


@dataclass(frozen=True)
class Addresses:
    """The addresses of a cluster of one family, or of both."""

    v4: bool
    v6: bool

    @property
    def host(self) -> str:
        """Where the apiserver listens."""
        return "10.77.0.1" if self.v4 else f"{PREFIX_V6}1"

    @property
    def service_ranges(self) -> str:
        """The first one's family is that of Services that ask for none."""
        return ",".join([*(["10.0.0.0/24"] if self.v4 else []), *(["fd00:10::/112"] * self.v6)])

    @property
    def service(self) -> str:
        """The apiserver's own Service."""
        return "10.0.0.1" if self.v4 else "fd00:10::1"

    def node(self, index: int) -> str:
        """The address of a node; its pods get 10.77.(16 * (index + 1)).x onwards."""
        return f"10.77.0.{10 + index}" if self.v4 else f"{PREFIX_V6}{10 + index:x}"

    def pods(self, third_byte: int) -> Iterator[str]:
        """10.77.N.2 onwards, or fd77::N:2, or both; at most 255 x 253 pods ever."""
        for third in range(third_byte, 256):
            for fourth in range(2, 255):
                found = [f"10.77.{third}.{fourth}"] if self.v4 else []
                yield ",".join(found + [f"{PREFIX_V6}{third:x}:{fourth:x}"] * self.v6)


FAMILIES = {
    "ipv4": Addresses(True, False),
    "ipv6": Addresses(False, True),
    "dual": Addresses(True, True),
}


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


def configure_loopback(addresses: Addresses) -> None:
    """Bring `lo` up and give it 127.0.0.1/8 and the cluster's ranges.

    That of IPv4 as the alias lo:1. The kernel delivers a whole range of IPv6 by a route, and lets
    processes listen on addresses in it that no interface has.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        flags = struct.unpack(
            "16sH", fcntl.ioctl(control, _SIOCGIFFLAGS, struct.pack("16sH", b"lo", 0))
        )[1]
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sH", b"lo", flags | _IFF_UP))
        if addresses.v4:
            fcntl.ioctl(control, _SIOCSIFADDR, _address_request(b"lo:1", addresses.host))
            fcntl.ioctl(control, _SIOCSIFNETMASK, _address_request(b"lo:1", NETMASK))
    if addresses.v6:
        _NONLOCAL_BIND.write_text("1")
        _route_locally(PREFIX_V6, PREFIX_LENGTH_V6)


_NONLOCAL_BIND = Path("/proc/sys/net/ipv6/ip_nonlocal_bind")
_RTM_NEWROUTE, _REQUEST, _ACK, _CREATE = 24, 0x1, 0x4, 0x400
_TABLE_LOCAL, _PROTOCOL_KERNEL, _TYPE_LOCAL = 255, 2, 2
_DESTINATION, _OUTPUT_INTERFACE = 1, 4


def _route_locally(prefix: str, length: int) -> None:
    """`ip -6 route add local PREFIX/LENGTH dev lo`, which not every machine has."""

    def attribute(kind: int, value: bytes) -> bytes:
        return struct.pack("HH", 4 + len(value), kind) + value

    route = struct.pack(
        "BBBBBBBBI",
        *(socket.AF_INET6, length, 0, 0, _TABLE_LOCAL, _PROTOCOL_KERNEL, 0, _TYPE_LOCAL, 0),
    )
    route += attribute(_DESTINATION, socket.inet_pton(socket.AF_INET6, prefix))
    route += attribute(_OUTPUT_INTERFACE, struct.pack("I", socket.if_nametoindex("lo")))
    flags = _REQUEST | _ACK | _CREATE
    header = struct.pack("IHHII", 16 + len(route), _RTM_NEWROUTE, flags, 1, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as kernel:
        kernel.bind((0, 0))
        kernel.send(header + route)
        code = struct.unpack_from("i", kernel.recv(4096), 16)[0]
    if code:
        raise OSError(-code, f"a route to {prefix}/{length}: {os.strerror(-code)}")


def has_ipv6() -> bool:
    """Whether this kernel can have a cluster of IPv6."""
    return _NONLOCAL_BIND.exists()


def url_host(address: str) -> str:
    """As it stands in a URL."""
    return f"[{address}]" if ":" in address else address


def keep_in(folder: Path, path: Path) -> None:
    """Inside the namespace, what is written at path goes to folder; outside, path stays empty."""
    folder.mkdir(exist_ok=True)
    path.mkdir(exist_ok=True)
    subprocess.run(["mount", "--bind", str(folder), str(path)], check=True)
