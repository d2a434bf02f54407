"""Takes the addresses of a router: one, or one of each family in a dual-stack cluster."""

from __future__ import annotations

import socket
from collections.abc import Sequence

from tandem_router.errors import ConfigError


def listen(hosts: Sequence[str], port: int) -> list[socket.socket]:
    """A bound socket for each address or name: who connects is refused until the server listens.

    Raises ConfigError that says what to do.
    """
    listeners: list[socket.socket] = []
    for host in hosts:
        try:
            family, kind, number, _, address = socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP
            )[0]
            listener = socket.socket(family, kind, number)
            listeners.append(listener)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind(address)
        except OSError as error:
            for each in listeners:
                each.close()
            name = f"[{host}]" if ":" in host else host
            raise ConfigError(
                f"cannot listen on {name}:{port}: {error.strerror}; choose another --host or "
                "--port, or end the process that holds it"
            ) from error
    return listeners
