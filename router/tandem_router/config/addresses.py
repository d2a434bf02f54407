"""Which addresses an external tier may have: not the machine's own services, nor the cluster's.

Whoever may write a URL into a Router would otherwise ask, from inside the cluster and with the
router's place in its network, what only pods are meant to reach: a cloud's metadata service, an
application without authentication. Names are looked at where they are written and, since DNS
answers for them, once more at every connection. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_network,
)
from urllib.parse import urlsplit

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

# Where clouds answer pods about themselves, beside the link-local one.
METADATA = tuple(
    ip_network(each)
    for each in ("100.100.100.200/32", "168.63.129.16/32", "192.0.0.192/32", "fd00:ec2::254/128")
)
METADATA_NAMES = frozenset({"metadata", "metadata.google.internal", "instance-data"})
CLUSTER_SUFFIXES = (".svc", ".cluster.local", ".local", ".localhost", ".internal")
# IPv6 networks whose last 32 bits are an IPv4 address: NAT64 of the world and of one's own
# (RFC 8215), and "IPv4-compatible" ones, which some hosts still route.
EMBEDDING = tuple(ip_network(each) for each in ("64:ff9b::/96", "64:ff9b:1::/48", "::/96"))


@dataclass(frozen=True, slots=True)
class Outward:
    """only_public: addresses of the internet alone. allowed: networks that are not refused."""

    only_public: bool = False
    allowed: tuple[Network, ...] = ()

    def refused(self, address: Address) -> str | None:
        """Why an address may not be connected to, as the end of a sentence; None where it may."""
        address = _embedded(address)
        if any(address.version == net.version and address in net for net in self.allowed):
            return None
        if address.is_link_local or any(
            address.version == net.version and address in net for net in METADATA
        ):
            return "is a link-local or metadata address"
        if address.is_unspecified or address.is_multicast:
            return "is no address of a server"
        if self.only_public and (not address.is_global or _is_site_local(address)):
            return "is not a public address, but one of the cluster or of a private network"
        return None

    def refused_url(self, url: str) -> str | None:
        """The same of a URL, as far as it says: a number, or a name that only a cluster knows."""
        try:
            parts = urlsplit(url)
            host = (parts.hostname or "").rstrip(".").lower()
        except ValueError:
            return "is not a URL"
        if "@" in parts.netloc:
            return "holds a user name or password; a key has a field of its own"
        number = numeric(host)
        if number is not None:
            return self.refused(number)
        if self.allowed:
            return None  # what the name stands for decides, at the connection
        if host in METADATA_NAMES:
            return "is a metadata service"
        inside = "." not in host or host.endswith(CLUSTER_SUFFIXES) or ".svc." in host
        if self.only_public and inside:
            return "is a name inside the cluster"
        return None


def numeric(host: str) -> Address | None:
    """The address that a host is, in any form that a resolver takes; None for a name."""
    try:
        return ip_address(host.partition("%")[0])
    except ValueError:
        pass
    parts = host.split(".")
    try:
        numbers = [_number(part) for part in parts]
    except ValueError:
        return None
    if len(numbers) > 4 or any(number > 255 for number in numbers[:-1]):
        return None
    room = 256 ** (5 - len(numbers))
    if numbers[-1] >= room:
        return None
    value = numbers[-1]
    for index, number in enumerate(numbers[:-1]):
        value += number << (24 - 8 * index)
    return IPv4Address(value)


def _number(part: str) -> int:
    """As inet_aton reads it: hexadecimal, octal or decimal. Raises ValueError."""
    if not part.isascii() or not part.isalnum():
        raise ValueError(part)
    if part.startswith(("0x", "0X")):
        return int(part[2:] or "0", 16)
    return int(part, 8) if part.startswith("0") else int(part, 10)


def _embedded(address: Address) -> Address:
    """The IPv4 address that an IPv6 one stands for."""
    if not isinstance(address, IPv6Address):
        return address
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address.sixtofour is not None:
        return address.sixtofour
    if int(address) > 1 and any(address in net for net in EMBEDDING):
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return address


def _is_site_local(address: Address) -> bool:
    return isinstance(address, IPv6Address) and address.is_site_local


def networks(texts: Sequence[str]) -> tuple[Network, ...]:
    """Raises ValueError for one that is no network."""
    return tuple(ip_network(text) for text in texts)


def shows_key(url: str) -> bool:
    """Whether a key sent there could be read on the way: plain http beyond this machine."""
    parts = urlsplit(url)
    if parts.scheme != "http":
        return False
    number = numeric((parts.hostname or "").lower())
    own = number.is_loopback if number is not None else parts.hostname == "localhost"
    return not own
