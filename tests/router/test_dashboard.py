"""The dashboard works without scripts, loads nothing from elsewhere and cannot be injected."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tandem_router.api import dashboard
from tandem_router.testing.two_tiers import Scores, both


async def test_the_page_is_filled_in_by_the_server_and_locked_to_its_origin(
    run_router: Any, make_worker: Any
) -> None:
    async with run_router({"small": {"unified": [await make_worker()]}}) as (client, _):
        await client.chat(model="small")
        page = await client.get("/")

    text = page.body.decode()
    policy = page.headers["content-security-policy"]
    assert page.headers["content-type"].startswith("text/html")
    assert "<td>small-model</td>" in text
    assert '<b id="requests">1</b>' in text
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert not re.search(r"(src|href)=\"(https?:)?//", text)
    assert "style=" not in text
    assert not re.search(r"<script(?![^>]*src=)", text)
    assert "$" not in text


async def test_the_page_says_which_prices_nothing_has_measured(run_router: Any) -> None:
    tiers = [
        {"name": "small", "served_model": "s", "token_prices": "None"},
        {"name": "large", "served_model": "l", "token_prices": "Nominal"},
    ]
    async with run_router({}, tiers=tiers) as (client, _):
        text = (await client.get("/")).body.decode()
        state = (await client.get("/admin/state")).json

    note = "nominal prices of large: nothing has measured them yet; "
    note += "no price of small: counted as free"
    assert f'<small id="price-note">{note}</small>' in text
    assert state["price_note"] == note
    assert [tier["token_prices"] for tier in state["tiers"]] == ["None", "Nominal"]


async def test_every_file_the_page_names_is_served_with_its_type(run_router: Any) -> None:
    async with run_router({}) as (client, _):
        text = (await client.get("/")).body.decode()
        for path in re.findall(r"(?:src|href)=\"(/[^\"]+)\"", text):
            reply = await client.get(path)
            assert reply.status == 200
            assert reply.headers["content-type"].startswith(("text/css", "text/javascript"))
        module = (await client.get("/dashboard/dashboard.mjs")).body.decode()
        assert (await client.get("/dashboard/charts.mjs")).status == 200

    # Text from workers, prompts and errors is set as text only.
    assert "innerHTML" not in module
    assert "eval" not in module


async def test_the_page_has_a_place_for_everything_that_its_script_writes(run_router: Any) -> None:
    async with run_router({}) as (client, _):
        page = (await client.get("/")).body.decode()
        module = (await client.get("/dashboard/dashboard.mjs")).body.decode()

    written = set(re.findall(r"(?:put|byId|legend)\(\"([a-z-]+)\"", module))

    assert {"measured", "quality-chart", "sources", "learning-spent"} <= written
    assert written <= set(re.findall(r"id=\"([a-z-]+)\"", page))


SHOWN = """
import { budgetOf, byTenant, passes, whatIf } from "%s";
const one = (tier, tenant, status, usd) =>
  ({ tier, tenant, status, error: null, reason: "gain", cost_usd: usd });
const rows = [one("large", "a", 200, 3), one("small", "a", 500, null), one("small", "b", 200, 1)];
const none = { tier: "", reason: "", tenant: "", failed: false };
const state = {
  dearest_tier: "large",
  tiers: [
    { name: "small", num_requests: 4, cost_usd: 1 },
    { name: "large", num_requests: 2, cost_usd: 10 },
  ],
  curve: [
    { threshold: -1, shares: { small: 0, large: 1 }, quality_ratio: 1 },
    { threshold: 0.1, shares: { small: 0.6, large: 0.4 }, quality_ratio: 0.96 },
    { threshold: 0.9, shares: { small: 1, large: 0 }, quality_ratio: 0.7 },
  ],
};
console.log(JSON.stringify({
  all: rows.filter((row) => passes(row, none)).length,
  failed: rows.filter((row) => passes(row, { ...none, failed: true })).length,
  small_of_a: rows.filter((row) => passes(row, { ...none, tier: "small", tenant: "a" })).length,
  tenants: byTenant(rows, "large"),
  kept: whatIf(state, 0.95),
  never: whatIf({ ...state, curve: [] }, 0.95),
  budgets: [null, 4.5, 5.5].map((left) => budgetOf({
    ...state, set_points: { budget_remaining_usd: left, budget_refill_usd_per_s: 0.01 },
  })),
}));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node (Debian: nodejs)")
def test_the_page_filters_adds_up_by_tenant_and_reads_what_if_from_the_curve() -> None:
    module = Path(dashboard.__file__).parent / "shown.mjs"
    ran = subprocess.run(
        ["node", "--input-type=module", "-e", SHOWN % module.as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    said = json.loads(ran.stdout)

    assert (said["all"], said["failed"], said["small_of_a"]) == (3, 1, 1)
    assert [(t["tenant"], t["requests"], t["usd"]) for t in said["tenants"]] == [
        ("a", 2, 3),
        ("b", 1, 1),
    ]
    # The cheapest point of the curve that keeps the floor, at what each tier's answers cost.
    assert said["kept"]["point"]["threshold"] == 0.1
    assert said["kept"]["usd"] == pytest.approx(0.6 * 0.25 + 0.4 * 5.0)
    assert said["never"] is None
    # An answer of the large tier cost 5 dollars so far.
    assert said["budgets"] == [
        {"note": "", "broken": False},
        {"note": "budget: 4.50 left of 36.0 an hour", "broken": True},
        {"note": "budget: 5.50 left of 36.0 an hour", "broken": False},
    ]


async def test_a_row_of_the_page_opens_with_what_its_script_reads(
    run_router: Any, make_worker: Any
) -> None:
    async with run_router(await both(make_worker), predictor=Scores(0.2, 0.9)) as (client, _):
        reply = await client.chat("What is 2 + 3?")
        row = (await client.get(f"/admin/decisions/{reply.headers['x-request-id']}")).json
        script = (await client.get("/dashboard/why.mjs")).body.decode()

    read = set(re.findall(r"\bone\.([a-z_]+)", script))
    of_tier = set(re.findall(r"\btier\.([a-z_]+)", script))
    assert {"runner_up", "margin", "tiers", "attempts"} <= read <= set(row)
    assert {"expected_cost_usd", "held_tokens", "wait_s", "excluded"} <= of_tier
    assert of_tier <= set(row["tiers"][0])
