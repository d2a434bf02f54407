"""A client inside the cluster's network: asks questions, prints what came back as JSON.

usage: client.py ENDPOINTSLICE_SELECTOR SECONDS CONCURRENCY MODEL [MODEL...]
Prints the line "answered" after the first CONCURRENCY answers, and a summary at the end.
There is no kube-proxy, so the client does what one does: it follows the Service's EndpointSlices
and sends to the ready addresses in turn; while the apiserver is away it keeps those it knows.
Nothing is ever sent twice. Of three answers two are streamed and one is whole; one of three askers
wants long ones. All answers of one tier to one question must be equal as far as they go, since
nothing is sampled: so a token that is lost or repeated on the way shows. With SECONDS 0 it goes on
until its standard input ends.
"""

from __future__ import annotations

import asyncio
import collections
import json
import os
import ssl
import sys
import time
from pathlib import Path

import httpx

QUESTIONS = ("What is 14+5?", "Sort the letters QZSR.", "What is 2*9?", "What is 764-533?")
NUM_TOKENS = 48
# Such an answer outlasts the pause before a pod's SIGTERM.
NUM_LONG_TOKENS = 320
# Between two requests of one asker, so that the load is steady and leaves room for what is tested.
PAUSE_S = 0.25
REFRESH_S = 0.25


def apiserver() -> httpx.AsyncClient:
    """A client of the cluster that KUBECONFIG names (JSON, as `pki.write_kubeconfig` writes)."""
    config = json.loads(Path(os.environ["KUBECONFIG"]).read_text())
    cluster, user = config["clusters"][0]["cluster"], config["users"][0]["user"]
    context = ssl.create_default_context(cafile=cluster["certificate-authority"])
    context.load_cert_chain(user["client-certificate"], user["client-key"])
    return httpx.AsyncClient(
        base_url=cluster["server"], verify=context, timeout=5.0, trust_env=False
    )


async def addresses(api: httpx.AsyncClient, selector: str) -> list[str]:
    """Base URLs of the endpoints that are ready now."""
    path = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices"
    response = await api.get(path, params={"labelSelector": selector})
    response.raise_for_status()
    found = []
    for piece in response.json()["items"]:
        port = piece["ports"][0]["port"]
        for endpoint in piece.get("endpoints") or []:
            if endpoint.get("conditions", {}).get("ready"):
                hosts = (f"[{a}]" if ":" in a else a for a in endpoint["addresses"])
                found += [f"http://{host}:{port}" for host in hosts]
    return found


async def ask(
    client: httpx.AsyncClient, base: str, model: str, question: str, num_tokens: int, stream: bool
) -> dict[str, object]:
    """One answer: tier, status, text, and whether it ended as it should."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": num_tokens,
        "ignore_eos": True,
        "stream": stream,
    }
    url = f"{base}/v1/chat/completions"
    result: dict[str, object] = {"router": base, "stream": stream, "question": question}
    text, whole, error, status, tier = "", False, "", 0, ""
    try:
        if stream:
            async with client.stream("POST", url, json=body) as reply:
                status, tier = reply.status_code, reply.headers.get("x-tandem-tier", "")
                async for line in reply.aiter_lines():
                    if line == "data: [DONE]":
                        whole = True
                    elif line.startswith("data: {"):
                        event = json.loads(line.removeprefix("data: "))
                        error = str(event.get("error", "")) or error
                        for choice in event.get("choices", []):
                            text += choice["delta"].get("content") or ""
                    elif line and status != 200:
                        error = line
        else:
            reply = await client.post(url, json=body)
            status, tier = reply.status_code, reply.headers.get("x-tandem-tier", "")
            if status == 200:
                choice = reply.json()["choices"][0]
                text, whole = choice["message"]["content"], choice["finish_reason"] == "length"
            else:
                error = reply.text
    except httpx.HTTPError as broken:
        error = repr(broken)
    return {**result, "status": status, "tier": tier, "whole": whole, "text": text, "error": error}


def unequal(results: list[dict[str, object]]) -> list[list[str]]:
    """Answers of one tier to one question of which none is the other's beginning."""
    texts: dict[tuple[object, object], set[str]] = collections.defaultdict(set)
    for r in results:
        if r["status"] == 200 and r["whole"]:
            texts[(r["tier"], r["question"])].add(str(r["text"]))
    return [
        sorted(found)
        for found in texts.values()
        if not all(max(found, key=len).startswith(text) for text in found)
    ]


async def main(selector: str, seconds: float, concurrency: int, models: list[str]) -> None:
    results: list[dict[str, object]] = []
    api = apiserver()
    known = await addresses(api, selector)
    stop = asyncio.Event()

    async def refresh() -> None:
        while True:
            await asyncio.sleep(REFRESH_S)
            try:
                known[:] = await addresses(api, selector) or known
            except httpx.HTTPError:
                continue  # the apiserver is away: go on with what is known

    async def one(asker: int, client: httpx.AsyncClient) -> None:
        turn = 0
        while not stop.is_set() or turn == 0:
            base, model = known[(asker + turn) % len(known)], models[(asker + turn) % len(models)]
            question = QUESTIONS[(asker + turn) % len(QUESTIONS)]
            num_tokens = NUM_TOKENS if asker % 3 else NUM_LONG_TOKENS
            started = time.monotonic()
            result = await ask(client, base, model, question, num_tokens, turn % 3 != 0)
            results.append({**result, "seconds": time.monotonic() - started})
            turn += 1
            if len(results) == concurrency:
                print("answered", flush=True)
            await asyncio.sleep(PAUSE_S)

    async def end() -> None:
        if seconds:
            await asyncio.sleep(seconds)
        else:
            await asyncio.to_thread(sys.stdin.read)
        stop.set()

    others = [asyncio.create_task(refresh()), asyncio.create_task(end())]
    async with httpx.AsyncClient(timeout=90, trust_env=False) as client:
        await asyncio.gather(*(one(i, client) for i in range(concurrency)))
    for task in others:
        task.cancel()
    broken = [r for r in results if r["status"] != 200 or not r["whole"] or r["error"]]
    summary = {
        "asked": len(results),
        "broken": broken,
        "unequal": unequal(results),
        "tiers": collections.Counter(str(r["tier"]) for r in results),
        "longest_s": max(float(str(r["seconds"])) for r in results),
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]))
