"""Tenants pass by key only, within their rates, and are charged what they used."""

from __future__ import annotations

import time
from typing import Any

import pytest

from tandem_router.api.api_keys import Authenticator, key_hash, main
from tandem_router.config import TenantConfig
from tandem_router.errors import ApiError, ConfigError
from tandem_router.store.writer import Store

SECRET = b"0123456789abcdef"


def memory() -> Store:
    return Store(None, wall_clock=time.time)


def test_keys_are_matched_by_keyed_hash() -> None:
    tenants = [TenantConfig(name="a", key_hashes=(key_hash(SECRET, "k1"), key_hash(SECRET, "k2")))]
    gate = Authenticator(tenants, lambda: [SECRET], memory(), time.time)

    found = gate.caller("k2")
    assert found is not None
    assert found.tenant is tenants[0]
    for bad in (None, "", "k3", "k1 "):
        with pytest.raises(ApiError) as refused:
            gate.caller(bad)
        assert refused.value.status == 401


def test_key_hashes_without_a_secret_are_refused_at_the_start() -> None:
    with pytest.raises(ConfigError, match="--key-secret-file"):
        Authenticator(
            [TenantConfig(name="a", key_hashes=(key_hash(SECRET, "k"),))],
            list,
            memory(),
            time.time,
        )


def test_new_keys_come_with_the_hash_the_configuration_needs(tmp_path: Any, capsys: Any) -> None:
    path = tmp_path / "secret"

    assert main(["--key-secret-file", str(path)]) == 0

    key, entry = (line.split()[1] for line in capsys.readouterr().out.splitlines())
    assert path.stat().st_mode & 0o077 == 0
    assert key_hash(path.read_bytes().strip(), key) == entry
    TenantConfig(name="x", key_hashes=(entry,))


async def test_a_tenant_is_held_to_its_rates_and_tiers(run_router: Any, make_worker: Any) -> None:
    tenants = [
        {
            "name": "acme",
            "key_hashes": [key_hash(SECRET, "acme-key")],
            "requests_per_minute": 2,
            "allowed_tiers": ["small"],
        },
        {"name": "other", "key_hashes": [key_hash(SECRET, "other-key")]},
    ]
    table = {
        "small": {"unified": [await make_worker()]},
        "large": {"decode": [await make_worker()]},
    }
    acme = {"authorization": "Bearer acme-key"}

    async with run_router(table, tenants=tenants, key_secret=SECRET) as (client, _):
        nobody = await client.chat()
        forbidden = await client.chat(model="large", headers=acme)
        routed = await client.chat(headers=acme)
        limited = await client.chat(headers=acme)
        other = await client.chat(model="large", headers={"authorization": "Bearer other-key"})

    assert nobody.status == 401
    assert nobody.error["type"] == "authentication_error"
    assert forbidden.status == 403
    assert routed.headers["x-tandem-tier"] == "small"
    assert limited.status == 429
    assert 25 <= int(limited.headers["retry-after"]) <= 31
    assert other.status == 200


async def test_a_rate_that_is_used_up_says_what_is_left_and_what_was_asked_for(
    run_router: Any, make_worker: Any
) -> None:
    limits = [{"requests_per_minute": 1}, {"tokens_per_minute": 100}]
    tenants = [
        {"name": name, "key_hashes": [key_hash(SECRET, name)], **each}
        for name, each in zip(("few", "short"), limits, strict=True)
    ]
    table = {"large": {"decode": [await make_worker()]}}

    async with run_router(table, tenants=tenants, key_secret=SECRET) as (client, _):

        async def last(name: str, max_tokens: int) -> str:
            for _ in range(2):
                reply = await client.chat(
                    max_tokens=max_tokens, headers={"authorization": f"Bearer {name}"}
                )
            return str(reply.error["message"])

        few, short = await last("few", 8), await last("short", 95)

    assert few.startswith("tenant 'few' has 0 of its 1 requests a minute left")
    assert "tenant 'short' has 8" in short  # 13 of a hundred were used, some are back
    assert "of its 100 tokens a minute left; this request may use 1" in short


async def test_concurrency_and_money_of_a_tenant_are_bounded(
    run_router: Any, make_worker: Any
) -> None:
    tenants = [{"name": "acme", "key_hashes": [key_hash(SECRET, "k")], "usd_per_hour": 0.0007}]
    table = {"large": {"decode": [await make_worker()]}}
    headers = {"authorization": "Bearer k"}

    async with run_router(table, tenants=tenants, key_secret=SECRET) as (client, app):
        statuses = [
            (await client.chat(model="large", max_tokens=8, headers=headers)).status
            for _ in range(3)
        ]
        level = app.services.ledger.account("acme").usd.left(app.services.clock())

    # One answer costs 5 * 10 + 8 * 20 = 210 millionths of a dollar.
    assert statuses == [200, 429, 429]
    assert level == pytest.approx(0.00049, abs=1e-6)
