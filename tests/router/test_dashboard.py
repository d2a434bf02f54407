"""The dashboard works without scripts, loads nothing from elsewhere and cannot be injected."""

from __future__ import annotations

import re
from typing import Any


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
