"""A tier's tokens cost what its workers' hour costs at the speed that they were measured at."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tandem_operator.plan.measured_prices import TokenPrice, measured_prices, token_price
from tandem_operator.plan.objects import Settings
from tandem_operator.plan.router_config import router_config, token_prices
from tandem_operator.plan.router_facts import ProfileFacts, TierFacts, TrafficFacts
from tandem_operator.reconcile import pod_client
from tandem_operator.resources import Model, Router

FAST = ProfileFacts((0.006, 2e-5, 0.0), (0.007, 1.5e-8, 2e-5))
SLOW = ProfileFacts((0.02, 1.1e-4, 0.0), (0.02, 5e-8, 6e-5))


def named(name: str) -> dict[str, str]:
    return {"name": name, "namespace": "default"}


def model(name: str, **roles: Any) -> Model:
    spec = {"weights": {"source": "hf://a/b"}, **roles}
    return Model.model_validate({"metadata": named(name), "spec": spec})


MODELS = {
    "small": model("small", unified={"usdPerHour": "2"}),
    "large": model("large", prefill={"usdPerHour": "8"}, decode={"usdPerHour": "4"}),
}


def router(**listed: str) -> Router:
    tiers = [{"name": n, "modelRef": {"name": n}} for n in ("small", "large")]
    tiers[1].update(listed)  # type: ignore[arg-type]
    return Router.model_validate({"metadata": named("chat"), "spec": {"tiers": tiers}})


def facts(**profiles: ProfileFacts) -> TrafficFacts:
    return TrafficFacts(tiers={name: TierFacts(profile=told) for name, told in profiles.items()})


def status_of(prices: dict[str, TokenPrice]) -> dict[str, Any]:
    return {
        "tiers": [
            {
                "name": name,
                "tokenPrices": "Measured",
                "usdPer1MInputTokens": f"{price.usd_per_1m_input_tokens:g}",
                "usdPer1MOutputTokens": f"{price.usd_per_1m_output_tokens:g}",
            }
            for name, price in prices.items()
        ]
    }


def test_two_models_of_one_price_per_hour_have_prices_of_their_own_speed() -> None:
    models = {name: model(name, unified={"usdPerHour": "2"}) for name in ("small", "large")}

    found = measured_prices(router(), models, {}, facts(small=FAST, large=SLOW))

    small, large = found["small"], found["large"]
    assert large.usd_per_1m_input_tokens > 4 * small.usd_per_1m_input_tokens
    assert large.usd_per_1m_output_tokens > 2 * small.usd_per_1m_output_tokens
    config = router_config(router(), models, Settings(), found)
    assert config.tier("small").usd_per_1m_output_tokens == small.usd_per_1m_output_tokens
    assert config.tier("large").usd_per_1m_input_tokens == large.usd_per_1m_input_tokens


def test_prefill_workers_price_the_input_and_decode_workers_the_output() -> None:
    (found,) = measured_prices(router(), MODELS, {}, facts(large=SLOW)).values()

    exact = token_price(SLOW.prefill or (), SLOW.decode or (), 8.0, 4.0)  # type: ignore[arg-type]
    assert found.usd_per_1m_input_tokens == pytest.approx(exact.usd_per_1m_input_tokens, rel=5e-3)
    assert found.usd_per_1m_output_tokens == pytest.approx(exact.usd_per_1m_output_tokens, rel=5e-3)


def test_a_price_stays_while_the_profile_moves_by_less_than_a_tenth_or_is_not_told() -> None:
    first = measured_prices(router(), MODELS, {}, facts(small=FAST))
    told = status_of(first)
    near = ProfileFacts((0.0062, 2.1e-5, 0.0), (0.0072, 1.5e-8, 2e-5))

    assert measured_prices(router(), MODELS, told, facts(small=near)) == first
    assert measured_prices(router(), MODELS, told, None) == first
    assert measured_prices(router(), MODELS, told, facts(small=SLOW))["small"] != first["small"]


def test_listed_prices_and_models_without_one_are_left_alone() -> None:
    listed = router(usdPer1MInputTokens="3", usdPer1MOutputTokens="9")
    unpriced = {**MODELS, "small": model("small", unified={})}

    assert measured_prices(listed, unpriced, {}, facts(small=FAST, large=SLOW)) == {}
    where = {t.name: token_prices(t, unpriced, {}) for t in listed.spec.tiers}
    assert where == {"small": "None", "large": "Listed"}


def test_half_a_profile_is_no_price_and_the_page_says_nominal() -> None:
    half = ProfileFacts(prefill=FAST.prefill)

    found = measured_prices(router(), MODELS, {}, facts(small=half))

    assert found == {}
    assert token_prices(router().spec.tiers[0], MODELS, found) == "Nominal"


@pytest.mark.parametrize(
    ("told", "known"),
    [
        ({"prefill": [1.0, 2.0, 3.0], "decode": [1, 2, 3]}, ((1.0, 2.0, 3.0), (1.0, 2.0, 3.0))),
        ({"prefill": [1.0, 2.0], "decode": "fast"}, (None, None)),
        ({"prefill": [1.0, -2.0, 0.0], "decode": [True, 1, 1]}, (None, None)),
        ({"prefill": [1.0, 10**400, 0.0]}, (None, None)),
    ],
)
def test_what_a_router_says_of_its_workers_speed_is_checked(told: Any, known: Any) -> None:
    profile = pod_client.profile_told(
        [{"name": "small"}, {"profile": json.loads(json.dumps(told))}]
    )

    assert profile is not None
    assert (profile.prefill, profile.decode) == known
