"""NetworkPolicies: peers of other namespaces are named by namespace, never by a label alone."""

from __future__ import annotations

from stored_cluster import BOTH, Cluster
from tandem_operator.plan import Settings
from tandem_operator.resources.base import Object
from tandem_operator.resources.network_rules import NetworkRules

MONITORING = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}


async def policies(rules: NetworkRules | None = None, own: str = "system") -> dict[str, Object]:
    cluster = Cluster(BOTH, Settings(network=rules or NetworkRules(), own_namespace=own))
    await cluster.settle()
    return {o["metadata"]["name"]: o["spec"] for o in cluster.store.find("NetworkPolicy")}


def allowed(spec: Object, port: int) -> list[Object]:
    """The peers of a port; an empty peer is everybody."""
    found: list[Object] = []
    for rule in spec["ingress"]:
        if port in [p["port"] for p in rule["ports"]]:
            found += rule.get("from", [{}])
    return found


async def test_no_peer_of_another_namespace_is_let_in_by_a_pods_label_alone() -> None:
    for spec in (await policies()).values():
        for rule in [*spec["ingress"], *spec.get("egress", [])]:
            for peer in rule.get("from", []):
                if "namespaceSelector" in peer:
                    labels = peer["namespaceSelector"].get("matchLabels", {})
                    assert labels.get("kubernetes.io/metadata.name") in ("system", "monitoring")


async def test_workers_take_routers_and_each_other_the_operator_and_prometheus() -> None:
    spec = (await policies())["l-worker"]

    routers, own, operator, prometheus = allowed(spec, 8100)
    assert routers == {
        "podSelector": {"matchExpressions": [{"key": "tandem.dev/router", "operator": "Exists"}]}
    }
    assert own == {"podSelector": {"matchLabels": {"tandem.dev/model": "l"}}}
    assert operator["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": "system"}
    assert prometheus == MONITORING
    assert allowed(spec, 8200) == [routers, own]  # no scraper reaches the KV port


async def test_without_a_namespace_of_its_own_the_operator_is_no_peer() -> None:
    assert len(allowed((await policies(own=""))["l-worker"], 8100)) == 3


async def test_routers_are_for_everybody_or_for_whom_the_installation_names() -> None:
    gateway = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "gateway"}}}
    closed = NetworkRules(router_from=(gateway,))

    assert allowed((await policies())["r-router"], 8000) == [{}]
    assert allowed((await policies())["r-router"], 8100) == []
    peers = allowed((await policies(closed))["r-router"], 8000)
    assert [p["namespaceSelector"]["matchLabels"] for p in peers] == [
        {"kubernetes.io/metadata.name": name} for name in ("gateway", "system", "monitoring")
    ]


async def test_egress_is_open_unless_it_is_restricted() -> None:
    apiserver = {"ipBlock": {"cidr": "10.0.0.1/32"}}
    closed = NetworkRules(restrict_egress=True, egress_to=(apiserver,))

    assert all(spec["policyTypes"] == ["Ingress"] for spec in (await policies()).values())
    for spec in (await policies(closed)).values():
        assert spec["policyTypes"] == ["Ingress", "Egress"]
        dns, pods, beyond = spec["egress"]
        assert {p["port"] for p in dns["ports"]} == {53}
        assert "podSelector" in pods["to"][0]
        assert beyond == {"to": [apiserver]}


async def test_a_chart_that_wants_none_gets_none() -> None:
    assert await policies(NetworkRules(enabled=False)) == {}
