"""Plans the NetworkPolicies: who may reach workers and routers, and whom they may reach.

A pod's label is no proof of who it is where others may make pods: peers in other namespaces are
named by their namespace, whose label the apiserver itself sets.
"""

from __future__ import annotations

from typing import Any

from tandem_operator.plan.objects import MODEL_LABEL, ROLE_LABEL, ROUTER_LABEL, Settings, child
from tandem_operator.resources import Model, Router
from tandem_operator.resources.base import Object

NAMESPACE_LABEL = "kubernetes.io/metadata.name"
_DNS = {"ports": [{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}]}


def worker_policy(model: Model, settings: Settings) -> Object:
    """Workers listen to routers and workers of their namespace, to the operator and to scrapers."""
    own = {"podSelector": {"matchLabels": {MODEL_LABEL: model.metadata.name}}}
    routers = {"podSelector": {"matchExpressions": [{"key": ROUTER_LABEL, "operator": "Exists"}]}}
    http, kv = _tcp(settings.worker_port), _tcp(settings.kv_port)
    ingress: list[Object] = [{"from": [routers, own], "ports": [http, kv]}]
    if others := [*_operator(settings), *settings.network.metrics_from]:
        ingress.append({"from": others, "ports": [http]})
    return _policy(
        model,
        f"{model.metadata.name}-worker",
        {MODEL_LABEL: model.metadata.name},
        ingress,
        [{"to": [own], "ports": [http, kv]}],
        settings,
    )


def router_policy(router: Router, name: str, settings: Settings) -> Object:
    """Routers listen on their one port, to whom the installation says; the operator always may."""
    port = _tcp(settings.router_port)
    ingress: list[Object] = [{"ports": [port]}]
    if settings.network.router_from:
        peers = [
            *settings.network.router_from,
            *_operator(settings),
            *settings.network.metrics_from,
        ]
        ingress = [{"from": peers, "ports": [port]}]
    if router.spec.gateway is not None:
        ports = [port, _tcp(settings.gateway_port)]
        ingress.append({"from": [_namespace(router.spec.gateway.namespace)], "ports": ports})
    workers = {"podSelector": {"matchExpressions": [{"key": MODEL_LABEL, "operator": "Exists"}]}}
    return _policy(
        router,
        name,
        {ROUTER_LABEL: router.metadata.name},
        ingress,
        [{"to": [workers], "ports": [_tcp(settings.worker_port)]}],
        settings,
    )


def closed_policy(
    owner: Model | Router, name: str, pods: dict[str, str], settings: Settings
) -> Object:
    """Nobody may reach these pods; they reach what the installation lets all reach."""
    return _policy(owner, name, pods, [], [], settings)


def gateway_policy(router: Router, gateway: str, name: str, settings: Settings) -> Object | None:
    """A gateway's namespace reaches the workers of this Router's Models that take requests.

    None where no tier has workers of ours.
    """
    used = {t.model_ref.name for t in router.spec.tiers if t.model_ref is not None}
    if not used:
        return None
    workers = [
        {"key": MODEL_LABEL, "operator": "In", "values": sorted(used)},
        {"key": ROLE_LABEL, "operator": "NotIn", "values": ["prefill"]},
    ]
    peer = _namespace(gateway)
    spec = {
        "podSelector": {"matchExpressions": workers},
        "policyTypes": ["Ingress"],
        "ingress": [{"from": [peer], "ports": [_tcp(settings.worker_port)]}],
    }
    body = {"spec": spec}
    return child(router, "networking.k8s.io/v1", "NetworkPolicy", f"{name}-gateway", body)


def _policy(
    owner: Model | Router,
    name: str,
    pods: dict[str, str],
    ingress: list[Object],
    egress: list[Object],
    settings: Settings,
) -> Object:
    spec: Object = {
        "podSelector": {"matchLabels": pods},
        "policyTypes": ["Ingress"],
        "ingress": ingress,
    }
    rules = settings.network
    if rules.restrict_egress:
        beyond = [{"to": list(rules.egress_to)}] if rules.egress_to else []
        spec |= {"policyTypes": ["Ingress", "Egress"], "egress": [_DNS, *egress, *beyond]}
    return child(owner, "networking.k8s.io/v1", "NetworkPolicy", name, {"spec": spec})


def _operator(settings: Settings) -> list[dict[str, Any]]:
    """The operator's pods in its own namespace; nobody where it runs outside the cluster."""
    if not settings.own_namespace:
        return []
    return [
        {
            "namespaceSelector": {"matchLabels": {NAMESPACE_LABEL: settings.own_namespace}},
            "podSelector": {"matchLabels": {"app.kubernetes.io/name": "tandem-operator"}},
        }
    ]


def _namespace(name: str) -> Object:
    return {"namespaceSelector": {"matchLabels": {NAMESPACE_LABEL: name}}}


def _tcp(port: int) -> Object:
    return {"port": port, "protocol": "TCP"}
