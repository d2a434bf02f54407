"""`tandem up` with a pool that sleeps: the request that wakes it is held and then answered."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import httpx

from eventually import eventually_in_another_process
from stack_kit import EXAMPLE, Stack, start, stop

SLEEPY = f"""\
apiVersion: tandem.dev/v1alpha1
kind: Model
metadata: {{name: small}}
spec:
  weights: {{source: "file://{EXAMPLE.parent}/models/small"}}
  engine: {{maxNumSeqs: 16, maxBatchedTokens: 512, kvCacheMemory: 64Mi}}
  unified: {{replicas: 1}}
---
apiVersion: tandem.dev/v1alpha1
kind: Router
metadata: {{name: chat}}
spec:
  tiers:
  - {{name: small, modelRef: {{name: small}}}}
  scaling: {{mode: Managed, policyRef: {{name: sleepy}}}}
---
apiVersion: tandem.dev/v1alpha1
kind: AutoscalingPolicy
metadata: {{name: sleepy}}
spec:
  idle: {{scaleToZero: true, after: 2s}}
"""
QUESTION = {"model": "small", "messages": [{"role": "user", "content": "What is 2*9?"}]}


def ask(stack: Stack) -> httpx.Response:
    url = f"{stack.url}/v1/chat/completions"
    return httpx.post(url, json=QUESTION, timeout=100, trust_env=False)


def workers(stack: Stack) -> list[Any]:
    pods = stack.get("pods")["items"]
    return [p for p in pods if "tandem.dev/role" in p["metadata"]["labels"]]


def asleep(stack: Stack) -> None:
    """Wait until no worker is left."""
    eventually_in_another_process(lambda: not workers(stack), told=lambda: stack.tandem("get"))


def test_an_idle_pool_sleeps_and_wakes_and_one_scaled_by_hand_is_waited_for(
    tmp_path: Path,
) -> None:
    example = tmp_path / "sleepy.yaml"
    example.write_text(SLEEPY)
    stack = start(tmp_path, "sleepy", example=example)
    try:
        asleep(stack)
        woken = ask(stack)
        after = workers(stack)

        example.write_text(
            SLEEPY.replace("mode: Managed, policyRef: {name: sleepy}", "mode: External")
        )
        stack.tandem("apply", str(example))
        stack.tandem("scale", "workerpool", "small-unified", "--replicas", "0")
        asleep(stack)
        held: list[httpx.Response] = []
        asking = threading.Thread(target=lambda: held.append(ask(stack)))
        asking.start()
        asking.join(timeout=3.0)
        answered_early = list(held)
        stack.tandem("scale", "workerpool", "small-unified", "--replicas", "1")
        asking.join()
    finally:
        status = stop(stack)

    assert woken.status_code == 200, woken.text
    assert len(after) == 1
    assert answered_early == []
    assert [reply.status_code for reply in held] == [200]
    assert status == 0
