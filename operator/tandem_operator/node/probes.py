"""Asks a container whether it is started, ready or alive, the way a kubelet does."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Exec = Callable[[list[str], float], Awaitable[int]]


@dataclass
class ProbeCounter:
    """Turns single results into a verdict by the probe's thresholds."""

    success_threshold: int = 1
    failure_threshold: int = 3
    verdict: bool | None = None
    _run: int = field(default=0)
    _last: bool | None = field(default=None)

    def record(self, ok: bool) -> bool | None:
        """Count one result; the verdict so far, None while undecided."""
        self._run = self._run + 1 if ok == self._last else 1
        self._last = ok
        if self._run >= (self.success_threshold if ok else self.failure_threshold):
            self.verdict = ok
        return self.verdict

    @classmethod
    def of(cls, probe: Mapping[str, Any]) -> ProbeCounter:
        """A counter with the thresholds of a probe object."""
        return cls(int(probe.get("successThreshold", 1)), int(probe.get("failureThreshold", 3)))


def _port(port: int | str, container: Mapping[str, Any]) -> int:
    if isinstance(port, int):
        return port
    for entry in container.get("ports", []):
        if entry.get("name") == port:
            return int(entry["containerPort"])
    if not port.isdigit():
        raise ValueError(f"the container has no port named {port!r}")
    return int(port)


async def http_status(host: str, port: int, path: str, timeout_s: float, verb: str = "GET") -> int:
    """The status code of one request; 0 when there is no answer in time."""
    writer = None
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(host, port)
            head = f"{verb} {path} HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n"
            writer.write(f"{head}Content-Length: 0\r\nUser-Agent: tandem-probe\r\n\r\n".encode())
            line = await reader.readline()
            return int(line.split(b" ", 2)[1])
    except (OSError, TimeoutError, ValueError, IndexError):
        return 0
    finally:
        if writer is not None:
            writer.close()


async def check(
    probe: Mapping[str, Any], container: Mapping[str, Any], pod_ip: str, run: Exec
) -> bool:
    """The result of one httpGet, tcpSocket or exec probe."""
    timeout_s = float(probe.get("timeoutSeconds", 1))
    if http := probe.get("httpGet"):
        port = _port(http["port"], container)
        status = await http_status(
            http.get("host") or pod_ip, port, http.get("path", "/"), timeout_s
        )
        return 200 <= status < 400
    if tcp := probe.get("tcpSocket"):
        try:
            async with asyncio.timeout(timeout_s):
                _, writer = await asyncio.open_connection(
                    tcp.get("host") or pod_ip, _port(tcp["port"], container)
                )
        except (OSError, TimeoutError):
            return False
        writer.close()
        return True
    if command := (probe.get("exec") or {}).get("command"):
        return await run(list(command), timeout_s) == 0
    return True
