"""What lets a gateway ask a Router: the picker's port, the pool that names it, and who may pass."""

from __future__ import annotations

import json
from typing import Any

from stored_cluster import BOTH, Cluster
from tandem_operator.plan import Settings
from tandem_operator.reconcile.cluster_api import ApiError
from tandem_operator.reconcile.refused_children import refused_child
from tandem_operator.resources.entrance import Entrance

Object = dict[str, Any]
ASKED = BOTH + "  gateway: {namespace: gateways}\n"
POOLS = Settings(entrance=Entrance(inference_pools=True))
GATEWAYS = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "gateways"}}}


async def settled(text: str = ASKED, settings: Settings = POOLS) -> Cluster:
    cluster = Cluster(text, settings)
    await cluster.settle()
    return cluster


def condition(cluster: Cluster, kind: str) -> Object | None:
    found = cluster.get("Router", "r")["status"]["conditions"]
    return next((each for each in found if each["type"] == kind), None)


async def test_nothing_of_it_is_there_where_no_gateway_is_named() -> None:
    cluster = await settled(BOTH)

    assert cluster.names("InferencePool") == []
    assert "r-router-picker" not in cluster.names("Service")
    assert "r-router-gateway" not in cluster.names("NetworkPolicy")
    assert condition(cluster, "GatewayReady") is None
    container = cluster.get("Deployment", "r-router")["spec"]["template"]["spec"]["containers"][0]
    assert [port["name"] for port in container["ports"]] == ["http"]


async def test_a_pool_names_the_router_as_picker_of_its_workers_and_of_itself() -> None:
    cluster = await settled()

    spec = cluster.get("InferencePool", "r")["spec"]
    service = cluster.get("Service", spec["endpointPickerRef"]["name"])["spec"]
    (port,) = service["ports"]
    container = cluster.get("Deployment", "r-router")["spec"]["template"]["spec"]["containers"][0]
    ports = {each["name"]: each["containerPort"] for each in container["ports"]}
    assert spec["endpointPickerRef"]["port"]["number"] == port["port"] == ports["picker"]
    assert (port["targetPort"], service["type"]) == ("picker", "ClusterIP")
    assert spec["endpointPickerRef"]["failureMode"] == "FailClose"
    assert [each["number"] for each in spec["targetPorts"]] == [8100, ports["http"]]
    for name in ("r-router", "s-unified", "l-decode"):
        (deployment,) = [
            each
            for each in cluster.store.find("Deployment")
            if each["metadata"]["name"].startswith(name)
        ]
        labels = deployment["spec"]["template"]["metadata"]["labels"]
        assert spec["selector"]["matchLabels"].items() <= labels.items()


async def test_the_router_listens_where_the_service_points() -> None:
    cluster = await settled()

    (config,) = [
        json.loads(each["data"]["config.json"])
        for each in cluster.store.find("ConfigMap")
        if "config.json" in each["data"] and each["metadata"]["name"].startswith("r-router")
    ]
    assert config["gateway_port"] == 9002


async def test_a_secret_makes_the_picker_speak_tls() -> None:
    named = ASKED.replace("gateways}", "gateways, tlsSecretName: picker-tls}")
    plain, secured = await settled(), await settled(named)

    pods = [c.get("Deployment", "r-router")["spec"]["template"]["spec"] for c in (plain, secured)]
    args, (container,) = pods[1]["containers"][0]["args"], pods[1]["containers"]
    folder = args[args.index("--gateway-tls") + 1]
    (volume,) = [v for v in pods[1]["volumes"] if v not in pods[0]["volumes"] and "secret" in v]
    assert volume["secret"] == {"secretName": "picker-tls"}
    mount = {"name": volume["name"], "mountPath": folder, "readOnly": True}
    assert mount in container["volumeMounts"]
    ports = [c.get("Service", "r-router-picker")["spec"]["ports"][0] for c in (plain, secured)]
    assert [port.get("appProtocol") for port in ports] == ["kubernetes.io/h2c", None]
    assert "--gateway-tls" not in pods[0]["containers"][0]["args"]


async def test_the_gateways_namespace_alone_reaches_the_picker_and_workers_that_answer() -> None:
    cluster = await settled()

    router = cluster.get("NetworkPolicy", "r-router")["spec"]["ingress"]
    picker = [rule for rule in router if 9002 in [port["port"] for port in rule["ports"]]]
    assert [rule["from"] for rule in picker] == [[GATEWAYS]]
    workers = cluster.get("NetworkPolicy", "r-router-gateway")["spec"]
    (rule,) = workers["ingress"]
    assert rule["from"] == [GATEWAYS]
    assert [port["port"] for port in rule["ports"]] == [8100]  # and not that of the KV blocks
    models, roles = workers["podSelector"]["matchExpressions"]
    assert (models["operator"], models["values"]) == ("In", ["l", "s"])
    assert (roles["operator"], roles["values"]) == ("NotIn", ["prefill"])


async def test_without_pools_the_picker_answers_and_status_says_what_is_missing() -> None:
    cluster = await settled(settings=Settings())

    ready = condition(cluster, "GatewayReady")
    assert cluster.names("InferencePool") == []
    assert "r-router-picker" in cluster.names("Service")
    assert ready is not None
    assert (ready["status"], ready["reason"]) == ("False", "NoInferencePools")
    assert "routers.inferencePools=true" in ready["message"]


async def test_a_gateway_that_is_named_no_more_is_forgotten() -> None:
    cluster = await settled()

    cluster.apply(BOTH)
    await cluster.settle()

    assert cluster.names("InferencePool") == []
    assert "r-router-picker" not in cluster.names("Service")
    assert "r-router-gateway" not in cluster.names("NetworkPolicy")


def test_a_cluster_that_lost_the_kind_is_told_of() -> None:
    pool = {"kind": "InferencePool", "metadata": {"name": "r"}}

    problem = refused_child(pool, ApiError(404, "the server could not find the resource"))

    assert problem is not None
    assert (problem.condition, problem.reason) == ("GatewayReady", "NoInferencePools")


async def spoken(kind: str, name: str, *said: Object) -> Object:
    """The condition of a Router after a controller wrote these parents' statuses."""
    route = {"host": "{router}.{namespace}.ai.test"}
    parent = {"name": "public", "namespace": "gateways"}
    rules = Entrance.model_validate(
        {"inferencePools": True, "httpRoute": {**route, "parentRefs": [parent]}}
    )
    cluster = await settled(settings=Settings(entrance=rules))
    if said:
        status = {"parents": [{"parentRef": parent, "conditions": [each]} for each in said]}
        cluster.store.write({**cluster.get(kind, name), "status": status}, manager="gateway")
        await cluster.settle()
    found = condition(cluster, "RouteReady" if kind == "HTTPRoute" else "GatewayReady")
    assert found is not None
    return found


def verdict(kind: str, status: str, reason: str = "Accepted", message: str = "") -> Object:
    return {"type": kind, "status": status, "reason": reason, "message": message}


async def test_a_route_whose_gateway_is_not_there_says_what_to_look_at() -> None:
    found = await spoken("HTTPRoute", "r-router")

    assert (found["status"], found["reason"]) == ("Unknown", "NoGateway")
    assert "Gateway public in namespace gateways is not there" in found["message"]
    assert "correct routers.httpRoute.parentRefs" in found["message"]


async def test_a_route_is_ready_once_its_gateway_says_so() -> None:
    found = await spoken("HTTPRoute", "r-router", verdict("Accepted", "True"))

    assert (found["status"], found["reason"]) == ("True", "RouteAccepted")
    assert found["message"] == "Gateway public in namespace gateways leads r.default.ai.test here"


async def test_a_refused_route_says_why_and_what_to_do() -> None:
    for reason, step in (
        ("NotAllowedByListeners", "take routes of namespace default (allowedRoutes)"),
        ("NoMatchingListenerHostname", "give the Gateway a listener for r.default.ai.test"),
        ("OfItsOwn", "kubectl describe httproute r-router says more"),
    ):
        no = verdict("Accepted", "False", reason, "it says no.")
        found = await spoken("HTTPRoute", "r-router", no)

        assert (found["status"], found["reason"]) == ("False", "RouteRefused")
        assert f"does not take it: {reason}, it says no; " in found["message"]
        assert step in found["message"]

    silent = await spoken("HTTPRoute", "r-router", verdict("Accepted", "False", "OfItsOwn"))
    assert "does not take it: OfItsOwn; kubectl describe" in silent["message"]


async def test_a_pool_that_no_gateway_uses_is_told_of_with_the_namespace_that_may() -> None:
    waiting = verdict("Accepted", "Unknown", "Pending", "Waiting for controller")

    for found in (
        await spoken("InferencePool", "r"),
        await spoken("InferencePool", "r", waiting),
    ):
        assert (found["status"], found["reason"]) == ("Unknown", "NoGateway")
        assert "kubectl get pods -n gateways" in found["message"]


async def test_a_pool_is_ready_with_the_gateway_that_uses_it_and_not_with_one_that_refuses() -> (
    None
):
    taken = await spoken("InferencePool", "r", verdict("Accepted", "True"))
    lost = verdict("ResolvedRefs", "False", "BackendNotFound", "no Service")
    refused = await spoken("InferencePool", "r", verdict("Accepted", "True"), lost)

    assert (taken["status"], taken["reason"]) == ("True", "Pooled")
    assert "for Gateway public in namespace gateways" in taken["message"]
    assert (refused["status"], refused["reason"]) == ("False", "PoolRefused")
    assert "see whether the Service or pool is there" in refused["message"]
