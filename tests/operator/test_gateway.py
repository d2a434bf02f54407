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
    ready = condition(cluster, "GatewayReady")
    assert ready is not None
    assert ready["status"] == "True"


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
