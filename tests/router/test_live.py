"""Settings and keys change while requests go on; who may see what once tenants exist."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem_router.api.app import RouterApp
from tandem_router.balancing.endpoint_picker import Picker
from tandem_router.config import FailoverConfig, OutlierConfig, PickingConfig, RouterConfig
from tandem_router.config.live import (
    LIVE_FIELDS,
    STATIC_FIELDS,
    changes,
    live_digest,
    live_part,
    static_part,
    with_live,
)
from tandem_router.errors import ConfigError
from tandem_router.proxy.provider_keys import ProviderKeys
from tandem_router.testing.two_tiers import CONFIG, Scores, both

JSON = {"content-type": "application/json"}
TEAM = [{"name": "team"}]
PEER = {"x-tandem-peer-token": "peer-secret", "content-type": "application/json"}
OPTIONS: dict[str, Any] = {"peer_token": "peer-secret"}


async def put(client: Any, live: dict[str, Any]) -> Any:
    return await client.request("PUT", "/admin/settings", live, PEER)


# Settings.


async def test_threshold_floor_budget_and_prices_change_without_a_restart(
    run_router: Any, make_worker: Any
) -> None:
    table = await both(make_worker)
    async with run_router(table, predictor=Scores(0.4, 0.6), threshold=0.1, **OPTIONS) as (
        client,
        app,
    ):
        before = await client.chat(max_tokens=4)
        totals = app.services.decisions.totals["large"].num_requests
        reply = await put(
            client,
            {"threshold": 0.5, "tiers": {"small": {"usd_per_1m_output_tokens": 4.0}}},
        )
        after = await client.chat(max_tokens=4)
        state = (await client.get("/admin/state")).json

    assert before.headers["x-tandem-tier"] == "large"
    assert reply.json["changed"] == [
        "threshold: 0.1 -> 0.5",
        "tiers.small.usd_per_1m_output_tokens: 2.0 -> 4.0",
    ]
    assert after.headers["x-tandem-tier"] == "small"
    assert float(after.headers["x-tandem-cost-usd"]) == pytest.approx((5 * 1 + 4 * 4) / 1e6)
    assert app.services.decisions.totals["large"].num_requests == totals
    assert [each["change"] for each in state["settings"]["changes"]] == reply.json["changed"]


async def test_a_tenant_added_at_run_time_closes_the_door_and_a_minted_key_opens_it(
    run_router: Any, make_worker: Any
) -> None:
    async with run_router(await both(make_worker), **OPTIONS) as (client, _):
        opened = await client.chat()
        await put(client, {"tenants": [{"name": "team", "requests_per_minute": 2}]})
        closed = await client.chat()
        minted = await client.request("POST", "/admin/keys", {"tenant": "team"}, PEER)
        headers = {"authorization": f"Bearer {minted.json['key']}"}
        replies = [(await client.chat(headers=headers)).status for _ in range(3)]
        await put(client, {"tenants": [{"name": "team", "requests_per_minute": 200}]})
        raised = await client.chat(headers=headers)

    assert (opened.status, closed.status, minted.status) == (200, 401, 201)
    assert replies == [200, 200, 429]
    # What the tenant has used stays used; it refills at the new rate.
    assert raised.status in (200, 429)


async def test_what_cannot_change_is_refused_by_name(run_router: Any, make_worker: Any) -> None:
    async with run_router(await both(make_worker), **OPTIONS) as (client, app):
        port = await put(client, {"http_port": 9})
        tier = await put(client, {"tiers": {"huge": {"max_share": 0.5}}})
        bad = await put(client, {"budget": {"usd_per_hour": -1}})
        entry = "hmac-sha256:" + "0" * 64
        hashes = await put(client, {"tenants": [{"name": "a", "key_hashes": [entry]}]})
        nobody = await client.request("PUT", "/admin/settings", {"threshold": 0.2}, JSON)

    assert [each.status for each in (port, tier, bad, hashes)] == [400] * 4
    assert "http_port cannot change while the router runs" in port.error["message"]
    assert "there is no such tier" in tier.error["message"]
    assert bad.error["message"].startswith("budget.usd_per_hour")
    assert "--key-secret-file" in hashes.error["message"]
    assert nobody.status == 401
    assert app.config.tenants == ()


async def test_a_budget_comes_changes_and_goes_with_what_was_spent(
    run_router: Any, make_worker: Any
) -> None:
    tiers = [
        {**CONFIG["tiers"][0]},
        {**CONFIG["tiers"][1], "kind": "external", "url": "http://127.0.0.1:9/v1"},
    ]
    async with run_router({}, tiers=tiers, background=False, **OPTIONS) as (_, app):
        ledger, steering = app.services.ledger, app.services.steering
        assert steering.control.pacer is None
        app.settings.apply({"budget": {"usd_per_hour": 12.0}})
        first = ledger.budget
        first.settle(app.services.clock(), 0.0, 0.1)
        app.settings.apply({"budget": {"usd_per_hour": 24.0}})

        assert ledger.budget is first
        assert steering.control.pacer.bucket is first
        assert first.spent == 0.1
        assert first.per_s == pytest.approx(24 / 3600)
        app.settings.apply({"budget": {}})
        assert ledger.budget is None
        assert steering.control.pacer is None


async def test_limits_and_failover_are_in_force_once_they_are_said_to_be(run_router: Any) -> None:
    """Bounds of bodies, retries, ejections and connections, too: not from the next start on."""
    async with run_router({}, background=False, **OPTIONS) as (client, app):
        budget = app.services.picker.retries("small")
        chat = {"model": "small", "messages": [{"role": "user", "content": "x" * 8000}]}
        app.settings.apply(
            {
                "limits": {"max_held_body_bytes_per_sender": 8192},
                "failover": {
                    "retry_share": 0.0,
                    "min_retries": 0,
                    "connect_timeout_s": 0.125,
                    "stall_timeout_s": 7.0,
                    "wait_s": 0.05,
                },
            }
        )
        large = await client.request("POST", "/v1/chat/completions", chat)

    assert large.error["code"] == "body_bytes_limit"
    assert not budget.take(1000)
    assert app.services.client.connect_timeout_s == 0.125
    assert app.services.client.stall_timeout_s == 7.0


def test_an_ejection_follows_the_bounds_in_force() -> None:
    picker = Picker(PickingConfig(), random.Random(1), lambda: 0.0)
    picker.set_table({"small": {"unified": ["http://a", "http://b"]}})
    first = next(iter(picker.workers))
    assert not picker.outcome(first, good=False)

    picker.reconfigure(FailoverConfig(outliers=OutlierConfig(consecutive_failures=1)))

    assert picker.outcome(first, good=False)


async def test_a_threshold_that_was_learnt_survives_other_changes(
    run_router: Any, make_worker: Any
) -> None:
    async with run_router(
        {}, background=False, predictor=Scores(0.4, 0.6), threshold=0.1, **OPTIONS
    ) as (_, app):
        app.services.steering.move_set_points(gain_threshold=0.33)
        app.settings.apply({"slo": {"ttft_ms": 250.0}, "fallback_tier": "small"})
        points = app.services.steering.set_points

    assert points.gain_threshold == 0.33
    assert points.slo.ttft_s == 0.25
    assert points.fallback_tier == "small"


async def test_the_mounted_file_is_taken_up_and_a_broken_one_is_said(
    make_config: Any, tmp_path: Path
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**CONFIG, "generation": 2}))
    app = RouterApp(make_config(generation=2), endpoints_path=tmp_path / "e", config_path=path)

    def write(**fields: Any) -> None:
        path.write_text(json.dumps({**CONFIG, **fields}))
        app.settings.apply_file(path)

    write(threshold=0.7, generation=3)
    assert app.services.steering.set_points.gain_threshold == 0.7
    write(threshold=0.2, generation=1)
    assert app.services.steering.set_points.gain_threshold == 0.7
    write(http_port=9, generation=4)
    assert "more than can change" in (app.settings.error or "")
    path.write_text("{")
    app.settings.apply_file(path)
    assert "not JSON" in (app.settings.error or "")
    write(threshold=0.1, generation=5)
    assert app.settings.error is None
    assert app.settings.state()["generation"] == 5
    app.services.client.close()


live_values = st.fixed_dictionaries(
    {},
    optional={
        "threshold": st.none() | st.floats(-1, 1),
        "routing": st.sampled_from(["Active", "Advise"]),
        "fallback_tier": st.sampled_from(["small", "large"]),
        "budget": st.fixed_dictionaries({}, optional={"usd_per_hour": st.floats(0, 100)}),
        "objective": st.fixed_dictionaries({}, optional={"quality_floor": st.floats(0, 1)}),
        "slo": st.fixed_dictionaries({}, optional={"ttft_ms": st.floats(1, 1000)}),
    },
)


@given(live_values)
def test_live_settings_leave_the_rest_alone_and_say_every_change(live: dict[str, Any]) -> None:
    before = RouterConfig.model_validate(CONFIG)

    after = with_live(before, live)

    assert static_part(after) == static_part(before)
    assert with_live(before, live_part(after)) == with_live(after, live_part(after))
    same = live_digest(live_part(before)) == live_digest(live_part(after))
    assert same == (changes(live_part(before), live_part(after)) == [])


def test_every_field_is_live_or_static() -> None:
    config = RouterConfig.model_validate(CONFIG)
    assert {*LIVE_FIELDS, *STATIC_FIELDS, "endpoints"} == set(RouterConfig.model_fields)
    assert not set(LIVE_FIELDS) & set(STATIC_FIELDS)
    with pytest.raises(ConfigError, match="cannot change"):
        with_live(config, {"name": "other"})


async def test_advice_is_recorded_and_everything_goes_to_the_fallback_tier(
    run_router: Any, make_worker: Any
) -> None:
    async with run_router(
        await both(make_worker),
        predictor=Scores(0.9, 0.91),
        threshold=0.1,
        routing="Advise",
        **OPTIONS,
    ) as (client, _):
        reply = await client.chat()
        decision = (await client.get(f"/admin/decisions/{reply.headers['x-request-id']}")).json
        await put(client, {"routing": "Active"})
        active = await client.chat()

    assert reply.headers["x-tandem-tier"] == "large"
    assert reply.headers["x-tandem-reason"] == "advise"
    assert decision["advised"] == "small"
    assert active.headers["x-tandem-tier"] == "small"


async def test_a_decision_says_over_what_it_was_taken(run_router: Any, make_worker: Any) -> None:
    async with run_router(await both(make_worker), predictor=Scores(0.4, 0.9), threshold=0.1) as (
        client,
        _,
    ):
        reply = await client.chat(max_tokens=10)
        decision = (await client.get(f"/admin/decisions/{reply.headers['x-request-id']}")).json

    assert decision["tier"] == "large"
    assert decision["runner_up"] == "small"
    assert decision["margin"] == pytest.approx(0.4, abs=0.01)
    tiers = {tier["tier"]: tier for tier in decision["tiers"]}
    assert tiers["small"]["quality"] == 0.4
    assert tiers["large"]["expected_cost_usd"] > tiers["small"]["expected_cost_usd"] > 0
    assert {"wait_s", "slo_miss_probability", "excluded"} <= tiers["small"].keys()


# Keys.


async def test_keys_are_listed_limited_and_revoked_at_run_time(
    run_router: Any, make_worker: Any
) -> None:
    async with run_router(await both(make_worker), tenants=TEAM, **OPTIONS) as (client, _):
        minted = await client.request(
            "POST", "/admin/keys", {"tenant": "team", "requests_per_minute": 1}, PEER
        )
        key, name = minted.json["key"], minted.json["id"]
        headers = {"authorization": f"Bearer {key}"}
        other = await client.request("POST", "/admin/keys", {"tenant": "team"}, PEER)
        used = [(await client.chat(headers=headers)).status for _ in range(2)]
        free = await client.chat(headers={"authorization": f"Bearer {other.json['key']}"})
        await client.request("PATCH", f"/admin/keys/{name}", {"requests_per_minute": None}, PEER)
        lifted = await client.chat(headers=headers)
        listed = await client.request("GET", "/admin/keys", None, PEER)
        await client.request("DELETE", f"/admin/keys/{name}", None, PEER)
        revoked = await client.chat(headers=headers)
        still = await client.request("PATCH", f"/admin/keys/{name}", {"usd_per_hour": 1}, PEER)
        unknown = await client.request("POST", "/admin/keys", {"tenant": "nobody"}, PEER)

    assert used == [200, 429]
    assert (free.status, lifted.status) == (200, 200)
    assert len(listed.json["keys"]) == 2
    assert key not in listed.body.decode()
    assert "hmac" not in listed.body.decode()
    assert listed.json["store"]["durable"] is False
    assert revoked.status == 401
    assert "was revoked" in revoked.error["message"]
    assert still.json["revoked"] is not None
    assert unknown.status == 404


async def test_a_configured_key_can_be_revoked_too_and_stays_so(
    run_router: Any, make_worker: Any
) -> None:
    from tandem_router.api.api_keys import key_hash, key_id

    secret = b"0123456789abcdef"
    entry = key_hash(secret, "old")
    tenants = [{"name": "team", "key_hashes": [entry]}]
    headers = {"authorization": "Bearer old"}
    async with run_router(
        await both(make_worker), tenants=tenants, key_secret=secret, **OPTIONS
    ) as (client, _):
        before = await client.chat(headers=headers)
        await client.request("DELETE", f"/admin/keys/{key_id(entry)}", None, PEER)
        after = await client.chat(headers=headers)
        await put(client, {"tenants": [*tenants, {"name": "other"}]})
        again = await client.chat(headers=headers)

    assert [each.status for each in (before, after, again)] == [200, 401, 401]


# Access.


def login(password: str) -> dict[str, str]:
    return {"authorization": "Basic " + base64.b64encode(f"me:{password}".encode()).decode()}


@pytest.mark.parametrize("path", ["/", "/dashboard/dashboard.css", "/admin/state", "/metrics"])
async def test_pages_and_metrics_need_a_token_once_tenants_exist(
    run_router: Any, path: str
) -> None:
    async with run_router({}, metrics_token="scrape", **OPTIONS) as (client, app):
        opened = await client.get(path)
        app.settings.apply({"tenants": TEAM})
        closed = await client.get(path)
        wrong = await client.get(path, headers=login("no"))
        known = [
            await client.get(path, headers=headers)
            for headers in (PEER, login("peer-secret"), {"authorization": "Bearer peer-secret"})
        ]
        scraped = await client.get(path, headers={"authorization": "Bearer scrape"})
        healthy = await client.get("/health")

    assert (opened.status, closed.status, wrong.status) == (200, 401, 401)
    assert closed.headers["www-authenticate"].startswith("Basic")
    assert "needs a token" in closed.error["message"]
    assert [each.status for each in known] == [200] * 3
    assert scraped.status == (200 if path == "/metrics" else 401)
    assert healthy.status == 200


def test_a_rotated_provider_key_is_taken_up(make_config: Any, tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("old\n")
    seconds = itertools.count(step=2.0)
    tier = {
        **CONFIG["tiers"][1],
        "kind": "external",
        "url": "https://provider/v1",
        "api_key_file": str(path),
    }
    keys = ProviderKeys(make_config(tiers=[CONFIG["tiers"][0], tier]), lambda: next(seconds))

    assert keys.get("large") == b"old"
    path.unlink()
    assert keys.get("large") == b"old"
    path.write_text("new\nold\n")
    assert keys.get("large") == b"new"


def test_a_provider_key_that_is_empty_is_refused_at_the_start(
    make_config: Any, tmp_path: Path
) -> None:
    (tmp_path / "key").write_text("\n")
    tier = {**CONFIG["tiers"][1], "kind": "external", "url": "https://provider/v1"}
    tiers = [CONFIG["tiers"][0], {**tier, "api_key_file": str(tmp_path / "key")}]

    with pytest.raises(ConfigError, match=r"tier 'large': api_key_file .* must hold 1 to 4 lines"):
        ProviderKeys(make_config(tiers=tiers), lambda: 0.0)


async def test_a_router_with_a_store_goes_on_counting_after_a_restart(
    run_router: Any, make_worker: Any, tmp_path: Path
) -> None:
    table = await both(make_worker)
    options = {"store": {"type": "sqlite"}, "store_file": tmp_path / "s.db", "tenants": TEAM}
    async with run_router(table, **options, **OPTIONS) as (client, _):
        minted = await client.request("POST", "/admin/keys", {"tenant": "team"}, PEER)
        headers = {"authorization": f"Bearer {minted.json['key']}"}
        first = await client.chat(headers=headers)
    async with run_router(table, **options, **OPTIONS) as (client, _):
        again = await client.chat(headers=headers)
        state = (await client.get("/admin/state", headers=PEER)).json
        spend = (await client.get("/admin/spend", headers=PEER)).json
        path = f"/admin/decisions/{first.headers['x-request-id']}"
        found = await client.get(path, headers=PEER)
        older = (await client.get("/admin/decisions?before=9e9", headers=PEER)).json

    assert again.status == 200
    assert sum(tier["num_requests"] for tier in state["tiers"]) == 2
    assert state["store"]["ok"]
    assert state["store"]["durable"]
    assert sum(row["num_requests"] for row in spend["spend"]) == 2
    assert {row["tenant"] for row in spend["spend"]} == {"team"}
    assert found.status == 200
    assert older["decisions"][-1]["request_id"] == first.headers["x-request-id"]
    assert found.json["tier"] == first.headers["x-tandem-tier"]


async def test_a_store_that_is_away_fails_no_request(
    run_router: Any, make_worker: Any, tmp_path: Path
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    options = {"store": {"type": "sqlite"}, "store_file": blocked / "no-folder" / "s.db"}
    async with run_router(await both(make_worker), **options) as (client, _):
        reply = await client.chat()
        await asyncio.sleep(0)
        state = (await client.get("/admin/state")).json
        spend = await client.get("/admin/spend")

    assert reply.status == 200
    assert state["store"]["ok"] is False
    assert "s.db" in state["store"]["error"]
    assert spend.status == 503
