"""Tries requests with all rights but one; runs inside the cluster's network.

usage: rights.py PKI_FOLDER APISERVER < trials.json
Each trial is {"rules": the rules that stay, "requests": [[method, path, body], ...], "proof": one
more}. The rules are bound to a user of their own and all requests are made as that user. The proof
is one that the rules allow: it is tried until it is no longer forbidden, so that a "forbidden"
afterwards is the missing right and not a binding that has yet to arrive. Prints for each trial the
statuses of its requests.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import sys
from pathlib import Path
from typing import Any

import httpx

RBAC = "/apis/rbac.authorization.k8s.io/v1"
FORBIDDEN = 403
MAX_TRIES = 100
CONTENT_TYPES = {"PATCH": "application/apply-patch+yaml"}


async def send(client: httpx.AsyncClient, request: list[Any], user: str | None = None) -> int:
    """The status of a request; a watch is closed at once."""
    method, path, body = request
    headers = {"content-type": CONTENT_TYPES.get(method, "application/json")}
    if user is not None:
        headers["impersonate-user"] = user
    content = None if body is None else json.dumps(body)
    async with client.stream(method, path, content=content, headers=headers) as reply:
        return reply.status_code


async def trial(client: httpx.AsyncClient, number: int, case: dict[str, Any]) -> list[int]:
    """The statuses that a user with the case's rules gets."""
    name = f"rights-{number}"
    role = {"metadata": {"name": name}, "rules": case["rules"]}
    binding = {
        "metadata": {"name": name},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": name},
        "subjects": [{"kind": "User", "name": name, "apiGroup": "rbac.authorization.k8s.io"}],
    }
    for kind, body in (("clusterroles", role), ("clusterrolebindings", binding)):
        status = await send(client, ["POST", f"{RBAC}/{kind}", body])
        if status != 201:
            raise RuntimeError(f"{kind}/{name}: {status}")
    try:
        for _ in range(MAX_TRIES):
            if await send(client, case["proof"], name) != FORBIDDEN:
                return [await send(client, r, name) for r in case["requests"]]
            await asyncio.sleep(0.05)
        raise RuntimeError(f"{case['proof']} stays forbidden for {case['rules']}")
    finally:
        for kind in ("clusterrolebindings", "clusterroles"):
            await send(client, ["DELETE", f"{RBAC}/{kind}/{name}", None])


async def main(pki: Path, server: str) -> None:
    cases = json.load(sys.stdin)
    context = ssl.create_default_context(cafile=str(pki / "ca.crt"))
    context.load_cert_chain(pki / "admin.crt", pki / "admin.key")
    limits = httpx.Limits(max_connections=8)
    async with httpx.AsyncClient(
        base_url=server, verify=context, trust_env=False, limits=limits, timeout=30
    ) as client:
        gate = asyncio.Semaphore(8)

        async def one(number: int, case: dict[str, Any]) -> list[int]:
            async with gate:
                return await trial(client, number, case)

        print(json.dumps(await asyncio.gather(*(one(i, c) for i, c in enumerate(cases)))))


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2]))
