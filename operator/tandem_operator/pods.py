"""Asks running pods: the KV link test of a Model, the traffic of a Router."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from collections.abc import Callable
from typing import Any

from tandem_operator.api import ClusterApi
from tandem_operator.plan.objects import PEER_SECRET, ROLE_LABEL, Object, Settings
from tandem_operator.plan.status import LinkTest, TierFacts, TrafficFacts, is_ready

# A passed test holds while both pods live; this bounds how long a later fault stays unseen.
RETEST_AFTER_S = 600.0
RETRY_AFTER_S = 5.0
TIMEOUT_S = 5.0
MAX_REPLY_BYTES = 64 * 1024


async def ask_json(
    host: str,
    port: int,
    path: str,
    body: Object | None = None,
    token: str = "",
    timeout_s: float = TIMEOUT_S,
    method: str | None = None,
) -> tuple[int, Any]:
    """GET, or send a small JSON object (POST unless said otherwise); status and parsed reply.

    Raises OSError, TimeoutError or ValueError when there is no usable answer.
    """
    data = b"" if body is None else json.dumps(body).encode()
    method = method or ("GET" if body is None else "POST")
    head = (
        f"{method} {path} HTTP/1.1\r\nHost: {host}:{port}\r\n"
        f"Connection: close\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\nx-tandem-peer-token: {token}\r\n\r\n"
    )
    async with asyncio.timeout(timeout_s):
        reader, writer = await asyncio.open_connection(host, port)
        try:
            writer.write(head.encode() + data)
            await writer.drain()
            reply = await reader.read(MAX_REPLY_BYTES)
            while more := await reader.read(MAX_REPLY_BYTES):
                reply += more
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
    top, _, content = reply.partition(b"\r\n\r\n")
    status = int(top.split(b" ", 2)[1])
    if b"transfer-encoding: chunked" in top.lower():
        content = _unchunk(content)
    return status, json.loads(content)


def _unchunk(content: bytes) -> bytes:
    out = b""
    while content:
        size_text, _, rest = content.partition(b"\r\n")
        size = int(size_text.split(b";")[0] or b"0", 16)
        if size == 0:
            break
        out, content = out + rest[:size], rest[size + 2 :]
    return out


class WorkerPods:
    """Talks to worker pods with the token of their namespace; remembers link tests for a while."""

    def __init__(self, api: ClusterApi, settings: Settings, clock: Callable[[], float]) -> None:
        self._api = api
        self._settings = settings
        self._clock = clock
        self._results: dict[tuple[str, ...], tuple[float, LinkTest]] = {}

    async def test_link(self, pods: list[Object]) -> LinkTest:
        """The result for a Model's pods; unknown while a role has no ready pod."""
        prefill, decode = _first(pods, "prefill"), _first(pods, "decode")
        if prefill is None or decode is None:
            return LinkTest(None, "needs a ready worker of both roles")
        key = (*_identity(prefill), *_identity(decode))
        now = self._clock()
        if (known := self._results.get(key)) is not None:
            when, result = known
            if now - when < (RETEST_AFTER_S if result.ok else RETRY_AFTER_S):
                return result
        result = await self._test(prefill, decode)
        self._results = {k: v for k, v in self._results.items() if now - v[0] < 2 * RETEST_AFTER_S}
        self._results[key] = (now, result)
        return result

    async def busy(self, pods: list[Object]) -> dict[str, int]:
        """Requests that each pod runs or queues, by name; pods that do not answer are left out."""
        if not pods:
            return {}
        token = await self._token(pods[0]["metadata"]["namespace"])
        port = self._settings.worker_port
        answers = await asyncio.gather(
            *(
                ask_json(p["status"]["podIP"], port, "/v1/load", token=token, timeout_s=2.0)
                for p in pods
            ),
            return_exceptions=True,
        )
        found = {}
        for pod, answer in zip(pods, answers, strict=True):
            if isinstance(answer, tuple) and answer[0] == 200 and isinstance(answer[1], dict):
                load = answer[1]
                count = int(load.get("num_running") or 0) + int(load.get("num_waiting") or 0)
                found[pod["metadata"]["name"]] = count
        return found

    async def _token(self, namespace: str) -> str:
        secret = await self._api.get("Secret", namespace, PEER_SECRET)
        encoded = ((secret or {}).get("data") or {}).get("token", "")
        return base64.b64decode(encoded).decode()

    async def _test(self, prefill: Object, decode: Object) -> LinkTest:
        namespace = prefill["metadata"]["namespace"]
        token = await self._token(namespace)
        address = f"{decode['status']['podIP']}:{self._settings.kv_port}"
        host, port = prefill["status"]["podIP"], self._settings.worker_port
        pair = f"{prefill['metadata']['name']} to {decode['metadata']['name']}"
        try:
            status, reply = await ask_json(
                host, port, "/internal/kv-link", {"address": address}, token
            )
        except (OSError, TimeoutError, ValueError, IndexError) as error:
            return LinkTest(False, f"{pair}: no answer from the prefill worker ({error!r})")
        if status != 200 or not isinstance(reply, dict):
            return LinkTest(False, f"{pair}: the prefill worker answered {status}")
        if reply.get("ok"):
            size = int(reply.get("num_bytes") or 0)
            return LinkTest(True, f"{pair}: a block of {size} bytes arrived unchanged")
        return LinkTest(False, f"{pair}: {reply.get('error')}")


def _first(pods: list[Object], role: str) -> Object | None:
    ready = [p for p in pods if p["metadata"]["labels"].get(ROLE_LABEL) == role and is_ready(p)]
    return min(ready, key=lambda p: p["metadata"]["name"], default=None)


def _identity(pod: Object) -> tuple[str, str]:
    statuses = (pod.get("status") or {}).get("containerStatuses") or []
    return pod["metadata"]["uid"], str(sum(s.get("restartCount", 0) for s in statuses))


async def router_traffic(pods: list[Object], port: int) -> TrafficFacts | None:
    """What the ready pods of a Router measured, averaged; None when none answers."""
    ready = [p for p in pods if is_ready(p)]
    answers = await asyncio.gather(
        *(ask_json(p["status"]["podIP"], port, "/admin/state", timeout_s=2.0) for p in ready),
        return_exceptions=True,
    )
    states: list[Object] = [
        a[1] for a in answers if isinstance(a, tuple) and a[0] == 200 and isinstance(a[1], dict)
    ]
    if not states:
        return None
    tiers: dict[str, list[Object]] = {}
    for state in states:
        for tier in state.get("tiers") or []:
            tiers.setdefault(str(tier.get("name")), []).append(tier)
    first = states[0]
    points = first.get("set_points") or {}
    return TrafficFacts(
        predictor=str(first.get("predictor") or ""),
        threshold=_mean([points], "gain_threshold"),
        tiers={
            name: TierFacts(
                share=_mean(entries, "recent_share"),
                ttft_s=_mean(entries, "ttft_s"),
                tpot_s=_mean(entries, "tpot_s"),
            )
            for name, entries in tiers.items()
        },
    )


def _mean(entries: list[Object], key: str) -> float | None:
    values = [float(e[key]) for e in entries if isinstance(e.get(key), (int, float))]
    return sum(values) / len(values) if values else None
