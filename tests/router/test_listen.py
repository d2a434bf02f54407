"""On which addresses a router listens."""

from __future__ import annotations

import socket

import pytest

from tandem_router.api.origin import loopback_names
from tandem_router.errors import ConfigError
from tandem_router.http.listen import listen


def port_of(listener: socket.socket) -> int:
    port: int = listener.getsockname()[1]
    return port


def test_each_family_has_its_own_socket_on_one_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = port_of(free)
    try:
        first, second = listen(["127.0.0.1", "::1"], port)
    except ConfigError as error:
        pytest.skip(f"this kernel has no ::1: {error}")
    with first, second:
        assert (first.family, second.family) == (socket.AF_INET, socket.AF_INET6)
        assert port_of(first) == port_of(second) == port


def test_an_address_that_is_taken_is_said_with_the_next_step() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = port_of(taken)
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}: Address already in use; choose"):
            listen(["127.0.0.2", "127.0.0.1"], port)


def test_only_a_router_that_this_machine_alone_reaches_has_names_of_its_own() -> None:
    assert loopback_names(["127.0.0.1", "::1"]) is not None
    assert loopback_names(["127.0.0.1", "10.0.0.7"]) is None
    assert loopback_names(["::"]) is None
