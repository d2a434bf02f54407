"""Tiers, predictor, cache and access change while requests go on, and nothing learnt is lost."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from eventually import eventually
from tandem_router.quality.measured import Measured
from tandem_router.store.records import Label
from tandem_router.testing.two_tiers import CONFIG, TIERS, Scores, both

PEER = {"x-tandem-peer-token": "peer-secret", "content-type": "application/json"}
OPTIONS: dict[str, Any] = {"peer_token": "peer-secret"}
ARTIFACT = Path(__file__).resolve().parents[2] / "examples" / "01-hybrid" / "predictor"


async def put(client: Any, **live: Any) -> list[str]:
    reply = await client.request("PUT", "/admin/settings", live, PEER)
    assert reply.status == 200, reply.body
    changed: list[str] = reply.json["changed"]
    return changed


def external(worker: Any, name: str = "cloud", **fields: Any) -> dict[str, Any]:
    place = {"kind": "external", "url": worker.url + "/v1"}
    return {"name": name, "served_model": f"{name}-1", **place, **fields}


async def test_a_tier_that_is_added_serves_and_is_named(run_router: Any, make_worker: Any) -> None:
    cloud = await make_worker()
    async with run_router(await both(make_worker), predictor=Scores(0.4, 0.9), **OPTIONS) as (
        client,
        app,
    ):
        await client.chat(stream=True, model="large")
        learnt = app.services.routing.latency["large"].ttft_s
        unknown = await client.chat(model="cloud")
        changed = await put(client, tiers=[*TIERS, external(cloud, usd_per_1m_output_tokens=30.0)])
        reply = await client.chat(model="cloud", max_tokens=4)
        models = {each["id"] for each in (await client.get("/v1/models")).json["data"]}
        state = (await client.get("/admin/state")).json
        kept = app.services.routing.latency["large"].ttft_s

    assert unknown.status == 404
    assert changed == ["tiers: small, large -> small, large, cloud"]
    assert (reply.status, reply.headers["x-tandem-tier"]) == (200, "cloud")
    assert float(reply.headers["x-tandem-cost-usd"]) == pytest.approx(4 * 30 / 1e6)
    assert {"cloud", "cloud-1"} <= models
    assert state["dearest_tier"] == "cloud"
    assert learnt is not None
    assert kept == learnt


async def test_a_tier_that_is_removed_ends_its_streams_and_takes_no_more(
    run_router: Any, make_worker: Any
) -> None:
    table = await both(make_worker)
    table["large"]["decode"][0].pause_s = 0.02
    async with run_router(table, predictor=Scores(0.4, 0.9), **OPTIONS) as (client, app):
        whole = await client.chat(stream=True, model="large", seed=1)
        begun = asyncio.ensure_future(client.chat(stream=True, model="large", seed=1))
        await eventually(lambda: app.picker.num_inflight("large") > 0, every_s=0.0)
        changed = await put(client, tiers=TIERS[:1], fallback_tier="small")
        refused = await client.chat(model="large")
        routed = await client.chat()
        streamed = await begun

    assert "tiers: small, large -> small" in changed
    assert refused.status == 404
    assert routed.headers["x-tandem-tier"] == "small"
    assert streamed.text() == whole.text()
    # What it cost is booked to the tier that is gone.
    assert app.services.decisions.totals["large"].num_requests == 2


async def test_an_altered_tier_is_asked_elsewhere_and_its_latencies_are_of_the_new_one(
    run_router: Any, make_worker: Any
) -> None:
    first, second = await make_worker(), await make_worker()
    tiers = [TIERS[0], external(first)]
    async with run_router({}, tiers=tiers, fallback_tier="cloud", **OPTIONS) as (client, app):
        await client.chat(model="cloud")
        changed = await put(client, tiers={"cloud": {"url": second.url + "/v1"}})
        forgotten = app.services.routing.latency["cloud"].ttft_s
        await client.chat(model="cloud")
        bad = await client.request(
            "PUT", "/admin/settings", {"tiers": {"cloud": {"api_key_file": "/no/key"}}}, PEER
        )

    assert changed == [
        f'tiers.cloud.url: "{first.url}/v1" -> "{second.url}/v1"',
    ]
    assert forgotten is None
    assert (len(first.inference), len(second.inference)) == (1, 1)
    assert bad.status == 400
    assert "/no/key cannot be read" in bad.error["message"]
    assert app.config.tier("cloud").api_key_file is None


async def test_a_pool_that_is_added_is_found_by_its_services_and_asked_for_its_load(
    run_router: Any, make_worker: Any, reported: Any
) -> None:
    table = {"small": {"unified": [await make_worker()]}}
    fresh = await make_worker()
    async with run_router(
        table, tiers=TIERS[:1], fallback_tier="small", predictor=Scores(0.4, 0.9), **OPTIONS
    ) as (client, app):
        await put(client, tiers=TIERS)
        held = asyncio.ensure_future(client.chat(model="large"))
        await asyncio.sleep(0)
        known = {"small": {"unified": (table["small"]["unified"][0].url,)}}
        app.set_table({**known, "large": {"decode": (fresh.url,)}})
        reply = await held
        await reported(app)

    assert (reply.status, reply.headers["x-tandem-tier"]) == (200, "large")


async def test_the_cache_is_switched_on_shrinks_and_goes(run_router: Any, make_worker: Any) -> None:
    chat = {"temperature": 0, "model": "small"}
    async with run_router(await both(make_worker), **OPTIONS) as (client, app):
        hits = []

        async def twice() -> None:
            first = await client.chat(**chat)
            second = await client.chat(**chat)
            hits.append((first.headers.get("x-tandem-cache"), second.headers.get("x-tandem-cache")))

        await twice()
        await put(client, cache={"enabled": True, "max_bytes": 100_000})
        await twice()
        await put(client, cache={"enabled": True, "max_bytes": 50_000, "ttl_s": 60.0})
        await twice()  # answers that fit are still there
        await put(client, tiers={"small": {"served_model": "other-model"}})
        await twice()  # and those of another model are not
        await put(client, cache={"enabled": True, "max_bytes": 1024})
        left = app.services.reuse.cache.used_bytes
        await put(client, cache={"enabled": False})
        await twice()

    assert hits == [(None, None), (None, "hit"), ("hit", "hit"), (None, "hit"), (None, None)]
    assert left <= 1024


async def test_access_changes_for_the_next_request(run_router: Any, make_worker: Any) -> None:
    async with run_router(await both(make_worker), **OPTIONS) as (client, _):

        async def asked() -> tuple[int, bool]:
            headers = {"host": "ai.example.com", "origin": "https://app.example"}
            reply = await client.request("GET", "/v1/models", None, headers)
            return reply.status, "access-control-allow-origin" in reply.headers

        before = await asked()
        await put(client, access={"cors_origins": ["https://app.example"]})
        page = await asked()
        await put(client, access={"allowed_hosts": ["other.example.com"]})
        host = await asked()

    assert (before, page, host[0]) == ((200, False), (200, True), 421)


async def test_another_kind_of_predictor_or_another_artifact_is_used(
    run_router: Any, make_worker: Any, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copyfile(ARTIFACT, other)
    async with run_router(await both(make_worker), **OPTIONS) as (client, app):

        async def used(until: str) -> dict[str, Any]:
            await eventually(lambda: app.services.routing.scorer.name.startswith(until))
            state: dict[str, Any] = (await client.get("/admin/state")).json
            return state

        short = await client.chat()
        await put(client, predictor={"type": "Fixed"})
        fixed = await used("Fixed")
        await put(client, predictor={"type": "Learned", "artifact": str(ARTIFACT)})
        learned = await used("Learned ")
        label = app.services.steering
        label.move_set_points(gain_threshold=0.3)
        await put(client, predictor={"type": "Learned", "artifact": str(tmp_path / "none")})
        await eventually(lambda: "none" in str(app.services.routing.scorer.artifact))
        missing = (await client.get("/admin/state")).json
        await put(client, predictor={"type": "Learned", "artifact": str(other)})
        await eventually(lambda: not app.services.routing.scorer.artifact["problem"])
        asked = label.threshold_limit["asked"]
        refused = await client.request(
            "PUT", "/admin/settings", {"predictor": {"type": "Learned", "retraining": {}}}, PEER
        )

    assert short.headers["x-tandem-difficulty"]
    assert fixed["predictor_artifact"] is None
    assert learned["predictor_artifact"]["reason"] == "Loaded"
    # A file that is not there leaves the good one in use, and is said.
    assert missing["predictor_artifact"]["reason"] == "Loaded"
    assert "none" in missing["predictor_artifact"]["problem"]
    assert asked == 0.3
    assert refused.status == 400
    assert "begins and ends with the router" in refused.error["message"]


async def test_the_mounted_file_means_the_same_as_the_push(
    run_router: Any, make_worker: Any, tmp_path: Path
) -> None:
    cloud = await make_worker()
    path = tmp_path / "config.json"
    tiers = [*TIERS, external(cloud)]
    cache = {"enabled": True}
    path.write_text(json.dumps({**CONFIG, "generation": 3, "tiers": tiers, "cache": cache}))
    async with run_router(await both(make_worker), **OPTIONS) as (client, app):
        app.settings.apply_file(path)
        error = app.settings.error
        reply = await client.chat(model="cloud")
        again = await put(client, tiers=tiers, cache=cache)

    assert error is None
    assert reply.status == 200
    assert again == []


def test_labels_of_tiers_that_stay_are_kept_and_new_ones_are_learned() -> None:
    def label(number: int, tiers: tuple[str, str]) -> Label:
        quality = {tiers[0]: 0.5, tiers[1]: 1.0}
        return Label(f"r{number}", "shadow", float(number), "t", tiers[0], 1.0, quality)

    measured = Measured(("small", "large"), "large")
    for number in range(30):
        measured.learn(label(number, ("small", "large")))
    measured.set_tiers(("small", "large", "cloud"), "large")
    kept = measured.num_labels
    for number in range(30, 60):
        measured.learn(label(number, ("cloud", "large")))
    small, cloud = measured.tier("small"), measured.tier("cloud")
    measured.set_tiers(("small", "cloud"), "cloud")

    assert kept == 30
    assert small.ratio == pytest.approx(0.5)
    assert cloud.ratio == pytest.approx(0.5)
    # Nothing was judged beside the new dearest one yet.
    assert measured.tier("small").ratio is None
