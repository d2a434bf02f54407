"""One HTTP request to a pod, whose reply is read whole and within bounds."""

from __future__ import annotations

from collections.abc import Mapping

import httpx

MAX_REPLY_BYTES = 4 * 2**20


async def ask_pod(
    host: str, port: int, method: str, path: str, body: bytes, headers: Mapping[str, str]
) -> tuple[int, bytes]:
    """Status and body of the reply. Raises OSError or ValueError where there is none to use.

    It has no time limit of its own.
    """
    name = f"[{host}]" if ":" in host else host
    content = bytearray()
    try:
        # Pods speak plain HTTP; a proxy of the operator's own environment does not lead to them.
        async with (
            httpx.AsyncClient(verify=False, trust_env=False, timeout=None) as client,
            client.stream(
                method, f"http://{name}:{port}{path}", content=body, headers=headers
            ) as reply,
        ):
            async for part in reply.aiter_bytes():
                content += part
                if len(content) > MAX_REPLY_BYTES:
                    raise ValueError(f"{path} answers with more than {MAX_REPLY_BYTES} bytes")
    except httpx.RemoteProtocolError as error:
        raise ValueError(f"{path} answers what is no HTTP: {error}") from error
    except httpx.HTTPError as error:
        raise OSError(f"{path} is not answered: {error!r}") from error
    return reply.status_code, bytes(content)
