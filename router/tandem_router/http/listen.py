"""Listens on the addresses of a router: one, or one of each family in a dual-stack cluster."""

from __future__ import annotations

import socket
from collections.abc import Sequence

from tandem_router.errors import ConfigError


def listen(hosts: Sequence[str], port: int) -> list[socket.socket]:
    """A socket for each address or name. Raises ConfigError that says what to do."""
    listeners: list[socket.socket] = []
    for host in hosts:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            listener = socket.create_server(found[4][:2], family=found[0], backlog=2048)
        except OSError as error:
            for each in listeners:
                each.close()
            name = f"[{host}]" if ":" in host else host
            raise ConfigError(
                f"cannot listen on {name}:{port}: {error.strerror}; choose another --host or "
                "--port, or end the process that holds it"
            ) from error
        # Accepted connections inherit it; without it chunks wait for delayed acknowledgements.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listeners.append(listener)
    return listeners
