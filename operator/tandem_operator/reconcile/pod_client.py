"""Asks running pods: the KV link test of a Model, the traffic of a Router."""

from __future__ import annotations

import asyncio
import base64
import json
from collections import Counter
from collections.abc import Callable
from typing import Any

from tandem_operator.plan.model_status import LinkTest, Measured, Remark, WorkerReports
from tandem_operator.plan.objects import PEER_SECRET, ROLE_LABEL, Object, Settings
from tandem_operator.plan.pods import is_ready
from tandem_operator.plan.router_facts import (
    CascadeFacts,
    LatencyFacts,
    PredictorFacts,
    ProfileFacts,
    StoreFacts,
    TierFacts,
    TrafficFacts,
)
from tandem_operator.reconcile.cluster_api import ClusterApi
from tandem_operator.reconcile.engine_reports import EngineReports, handover, is_foreign
from tandem_operator.reconcile.pod_http import ask_pod
from tandem_operator.reconcile.quality_report import quality_facts, retraining_facts

# A passed test holds while both pods live; this bounds how long a later fault stays unseen.
RETEST_AFTER_S = 600.0
RETRY_AFTER_S = 5.0
TIMEOUT_S = 5.0
PATIENCE_S = 1.0  # that one pass has with a link test


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
    method = method or ("GET" if body is None else "POST")
    headers = {"x-tandem-peer-token": token}
    sent = b""
    if body is not None:
        headers["content-type"] = "application/json"
        sent = json.dumps(body).encode()
    async with asyncio.timeout(timeout_s):
        status, content = await ask_pod(host, port, method, path, sent, headers)
    return status, json.loads(content)


async def peer_token(api: ClusterApi, namespace: str) -> str:
    """What routers and workers of a namespace know each other by; empty where there is none yet.

    Raises ApiError when the cluster fails the call.
    """
    secret = await api.get("Secret", namespace, PEER_SECRET)
    encoded = ((secret or {}).get("data") or {}).get("token", "")
    # The first line is sent; the others are accepted while the token is being changed.
    return next(iter(base64.b64decode(encoded).decode().split()), "")


def identity(pod: Object) -> str:
    """The pod and how often it started: a restarted one has forgotten what it knew."""
    statuses = (pod.get("status") or {}).get("containerStatuses") or []
    return f"{pod['metadata'].get('uid')}/{sum(s.get('restartCount', 0) for s in statuses)}"


class WorkerPods:
    """Talks to worker pods with the token of their namespace; remembers link tests for a while."""

    def __init__(self, api: ClusterApi, settings: Settings, clock: Callable[[], float]) -> None:
        self._api = api
        self._settings = settings
        self._clock = clock
        self._results: dict[tuple[str, str], tuple[float, LinkTest]] = {}
        self._reports = EngineReports()
        self._tests: dict[tuple[str, str], asyncio.Task[LinkTest]] = {}

    async def test_link(self, pods: list[Object]) -> LinkTest:
        """The result for a Model's pods; unknown while a role has no ready pod.

        A test that takes long goes on after the call; a later call has its result. Raises ApiError
        when the cluster fails a call.
        """
        prefill, decode = _first(pods, "prefill"), _first(pods, "decode")
        if prefill is None or decode is None:
            return LinkTest(None, "needs a ready worker of both roles")
        key = (identity(prefill), identity(decode))
        now = self._clock()
        known = self._results.get(key)
        if known is not None:
            when, result = known
            if now - when < (RETEST_AFTER_S if result.ok else RETRY_AFTER_S):
                return result
        test = self._tests.get(key)
        if test is None:
            test = self._tests[key] = asyncio.create_task(self._test(prefill, decode))
            test.add_done_callback(lambda done: self._tested(key, done))
        # Workers that do not answer must not keep the passes of all other resources waiting.
        await asyncio.wait({test}, timeout=PATIENCE_S)
        if test.done():
            return test.result()
        return known[1] if known is not None else LinkTest(None, "is being tested")

    def _tested(self, key: tuple[str, str], test: asyncio.Task[LinkTest]) -> None:
        """Keep the result for the passes to come; those of pods long gone are dropped."""
        self._tests.pop(key, None)
        if test.cancelled() or test.exception() is not None:
            return  # whoever waited for it has the error; the next pass tests again
        now = self._clock()
        self._results = {k: v for k, v in self._results.items() if now - v[0] < 2 * RETEST_AFTER_S}
        self._results[key] = (now, test.result())

    async def busy(self, pods: list[Object]) -> dict[str, int]:
        """Requests that each pod runs or queues, by name; pods that do not answer are left out."""
        return {
            name: int(load.get("num_running") or 0) + int(load.get("num_waiting") or 0)
            for name, load in (await self._loads(pods)).items()
        }

    async def reports(self, pods: list[Object]) -> WorkerReports:
        """What pods say of themselves, each asked once; those that do not answer are left out."""
        remarks: dict[str, Remark] = {}
        weights: dict[str, dict[str, str]] = {}
        measured: dict[str, Measured] = {}
        foreign = {pod["metadata"]["name"] for pod in pods if is_foreign(pod)}
        for name, load in (await self._loads(pods)).items():
            notes = tuple(str(note)[:500] for note in load.get("notes") or [])
            if notes or load.get("problem"):
                remarks[name] = Remark(str(load.get("problem") or ""), notes)
            # Other engines know of no identity.
            if name not in foreign and (held := _identity_of_weights(load.get("weights"))):
                weights[name] = held
            cost = load.get("qualification")
            if name not in foreign and isinstance(cost, dict) and cost.get("state"):
                message = str(cost.get("message") or "")[:1024]
                measured[name] = Measured(str(cost["state"])[:32], message)
        return WorkerReports(weights, remarks, measured)

    async def _loads(self, pods: list[Object]) -> dict[str, Object]:
        """`GET /v1/load` of each pod, by name; pods that do not answer are left out."""
        if not pods:
            return {}
        token = await peer_token(self._api, pods[0]["metadata"]["namespace"])
        port = self._settings.worker_port
        answers = await asyncio.gather(
            *(self._load(pod, port, token) for pod in pods),
            return_exceptions=True,
        )
        return {
            pod["metadata"]["name"]: answer[1]
            for pod, answer in zip(pods, answers, strict=True)
            if isinstance(answer, tuple) and answer[0] == 200 and isinstance(answer[1], dict)
        }

    async def _load(self, pod: Object, port: int, token: str) -> tuple[int, Any]:
        if is_foreign(pod):
            return 200, await self._reports.read(pod, port, TIMEOUT_S)
        return await ask_json(pod["status"]["podIP"], port, "/v1/load", token=token, timeout_s=2.0)

    async def _test(self, prefill: Object, decode: Object) -> LinkTest:
        if is_foreign(prefill):
            return await self._handover(prefill, decode)
        namespace = prefill["metadata"]["namespace"]
        token = await peer_token(self._api, namespace)
        to = decode["status"]["podIP"]
        address = f"{f'[{to}]' if ':' in to else to}:{self._settings.kv_port}"
        host, port = prefill["status"]["podIP"], self._settings.worker_port
        pair = f"{prefill['metadata']['name']} to {decode['metadata']['name']}"
        try:
            status, reply = await ask_json(
                host, port, "/internal/kv-link", {"address": address}, token
            )
        except (OSError, TimeoutError, ValueError) as error:
            return LinkTest(False, f"{pair}: no answer from the prefill worker ({error!r})")
        if status != 200 or not isinstance(reply, dict):
            return LinkTest(False, f"{pair}: the prefill worker answered {status}")
        if reply.get("ok"):
            size = int(reply.get("num_bytes") or 0)
            return LinkTest(True, f"{pair}: a block of {size} bytes arrived unchanged")
        return LinkTest(False, f"{pair}: {reply.get('error')}")

    async def _handover(self, prefill: Object, decode: Object) -> LinkTest:
        pair = f"{prefill['metadata']['name']} to {decode['metadata']['name']}"
        try:
            result = await handover(prefill, decode, self._settings.worker_port)
        except (OSError, TimeoutError, ValueError) as error:
            return LinkTest(False, f"{pair}: {error}")
        if result is None:
            return LinkTest(None, f"{pair}: this engine cannot be asked")
        return LinkTest(result[0], f"{pair}: {result[1]}")


def _identity_of_weights(given: Any) -> dict[str, str] | None:
    if not isinstance(given, dict) or len(digest := str(given.get("digest") or "")) != 64:
        return None
    return {"digest": digest} | {
        key: str(given[key])[:limit]
        for key, limit in (("source", 1024), ("commit", 64))
        if given.get(key)
    }


def _first(pods: list[Object], role: str) -> Object | None:
    ready = [p for p in pods if p["metadata"]["labels"].get(ROLE_LABEL) == role and is_ready(p)]
    return min(ready, key=lambda p: p["metadata"]["name"], default=None)


async def router_traffic(pods: list[Object], port: int, token: str = "") -> TrafficFacts | None:
    """What the ready pods of a Router measured, averaged; None when none answers."""
    ready = [p for p in pods if is_ready(p)]
    answers = await asyncio.gather(
        *(
            ask_json(p["status"]["podIP"], port, "/admin/state", token=token, timeout_s=2.0)
            for p in ready
        ),
        return_exceptions=True,
    )
    found: list[tuple[Object, Object]] = [
        (pod, a[1])
        for pod, a in zip(ready, answers, strict=True)
        if isinstance(a, tuple) and a[0] == 200 and isinstance(a[1], dict)
    ]
    if not found:
        return None
    states = [state for _, state in found]
    tiers: dict[str, list[Object]] = {}
    for state in states:
        for tier in state.get("tiers") or []:
            tiers.setdefault(str(tier.get("name")), []).append(tier)
    first = states[0]
    points = first.get("set_points") or {}
    return TrafficFacts(
        predictor=str(first.get("predictor") or ""),
        threshold=_mean([points], "gain_threshold"),
        quality_ratio=_mean(states, "expected_quality_ratio"),
        content_blind_quality_ratio=_mean(states, "content_blind_quality_ratio"),
        tiers={
            name: TierFacts(
                share=_mean(entries, "recent_share"),
                ttft=_latency(entries, "last_ttft"),
                tpot=_latency(entries, "last_tpot"),
                profile=profile_told(entries),
            )
            for name, entries in tiers.items()
        },
        predictors={
            pod["metadata"]["name"]: facts
            for pod, state in found
            if (facts := _artifact(state.get("predictor_artifact"))) is not None
        },
        quality=quality_facts(states),
        threshold_limit=_mean([first.get("threshold") or {}], "limit"),
        lambda_per_usd=_mean([points], "lambda_per_usd") or 0.0,
        store=_store(states),
        retraining=retraining_facts(states),
        cascade=_cascade(states),
    )


def profile_told(entries: list[Object]) -> ProfileFacts | None:
    """The profile of a tier's workers as the first router pod that knows one tells it."""
    for entry in entries:
        told = entry.get("profile")
        if isinstance(told, dict):
            return ProfileFacts(_three(told.get("prefill")), _three(told.get("decode")))
    return None


def _three(numbers: Any) -> tuple[float, float, float] | None:
    if not isinstance(numbers, list) or len(numbers) != 3:
        return None
    good = [
        float(n)
        for n in numbers
        if isinstance(n, int | float) and not isinstance(n, bool) and 0.0 <= n < 1e9
    ]
    return (good[0], good[1], good[2]) if len(good) == 3 else None


def _cascade(states: list[Object]) -> CascadeFacts | None:
    """Counts of all pods, and the trouble of the first that has any."""
    reports = [state["cascade"] for state in states if isinstance(state.get("cascade"), dict)]
    if not reports:
        return None
    counts: dict[str, Counter[str]] = {"zones": Counter(), "outcomes": Counter()}
    for report in reports:
        for name, counter in counts.items():
            found = report.get(name)
            for key, number in (found if isinstance(found, dict) else {}).items():
                if isinstance(number, int):
                    counter[str(key)[:32]] += number
    problems = [str(report["problem"]) for report in reports if report.get("problem")]
    judges = [report["judge"] for report in reports if isinstance(report.get("judge"), dict)]
    troubles = [str(judge["problem"]) for judge in judges if judge.get("problem")]
    return CascadeFacts(
        dict(counts["zones"]),
        dict(counts["outcomes"]),
        problems[0][:500] if problems else "",
        troubles[0][:500] if troubles else "",
    )


def _store(states: list[Object]) -> StoreFacts | None:
    """The store as the pod sees it that has most trouble with it."""
    found = [
        StoreFacts(
            str(report.get("kind") or ""),
            report.get("durable") is True,
            report.get("ok") is True,
            str(report.get("error") or ""),
        )
        for state in states
        if isinstance(report := state.get("store"), dict)
    ]
    return min(found, key=lambda store: store.ok, default=None)


def _artifact(report: Any) -> PredictorFacts | None:
    if not isinstance(report, dict):
        return None
    tiers, verdicts = report.get("tiers"), report.get("verdicts")
    return PredictorFacts(
        version=str(report.get("version") or ""),
        tiers=tuple(map(str, tiers)) if isinstance(tiers, list) else (),
        problem=str(report.get("problem") or ""),
        verdicts=tuple(map(str, verdicts)) if isinstance(verdicts, list) else (),
    )


def _latency(entries: list[Object], key: str) -> LatencyFacts | None:
    """Counts of all router pods together; the value is that of the slowest one."""
    reports = [r for e in entries if isinstance(r := e.get(key), dict) and r.get("num")]
    if not reports:
        return None
    return LatencyFacts(
        value_s=max(float(r.get("value_s") or 0.0) for r in reports),
        num=sum(int(r["num"]) for r in reports),
        num_met=sum(int(r.get("num_met") or 0) for r in reports),
    )


def _mean(entries: list[Object], key: str) -> float | None:
    values = [float(e[key]) for e in entries if isinstance(e.get(key), (int, float))]
    return sum(values) / len(values) if values else None
