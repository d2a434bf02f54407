"""Tenants pass by key only, within their rates, and are charged what they used."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem_router.api.api_keys import Authenticator, key_hash, main
from tandem_router.config import TenantConfig
from tandem_router.errors import ApiError, ConfigError
from tandem_router.limits.admission import Admission, TokenBucket

SECRET = b"0123456789abcdef"


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@given(
    st.floats(0.1, 100),
    st.lists(st.tuples(st.floats(0, 5), st.floats(0, 50)), min_size=1, max_size=60),
)
def test_a_bucket_admits_at_most_its_burst_plus_its_rate(
    rate: float, steps: list[tuple[float, float]]
) -> None:
    clock = Clock()
    burst = rate * 3.0
    bucket = TokenBucket(rate, burst, clock)

    admitted = 0.0
    largest = 0.0
    for wait, amount in steps:
        clock.now += wait
        if bucket.reserve(amount) is None:
            admitted += amount
            largest = max(largest, amount)

    assert admitted <= burst + rate * clock.now + largest + 1e-6


def test_a_bucket_says_how_long_to_wait_and_means_it() -> None:
    clock = Clock()
    bucket = TokenBucket(2.0, 10.0, clock)
    assert bucket.reserve(10.0) is None

    wait = bucket.reserve(4.0)

    assert wait == pytest.approx(2.0)
    clock.now += wait
    assert bucket.reserve(4.0) is None


def test_settling_gives_back_what_was_not_used_and_charges_what_was() -> None:
    bucket = TokenBucket(1.0, 10.0, Clock())
    bucket.reserve(6.0)
    bucket.give_back(4.0)
    assert bucket.level == pytest.approx(8.0)
    bucket.give_back(-20.0)

    assert bucket.level == pytest.approx(-12.0)
    assert bucket.reserve(1.0) == pytest.approx(13.0)


def test_keys_are_matched_by_keyed_hash() -> None:
    tenants = [TenantConfig(name="a", key_hashes=(key_hash(SECRET, "k1"), key_hash(SECRET, "k2")))]
    gate = Authenticator(tenants, SECRET)

    assert gate.tenant("k2") is tenants[0]
    for bad in (None, "", "k3", "k1 "):
        with pytest.raises(ApiError) as refused:
            gate.tenant(bad)
        assert refused.value.status == 401


def test_key_hashes_without_a_secret_are_refused_at_the_start() -> None:
    with pytest.raises(ConfigError, match="--key-secret-file"):
        Authenticator([TenantConfig(name="a", key_hashes=(key_hash(SECRET, "k"),))], None)


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


async def test_concurrency_and_money_of_a_tenant_are_bounded(
    run_router: Any, make_worker: Any
) -> None:
    tenants = [{"name": "acme", "key_hashes": [key_hash(SECRET, "k")], "usd_per_hour": 0.0004}]
    table = {"large": {"decode": [await make_worker()]}}
    headers = {"authorization": "Bearer k"}

    async with run_router(table, tenants=tenants, key_secret=SECRET) as (client, app):
        statuses = [
            (await client.chat(model="large", max_tokens=8, headers=headers)).status
            for _ in range(3)
        ]
        level = app.services.admission.tenant("acme").usd.level

    # One answer costs 5 * 10 + 8 * 20 = 210 millionths of a dollar.
    assert statuses == [200, 429, 429]
    assert level == pytest.approx(0.00019, abs=1e-6)


def test_a_request_that_changes_tier_holds_the_cost_of_its_last_tier_only(
    make_config: Any,
) -> None:
    admission = Admission(make_config(tenants=[{"name": "team", "usd_per_hour": 10.0}]), Clock())
    tenant = admission.tenant("team")
    assert tenant.usd is not None
    reservation = admission.admit(tenant, 10.0)

    admission.reserve_cost(reservation, 4.0)
    admission.reserve_cost(reservation, 1.0)
    held = tenant.usd.level
    admission.settle(reservation, 10.0, 0.5)

    assert held == pytest.approx(9.0)
    assert tenant.usd.level == pytest.approx(9.5)
