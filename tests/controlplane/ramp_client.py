"""A client inside the cluster's network: requests come at 2, then 10, then 1 a second.

usage: ramp_client.py NAMESPACE SECONDS
The ramp is llm-d's, squeezed into SECONDS (4,200 are its own length): a while at two, as long up to
ten, as long there, as long down to one, a while at one. Arrivals do not wait for answers. Prints a
summary as JSON. There is no kube-proxy: the client asks a ready address of the router's Service.
"""

from __future__ import annotations

import asyncio
import collections
import json
import random
import subprocess
import sys
import time

import httpx

KNOTS = ((0.0, 2.0), (1 / 7, 2.0), (5 / 14, 10.0), (4 / 7, 10.0), (11 / 14, 1.0), (1.0, 1.0))
MOST = 10.0
NUM_TOKENS = 16
QUESTIONS = (
    "What is 14+5?",
    "Sort the letters QZSR.",
    "What is 2*9?",
    "What is 764-533?",
    "Sort the letters TQAXZMPB.",
    "What is 3*7+4*8-6?",
)


def rate(part: float) -> float:
    """Requests per second after this part of the ramp."""
    for (left, low), (right, high) in zip(KNOTS, KNOTS[1:], strict=False):
        if part <= right:
            return low + (high - low) * (part - left) / (right - left)
    return KNOTS[-1][1]


def arrivals(seconds: float, seed: int) -> list[float]:
    """Times of a Poisson process of that rate, by thinning."""
    rng, now, found = random.Random(seed), 0.0, []
    while True:
        now += rng.expovariate(MOST)
        if now >= seconds:
            return found
        if rng.random() < rate(now / seconds) / MOST:
            found.append(now)


def router(namespace: str) -> str:
    """Base URL of a ready router."""
    selector = "kubernetes.io/service-name=chat-router"
    command = ["kubectl", "get", "endpointslices", "-n", namespace, "-l", selector, "-o", "json"]
    found = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    ready = [
        (address, piece["ports"][0]["port"])
        for piece in found["items"]
        for endpoint in piece.get("endpoints") or []
        if endpoint["conditions"].get("ready")
        for address in endpoint["addresses"]
    ]
    host, port = ready[0]
    return f"http://{host}:{port}"


async def main(namespace: str, seconds: float) -> None:
    url = f"{router(namespace)}/v1/chat/completions"
    broken: list[str] = []
    tiers: collections.Counter[str] = collections.Counter()
    ttft_s: list[float] = []

    async def ask(client: httpx.AsyncClient, number: int) -> None:
        body = {
            "model": "chat",
            "messages": [{"role": "user", "content": QUESTIONS[number % len(QUESTIONS)]}],
            "temperature": 0,
            "max_tokens": NUM_TOKENS,
            "ignore_eos": True,
            "stream": True,
        }
        began, first, ended = time.monotonic(), None, ""
        try:
            async with client.stream("POST", url, json=body) as reply:
                async for line in reply.aiter_lines():
                    first = first or time.monotonic() - began
                    ended = line or ended
                if reply.status_code != 200 or ended != "data: [DONE]":
                    broken.append(f"{reply.status_code}: {ended[:200]}")
                tiers[reply.headers.get("x-tandem-tier", "")] += 1
        except httpx.HTTPError as error:
            broken.append(repr(error))
        ttft_s.append(first if first is not None else time.monotonic() - began)

    began = time.monotonic()
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=120, trust_env=False, limits=limits) as client:
        asked = []
        for number, at_s in enumerate(arrivals(seconds, seed=1)):
            await asyncio.sleep(max(0.0, began + at_s - time.monotonic()))
            asked.append(asyncio.create_task(ask(client, number)))
        await asyncio.gather(*asked)
    found = sorted(ttft_s)
    summary = {
        "asked": len(asked),
        "broken": broken,
        "tiers": tiers,
        "p50_ttft_s": found[len(found) // 2],
        "p95_ttft_s": found[int(0.95 * len(found))],
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], float(sys.argv[2])))
