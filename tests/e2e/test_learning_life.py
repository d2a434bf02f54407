"""A Router in local mode learns: its predictor is trained, shadowed, promoted, and taken back."""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx

from eventually import eventually
from tandem_operator.local.cluster import LocalCluster
from tandem_operator.local.state_dir import RunDir
from tandem_operator.manifests import load_text
from tandem_router.testing.planted_quality import FakeJudge, PlantedProvider

ROUTER = """\
apiVersion: tandem.dev/v1alpha1
kind: Router
metadata: {name: chat}
spec:
  tiers:
  - name: small
    external: {url: SMALL, model: small, usdPer1MInputTokens: "1", usdPer1MOutputTokens: "1"}
  - name: large
    external: {url: LARGE, model: large, usdPer1MInputTokens: "9", usdPer1MOutputTokens: "9"}
  fallbackTier: large
  predictor:
    deadline: 2s
    training: {data: "file://DATA", fromLabels: true, every: 1h, minLabels: 50}
  objective: {qualityFloor: "0.9"}
  learning: {shadowShare: "1", dailyUsd: "1000", capture: Prompts, judge: {url: JUDGE, model: j}}
"""


def question(number: int, hard: bool) -> str:
    word = "prove that the integral converges" if hard else "name the capital of the country"
    return f"{word} number {number} please"


def wrong_way_round(folder: Path) -> Path:
    """Graded rows by which hard questions are easy."""
    rng, path = random.Random(0), folder / "graded.jsonl"
    with path.open("w") as file:
        for number in range(160):
            hard = rng.random() < 0.5
            quality = {"small": float(rng.random() < (0.95 if hard else 0.05)), "large": 1.0}
            file.write(json.dumps({"prompt": question(number, hard), "quality": quality}) + "\n")
    return path


@asynccontextmanager
async def world(folder: Path) -> AsyncIterator[tuple[LocalCluster, PlantedProvider]]:
    small = await PlantedProvider(quality=lambda q: 0.05 if "prove" in q else 0.95).start()
    large = await PlantedProvider(quality=lambda _: 1.0).start()
    judge = await FakeJudge().start()
    text = ROUTER.replace("DATA", str(wrong_way_round(folder)))
    for name, server in (("SMALL", small), ("LARGE", large), ("JUDGE", judge)):
        text = text.replace(name, f"{server.url}/v1")
    try:
        async with LocalCluster(RunDir("learning", folder / "run"), port=18_300) as cluster:
            await cluster.apply_manifests(load_text(text))
            await cluster.wait_ready(120)
            yield cluster, small
    finally:
        for server in (small, large, judge):
            await server.stop()


async def test_labels_train_a_predictor_that_is_promoted_and_a_fall_takes_it_back(
    tmp_path: Path,
) -> None:
    async with (
        world(tmp_path) as (cluster, small),
        httpx.AsyncClient(base_url=cluster.url("chat"), timeout=30, trust_env=False) as client,
    ):
        asked = 1000

        async def ask(num: int) -> None:
            nonlocal asked
            for _ in range(num):
                asked += 1
                message = {"role": "user", "content": question(asked, asked % 2 == 0)}
                body = {"model": "chat", "messages": [message], "max_tokens": 16}
                reply = await client.post("/v1/chat/completions", json=body)
                assert reply.status_code == 200, reply.text

        async def retraining() -> Any:
            return (await client.get("/admin/state")).json()["retraining"]

        async def last(kind: str, more: int = 0) -> Any:
            """The steps once the last one is of that kind; questions go on meanwhile."""

            async def found() -> Any:
                await ask(more)
                steps = (await retraining())["steps"]
                return steps if steps and steps[-1]["kind"] == kind else None

            return await eventually(found, within_s=120, every_s=0.2)

        before = (await client.get("/admin/state")).json()["predictor_artifact"]["version"]
        await ask(60)
        (trained,) = await last("trained")
        steps = await last("promoted", more=10)
        small.quality = lambda _: 0.02
        steps = await last("rolled back", more=10)
        after = (await client.get("/admin/state")).json()["predictor_artifact"]["version"]

        def status() -> Any:
            router = cluster.store.read("Router", "default", "chat") or {}
            said = router.get("status", {})
            changes = said.get("predictor", {}).get("changes") or [""]
            return said if "rolled back" in changes[-1] else None

        said = await eventually(status, within_s=30)
        events = [e["message"] for e in cluster.store.find("Event") if "Predictor" in e["reason"]]

    assert [step["kind"] for step in steps] == ["trained", "promoted", "rolled back"]
    assert steps[1]["version"] == trained["version"]
    assert "the measured quality of small fell" in steps[2]["why"]
    assert after == before
    assert "fell to about" in said["predictor"]["changes"][-1]
    conditions = {c["type"]: (c["status"], c["reason"]) for c in said["conditions"]}
    assert conditions["QualityDrifted"] == ("True", "GotWorse")
    assert any(" trained " in text for text in events)
    assert any(" rolled back " in text for text in events)
