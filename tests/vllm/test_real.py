"""Two real vLLM servers under a Router in `tandem up`, started once for all that is asked here."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from eventually import eventually_in_another_process
from stack_kit import ROOT, Stack, process_of, start, stop

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
QUICK = """\
---
apiVersion: tandem.dev/v1alpha1
kind: AutoscalingPolicy
metadata: {name: quick}
spec:
  unified:
    signals: [{name: RunningRequests, target: "8"}]
    down: {window: 1s, maxStep: 1, period: 1s}
"""
STREAMS = 8
LONG = {
    "model": "large",
    "messages": [{"role": "user", "content": "12 + 34 ="}],
    "temperature": 0,
    "max_tokens": 400,
    "stream": True,
    "ignore_eos": True,
    "stream_options": {"include_usage": True},
}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Skips where the CPU cannot run vLLM; a set-up that fails is a failure."""
    script = ROOT / "scripts" / "vllm_setup.py"
    made = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    if made.returncode == 3:
        pytest.skip(made.stderr.strip())
    assert made.returncode == 0, made.stderr
    folder = tmp_path_factory.mktemp("vllm")
    image = f"vllm={made.stdout.strip()}"
    running = start(folder, "vllm", "--image", image, example=HERE / "vllm.yaml")
    try:
        yield running
    finally:
        stop(running)


def test_two_real_servers_serve_a_tier(stack: Stack) -> None:
    """One test, so that it runs in one process however the suite is spread."""
    check_that_the_openai_client_speaks_to_vllm_through_the_router(stack)
    check_that_schemas_and_tools_pass_through(stack)
    check_that_both_tiers_answer_and_a_floor_changes_while_running(stack)
    check_that_a_server_killed_under_load_loses_and_changes_no_token(stack)
    check_that_the_loop_takes_a_server_that_nobody_needs(stack)
    check_that_scaling_down_drains_and_breaks_no_stream(stack)


class Reader:
    """Reads one stream and may do something after so many chunks."""

    def __init__(self, url: str, body: dict[str, Any]) -> None:
        self.text, self.usage, self.heads, self.errors = "", None, set(), []
        self._url, self._body = url, body

    def run(self, after: int = -1, do: Any = None) -> Reader:
        with httpx.stream("POST", self._url, json=self._body, timeout=120) as reply:
            num = 0
            for line in reply.iter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    self.errors.append(chunk)
                    continue
                assert "token_ids" not in line
                self.heads.add((chunk["id"], chunk["created"], chunk["object"]))
                self.usage = chunk.get("usage") or self.usage
                self.text += "".join(c["delta"].get("content") or "" for c in chunk["choices"])
                num += 1
                if num == after:
                    do()
        return self


def servers(stack: Stack) -> dict[str, int]:
    """The process of each vLLM server, by its address."""
    return {f"http://{pod['status']['podIP']}:8100": process_of(pod) for pod in large_pods(stack)}


def large_pods(stack: Stack) -> list[dict[str, Any]]:
    pods = stack.get("pods")["items"]
    return [p for p in pods if p["metadata"]["labels"].get("tandem.dev/model") == "large"]


def wait_for_ready(stack: Stack, number: int) -> None:
    def are_ready() -> bool:
        state = httpx.get(f"{stack.url}/admin/state").json()
        usable = [w for w in state["workers"] if w["tier"] == "large" and w["usable"]]
        return len(usable) == number and len(large_pods(stack)) == number

    eventually_in_another_process(are_ready, 240.0, 1.5, lambda: stack.tandem("get", "all"))


def change_router(stack: Stack, old: str, new: str, more: str = "") -> None:
    """Apply the example's Router with one thing changed, and perhaps another object."""
    router = (HERE / "vllm.yaml").read_text().split("---\n")[-1]
    assert router.count(old) == 1
    text = router.replace(old, new).replace("image:///opt/tandem/", f"file://{ROOT}/")
    changed = stack.log.parent / "changed.yaml"
    changed.write_text(text + more)
    stack.tandem("apply", str(changed))


def check_that_the_openai_client_speaks_to_vllm_through_the_router(stack: Stack) -> None:
    client = openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none")
    words: Any = [{"role": "user", "content": "3 + 4 ="}]

    whole = client.chat.completions.create(model="large", messages=words, temperature=0)
    streamed = client.chat.completions.create(
        model="large", messages=words, temperature=0, stream=True
    )
    text = "".join(c.choices[0].delta.content or "" for c in streamed if c.choices)
    listed = client.completions.create(
        model="large", prompt=[20, 222, 12], max_tokens=2, logprobs=1, temperature=0
    )

    assert whole.model == "large"
    assert text == whole.choices[0].message.content
    assert listed.choices[0].logprobs is not None


def check_that_schemas_and_tools_pass_through(stack: Stack) -> None:
    words = [{"role": "user", "content": "3 + 4 ="}]
    schema = {"type": "string", "enum": ["yes", "no"]}
    shape = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    tool = {"name": "add", "parameters": {"type": "object", "properties": {}, "required": []}}
    order = {"model": "large", "messages": words, "temperature": 0, "max_tokens": 60}

    structured = httpx.post(
        f"{stack.url}/v1/chat/completions", json={**order, "response_format": shape}, timeout=60
    ).json()
    called = httpx.post(
        f"{stack.url}/v1/chat/completions",
        json={**order, "tools": [{"type": "function", "function": tool}]},
        timeout=60,
    )

    assert json.loads(structured["choices"][0]["message"]["content"]) in ("yes", "no")
    assert called.status_code == 200, called.text


def check_that_both_tiers_answer_and_a_floor_changes_while_running(stack: Stack) -> None:
    def tier_of(question: str) -> str:
        body = {"model": "chat", "messages": [{"role": "user", "content": question}]}
        reply = httpx.post(
            f"{stack.url}/v1/chat/completions", json={**body, "max_tokens": 4}, timeout=60
        )
        return reply.headers["x-tandem-tier"]

    def threshold() -> float:
        points = httpx.get(f"{stack.url}/admin/state").json()["set_points"]
        return float(points["gain_threshold"])

    easy, hard = "2 + 3 =", "85 * 67 ="
    tier_of(easy)  # the first score of a router may come late
    before, held = [tier_of(easy), tier_of(hard)], threshold()
    pods = {p["metadata"]["uid"] for p in stack.get("pods")["items"]}
    change_router(stack, 'qualityFloor: "0.9975"', 'qualityFloor: "0.6"')
    # A lower floor asks for a larger gain before the large tier is worth it.
    eventually_in_another_process(lambda: threshold() > held, every_s=0.5)

    assert before == ["small", "large"]
    assert httpx.get(f"{stack.url}/admin/state").json()["quality_floor"] == 0.6
    assert {p["metadata"]["uid"] for p in stack.get("pods")["items"]} == pods


def check_that_a_server_killed_under_load_loses_and_changes_no_token(stack: Stack) -> None:
    url = f"{stack.url}/v1/chat/completions"
    asked = [
        {**LONG, "max_tokens": 120, "messages": [{"role": "user", "content": f"{n} + 34 ="}]}
        for n in range(11, 11 + STREAMS)
    ]

    def streams(after: int = -1, do: Any = None) -> list[Reader]:
        """All at once; the first one does something after so many chunks."""
        with ThreadPoolExecutor(STREAMS) as pool:
            rest = [pool.submit(Reader(url, body).run) for body in asked[1:]]
            return [Reader(url, asked[0]).run(after, do), *(each.result() for each in rest)]

    undisturbed = streams()
    processes = servers(stack)
    moved: list[int] = []

    def kill() -> None:
        workers = httpx.get(f"{stack.url}/admin/state").json()["workers"]
        busiest = max((w for w in workers if w["tier"] == "large"), key=lambda w: w["num_inflight"])
        moved.append(busiest["num_inflight"])
        os.kill(processes[busiest["url"]], signal.SIGKILL)

    cut = streams(40, kill)

    assert [reader.errors for reader in cut] == [[]] * STREAMS
    assert [reader.text for reader in cut] == [reader.text for reader in undisturbed]
    assert [len(reader.heads) for reader in cut] == [1] * STREAMS
    assert [reader.usage for reader in cut] == [reader.usage for reader in undisturbed]
    counted = httpx.get(f"{stack.url}/metrics").text
    assert moved[0] > 1
    assert f'tandem_resumptions_total{{kind="exact",tier="large"}} {moved[0]}.0' in counted


def check_that_the_loop_takes_a_server_that_nobody_needs(stack: Stack) -> None:
    """Fewer, by what vLLM's metrics say; the killed one, which is starting again, goes first."""
    change_router(stack, "mode: External", "mode: Managed, policyRef: {name: quick}", QUICK)

    wait_for_ready(stack, 1)

    change_router(stack, "mode: External", "mode: External")


def check_that_scaling_down_drains_and_breaks_no_stream(stack: Stack) -> None:
    url = f"{stack.url}/v1/chat/completions"
    begun = [threading.Event() for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        streams = [pool.submit(Reader(url, LONG).run, 20, event.set) for event in begun]
        for event in begun:
            assert event.wait(120)
        stack.tandem("scale", "workerpool", "large-unified", "--replicas", "0")
        ended = [stream.result() for stream in streams]
    wait_for_ready(stack, 0)

    assert [reader.errors for reader in ended] == [[]] * 2
    assert {reader.usage["completion_tokens"] for reader in ended if reader.usage} == {400}
