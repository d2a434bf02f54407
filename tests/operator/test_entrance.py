"""How requests get in: what an installation says for all Routers, and what a Router says itself."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from stored_cluster import BOTH, Cluster
from tandem_operator.plan import Settings
from tandem_operator.resources.entrance import Entrance

Object = dict[str, Any]


def entrance(**given: Any) -> Entrance:
    return Entrance.model_validate(given)


async def settled(rules: Entrance, text: str = BOTH) -> Cluster:
    cluster = Cluster(text, Settings(entrance=rules))
    await cluster.settle()
    return cluster


async def test_a_router_is_reached_inside_the_cluster_alone_where_nothing_is_said() -> None:
    cluster = await settled(Entrance())

    assert cluster.get("Service", "r-router")["spec"]["type"] == "ClusterIP"
    assert cluster.names("Ingress") == cluster.names("HTTPRoute") == []


async def test_a_routers_own_service_type_wins_over_the_installations() -> None:
    everywhere = entrance(serviceType="LoadBalancer")
    public = await settled(everywhere)
    own = await settled(everywhere, BOTH + "  serviceType: NodePort\n")

    assert public.get("Service", "r-router")["spec"]["type"] == "LoadBalancer"
    assert own.get("Service", "r-router")["spec"]["type"] == "NodePort"


async def test_an_entrance_that_is_closed_again_is_removed() -> None:
    cluster = await settled(entrance(ingress={"host": "{router}.ai.test", "tlsSecret": "star"}))
    ingress = cluster.get("Ingress", "r-router")
    assert ingress["spec"]["rules"][0]["host"] == "r.ai.test"
    assert ingress["spec"]["tls"] == [{"hosts": ["r.ai.test"], "secretName": "star"}]

    moved = entrance(ingress={"host": "{router}-{namespace}.ai.test"})
    cluster.reconciler.settings = Settings(entrance=moved)
    await cluster.settle()
    spec = cluster.get("Ingress", "r-router")["spec"]
    assert spec["rules"][0]["host"] == "r-default.ai.test"
    assert not spec.get("tls")


async def test_a_long_answer_is_not_cut_off_by_the_gateways_own_limit() -> None:
    cluster = await settled(
        entrance(httpRoute={"host": "{router}.ai.test", "parentRefs": [{"name": "g"}]})
    )

    (rule,) = cluster.get("HTTPRoute", "r-router")["spec"]["rules"]
    assert rule["timeouts"] == {"request": "0s"}
    assert rule["backendRefs"] == [{"name": "r-router", "port": 8000}]


@pytest.mark.parametrize(
    ("host", "said"),
    [("ai.test", "write {router} into it"), ("{router} .test", "is no host; write one such as")],
)
def test_a_host_that_cannot_work_is_refused(host: str, said: str) -> None:
    with pytest.raises(ValidationError) as refused:
        entrance(ingress={"host": host})
    assert said in str(refused.value)
