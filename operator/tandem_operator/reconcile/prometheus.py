"""What the queries of an AutoscalingPolicy say: a number per pool, or why there is none.

The server is the installation's (`operator.prometheusUrl`), never a policy's: who may write a
policy may not make the operator call addresses of their choice.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial
from typing import Any

import httpx

from tandem_operator.autoscale.sizing import Role
from tandem_operator.resources import Router
from tandem_operator.resources.autoscaling import PROMETHEUS, AutoscalingPolicySpec

MAX_REPLY_BYTES = 2**20
TIMEOUT_S = 2.0
_NAMES = re.compile(r"\$(namespace|router|tier|role)\b")

Query = Callable[[str, str], Awaitable[float]]
"""(server, query) -> its number. Raises QueryError."""


class QueryError(Exception):
    """A query gave no number; the message says why."""


async def query_prometheus(url: str, query: str) -> float:
    """The one number that a query has now."""
    content = bytearray()
    try:
        async with (
            asyncio.timeout(TIMEOUT_S),
            httpx.AsyncClient(trust_env=False, timeout=None) as client,
            client.stream(
                "POST", f"{url.rstrip('/')}/api/v1/query", data={"query": query}
            ) as reply,
        ):
            async for part in reply.aiter_bytes():
                content += part
                if len(content) > MAX_REPLY_BYTES:
                    raise QueryError(f"answers with more than {MAX_REPLY_BYTES} bytes")
    except (TimeoutError, httpx.HTTPError, httpx.InvalidURL) as error:
        raise QueryError(f"Prometheus does not answer: {error or 'late'}") from error
    try:
        body = json.loads(content)
    except ValueError as error:
        raise QueryError(f"Prometheus answers {reply.status_code} without JSON") from error
    return number_of(body)


def number_of(body: Any) -> float:
    """The one number in an answer of `/api/v1/query`. Raises QueryError."""
    if not isinstance(body, dict) or body.get("status") != "success":
        said = body.get("error", "no success") if isinstance(body, dict) else "no object"
        raise QueryError(f"Prometheus says: {str(said)[:200]}")
    data = body.get("data")
    kind = data.get("resultType") if isinstance(data, dict) else None
    result = data.get("result") if isinstance(data, dict) else None
    if kind == "vector" and isinstance(result, list):
        if len(result) != 1:
            raise QueryError(f"{len(result)} series instead of one; put sum(...) around it")
        result = result[0].get("value") if isinstance(result[0], dict) else None
    elif kind != "scalar":
        raise QueryError(f"a {kind} instead of one number")
    try:
        value = float(result[1])  # type: ignore[index]
    except (TypeError, ValueError, IndexError, KeyError) as error:
        raise QueryError(f"no number but {str(result)[:60]}") from error
    if not math.isfinite(value):
        raise QueryError(f"{value:g} is no number to scale by")
    return value


def _name(names: Mapping[str, str], found: re.Match[str]) -> str:
    return names[found[1]]


async def queried(
    url: str,
    router: Router,
    policy: AutoscalingPolicySpec | None,
    pools: Iterable[tuple[str, Role]],
    query: Query = query_prometheus,
) -> Mapping[tuple[str, Role], float | str]:
    """What the policy's queries say of each pool: the number, or why there is none."""
    if policy is None or policy.query is None:
        return {}
    wanted: dict[tuple[str, Role], str] = {}
    for tier, role in pools:
        if any(signal.name == PROMETHEUS for signal in getattr(policy, role).signals):
            names = {
                "namespace": router.metadata.namespace,
                "router": router.metadata.name,
                "tier": tier,
                "role": role,
            }
            wanted[tier, role] = _NAMES.sub(partial(_name, names), policy.query)

    async def ask(text: str) -> float | str:
        if not url:
            return "the operator knows no Prometheus; set operator.prometheusUrl of the chart"
        try:
            return await query(url, text)
        except QueryError as error:
            return str(error)

    texts = list(dict.fromkeys(wanted.values()))
    answers = dict(zip(texts, await asyncio.gather(*map(ask, texts)), strict=True))
    return {pool: answers[text] for pool, text in wanted.items()}
