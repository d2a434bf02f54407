"""One dollar is counted once: workers by the hour by the operator, external tokens by routers."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem_operator.autoscale.settings import loop_settings
from tandem_operator.plan import Settings
from tandem_operator.plan.router_config import router_config
from tandem_operator.resources import Model, Router
from tandem_operator.resources.budget_split import budget_split

MODEL_TIER = {"name": "small", "modelRef": {"name": "s"}}
EXTERNAL_TIER = {
    "name": "large",
    "external": {
        "url": "https://api.example/v1",
        "model": "m",
        "usdPer1MInputTokens": "3",
        "usdPer1MOutputTokens": "15",
    },
}


def router(budget: str | None, *tiers: Any, replicas: int = 1) -> Router:
    spec: dict[str, Any] = {"tiers": list(tiers), "replicas": replicas}
    if budget is not None:
        spec["budget"] = {"usdPerHour": budget}
    return Router.model_validate({"metadata": {"name": "r", "namespace": "n"}, "spec": spec})


def model(price: str, replicas: int) -> dict[str, Model]:
    role = {"usdPerHour": price, "replicas": replicas}
    spec = {"weights": {"source": "file:///m"}, "unified": role}
    found = Model.model_validate({"metadata": {"name": "s", "namespace": "n"}, "spec": spec})
    return {"s": found}


def test_without_an_external_tier_workers_have_the_whole_budget() -> None:
    """Routers get none: they would count by the token what is paid by the hour already."""
    chat, models = router("24", MODEL_TIER), model("2", 3)

    assert loop_settings(chat, models, None).ceilings.usd_per_hour == 24.0
    assert router_config(chat, models, Settings()).budget.usd_per_hour is None


def test_beside_an_external_tier_tokens_have_what_the_workers_leave() -> None:
    chat, models = router("24", MODEL_TIER, EXTERNAL_TIER), model("2", 3)

    assert loop_settings(chat, models, None).ceilings.usd_per_hour == 6.0
    assert router_config(chat, models, Settings()).budget.usd_per_hour == 18.0


def test_several_router_pods_share_what_tokens_may_cost() -> None:
    chat = router("24", MODEL_TIER, EXTERNAL_TIER, replicas=3)

    assert router_config(chat, model("2", 3), Settings()).budget.usd_per_hour == 18.0
    assert router_config(chat, model("2", 3), Settings()).replicas == 3


def test_workers_that_take_the_whole_budget_leave_tokens_next_to_nothing() -> None:
    chat, models = router("6", MODEL_TIER, EXTERNAL_TIER), model("2", 9)

    assert loop_settings(chat, models, None).ceilings.usd_per_hour == 6.0
    left = router_config(chat, models, Settings()).budget.usd_per_hour
    assert left is not None
    assert left < 0.001


def test_no_budget_is_no_ceiling() -> None:
    chat, models = router(None, MODEL_TIER, EXTERNAL_TIER), model("2", 3)

    assert loop_settings(chat, models, None).ceilings.usd_per_hour is None
    assert router_config(chat, models, Settings()).budget.usd_per_hour is None


@given(
    budget=st.decimals(0, 1000, places=2),
    price=st.decimals(0, 50, places=2),
    replicas=st.integers(0, 20),
    external=st.booleans(),
)
def test_both_parts_together_are_never_more_than_the_budget(
    budget: Any, price: Any, replicas: int, external: bool
) -> None:
    tiers = [MODEL_TIER, EXTERNAL_TIER] if external else [MODEL_TIER]
    split = budget_split(router(str(budget), *tiers), model(str(price), replicas))

    parts = [p or 0.0 for p in (split.workers_usd_per_hour, split.tokens_usd_per_hour)]
    assert min(parts) >= 0.0
    assert sum(parts) == pytest.approx(float(budget))
