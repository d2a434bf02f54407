"""What a gateway carries to a worker in place of the peer token, as both sides know it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from tandem_router.engines.ticket import HEADER, VALID_S, ticket
from tandem_worker.server.ticket import expected_digest

VECTORS = Path(__file__).parent / "vectors" / "http.json"
VECTOR: dict[str, Any] = json.loads(VECTORS.read_text())["ticket"]
TOKEN: bytes = VECTOR["peer_token"].encode()
PATH: str = VECTOR["path"]
HEADERS: dict[str, str] = {**VECTOR["headers"], HEADER.decode(): VECTOR["value"]}
NOW: float = VECTOR["now"]
DIGEST = hashlib.sha256(VECTOR["body"].encode()).hexdigest()


def test_the_router_writes_that_ticket() -> None:
    headers = [(name.encode(), value.encode()) for name, value in VECTOR["headers"].items()]

    written = ticket(TOKEN, PATH, reversed(headers), VECTOR["body"].encode(), NOW)

    assert written.decode() == VECTOR["value"]
    assert TOKEN not in written


def test_the_worker_reads_that_ticket_and_knows_the_body_by_it() -> None:
    assert expected_digest(HEADERS, PATH, [b"a-newer-token", TOKEN], NOW) == DIGEST
    assert expected_digest(HEADERS, PATH, [TOKEN], NOW + VALID_S - 1) == DIGEST


@pytest.mark.parametrize(
    ("change", "path", "tokens", "later_s"),
    [
        ({}, PATH, [b"another"], 0.0),
        ({}, PATH, [], 0.0),
        ({}, "/v1/completions", [TOKEN], 0.0),
        ({}, PATH, [TOKEN], VALID_S + 1.0),
        ({}, PATH, [TOKEN], -1000.0),
        ({"x-tandem-prefill": "http://elsewhere:1"}, PATH, [TOKEN], 0.0),
        ({"x-tandem-priority": "-100"}, PATH, [TOKEN], 0.0),
        ({"x-tandem-ticket": ""}, PATH, [TOKEN], 0.0),
        ({"x-tandem-ticket": "1..2"}, PATH, [TOKEN], 0.0),
        ({"x-tandem-ticket": "\u0661\u0662.a.b"}, PATH, [TOKEN], 0.0),
    ],
)
def test_a_ticket_opens_one_request_for_a_while_and_nothing_else(
    change: dict[str, str], path: str, tokens: list[bytes], later_s: float
) -> None:
    assert expected_digest({**HEADERS, **change}, path, tokens, NOW + later_s) is None


@pytest.mark.parametrize("path", ["/internal/prefill", "/v1/load", "/drain", "/tokenize"])
def test_no_ticket_opens_a_workers_own_affairs(path: str) -> None:
    given = ticket(TOKEN, path, [], b"{}", NOW)

    assert expected_digest({HEADER.decode(): given.decode()}, path, [TOKEN], NOW) is None
