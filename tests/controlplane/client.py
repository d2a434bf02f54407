"""A client inside the cluster's network: asks questions, prints what came back as JSON.

usage: client.py ENDPOINTSLICE_SELECTOR SECONDS CONCURRENCY MODEL [MODEL...]
Finds the router's ready addresses through `kubectl get endpointslices` (there is no kube-proxy)
before each request, streams answers until the time is over, and counts whole and broken streams.
"""

from __future__ import annotations

import asyncio
import collections
import json
import subprocess
import sys
import time

import httpx

QUESTIONS = ("What is 14+5?", "Sort the letters QZSR.", "What is 2*9?", "What is 764-533?")


def addresses(selector: str) -> list[str]:
    """Base URLs of the endpoints that are ready now."""
    output = subprocess.run(
        ["kubectl", "get", "endpointslices", "-l", selector, "-o", "json"],
        capture_output=True,
        check=True,
    ).stdout
    found = []
    for piece in json.loads(output)["items"]:
        port = piece["ports"][0]["port"]
        for endpoint in piece.get("endpoints") or []:
            if endpoint.get("conditions", {}).get("ready"):
                found += [f"http://{address}:{port}" for address in endpoint["addresses"]]
    return found


async def ask(client: httpx.AsyncClient, base: str, model: str, number: int) -> dict[str, object]:
    """One streamed answer: tier, status, and whether the stream ended as it should."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": QUESTIONS[number % len(QUESTIONS)]}],
        "temperature": 0,
        "max_tokens": 64,
        "stream": True,
    }
    text, whole, error = "", False, ""
    try:
        async with client.stream("POST", f"{base}/v1/chat/completions", json=body) as reply:
            tier = reply.headers.get("x-tandem-tier", "")
            async for line in reply.aiter_lines():
                if line == "data: [DONE]":
                    whole = True
                elif line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    error = str(event.get("error", "")) or error
                    for choice in event.get("choices", []):
                        text += choice["delta"].get("content") or ""
                elif line and reply.status_code != 200:
                    error = line
            return {
                "status": reply.status_code,
                "tier": tier,
                "whole": whole,
                "text": text,
                "error": error,
            }
    except httpx.HTTPError as broken:
        return {"status": 0, "tier": "", "whole": False, "text": text, "error": repr(broken)}


async def main(selector: str, seconds: float, concurrency: int, models: list[str]) -> None:
    results: list[dict[str, object]] = []
    known = await asyncio.to_thread(addresses, selector)
    ends = time.monotonic() + seconds

    async def refresh() -> None:
        while True:
            await asyncio.sleep(0.5)
            found = await asyncio.to_thread(addresses, selector)
            if found:
                known[:] = found

    async def one(start: int, client: httpx.AsyncClient) -> None:
        number = start
        while time.monotonic() < ends or number == start:
            model = models[number % len(models)]
            results.append(await ask(client, known[number % len(known)], model, number))
            number += concurrency

    refresher = asyncio.create_task(refresh())
    async with httpx.AsyncClient(timeout=90, trust_env=False) as client:
        await asyncio.gather(*(one(i, client) for i in range(concurrency)))
    refresher.cancel()
    tiers = collections.Counter(str(r["tier"]) for r in results)
    broken = [r for r in results if r["status"] != 200 or not r["whole"] or r["error"]]
    print(json.dumps({"asked": len(results), "broken": broken, "tiers": tiers}))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]))
