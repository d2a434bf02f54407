"""Requests to a peer worker: a fresh connection each, whose closing aborts the work there.

A pool would save a third of a millisecond on loopback and cost the certainty that a closed
connection means exactly one aborted request.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from tandem_worker.errors import PeerError

MAX_REPLY_BYTES = 1 << 20


async def request_json(
    method: str,
    url: str,
    body: Mapping[str, Any] | None = None,
    *,
    headers: Mapping[str, str] | None = None,
    connect_timeout_s: float = 2.0,
) -> tuple[int, dict[str, Any]]:
    """Send a request, with a JSON object or none, and wait for the answer.

    Cancelling closes the connection.

    Returns:
        Status code and the answer's object.

    Raises:
        PeerError: unreachable, connection lost, or no HTTP.
    """
    parts = urlsplit(url)
    try:
        port = parts.port or 80
    except ValueError as error:
        raise PeerError(f"peer URL {url!r}: {error}") from error
    if parts.scheme != "http" or not parts.hostname:
        raise PeerError(f"peer URL {url!r} must look like http://HOST:PORT")
    try:
        reader, writer = await asyncio.wait_for(
            asyncio.open_connection(parts.hostname, port), connect_timeout_s
        )
    except (OSError, TimeoutError) as error:
        raise PeerError(f"{parts.netloc} cannot be reached: {error or 'timed out'}") from error
    try:
        payload = b"" if body is None else json.dumps(body, separators=(",", ":")).encode()
        lines = [
            f"{method} {parts.path or '/'} HTTP/1.1",
            f"host: {parts.netloc}",
            "content-type: application/json",
            f"content-length: {len(payload)}",
            "connection: close",
            *(f"{name}: {value}" for name, value in (headers or {}).items()),
        ]
        writer.write("\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + payload)
        await writer.drain()
        head = await reader.readuntil(b"\r\n\r\n")
        status = int(head.split(b" ", 2)[1])
        content = await reader.read(MAX_REPLY_BYTES)
        while not reader.at_eof() and len(content) < MAX_REPLY_BYTES:
            content += await reader.read(MAX_REPLY_BYTES)
    except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
        raise PeerError(f"the connection to {parts.netloc} was lost: {error}") from error
    except (ValueError, IndexError) as error:
        raise PeerError(f"{parts.netloc} did not answer in HTTP: {error}") from error
    finally:
        writer.close()
    try:
        answer = json.loads(content)
    except ValueError as error:
        raise PeerError(f"{parts.netloc} answered {status} without JSON") from error
    if not isinstance(answer, dict):
        raise PeerError(f"{parts.netloc} answered {status} with {type(answer).__name__}")
    return status, answer
