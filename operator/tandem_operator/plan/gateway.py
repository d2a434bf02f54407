"""Plans what lets a gateway ask a Router: the picker's Service, the pool, who may pass."""

from __future__ import annotations

from tandem_operator.plan.network import gateway_policy
from tandem_operator.plan.objects import (
    MANAGED,
    ROUTER_LABEL,
    Problem,
    Settings,
    child,
    service_name,
)
from tandem_operator.resources import Router
from tandem_operator.resources.base import Object

PORT_NAME = "picker"
TLS_DIR = "/etc/tandem/gateway-tls"


def picker_name(name: str) -> str:
    """Name of the Service at which a gateway asks. name: of the router's objects."""
    return service_name(f"{name}-picker")


def gateway_objects(router: Router, name: str, settings: Settings) -> list[Object]:
    """Nothing where no gateway is named. name: of the router's objects."""
    gateway = router.spec.gateway
    if gateway is None:
        return []
    made = [_picker_service(router, name, settings)]
    policy = gateway_policy(router, gateway.namespace, name, settings)
    if settings.network.enabled and policy is not None:
        made.append(policy)
    if settings.entrance.inference_pools:
        made.append(_pool(router, name, settings))
    return made


def gateway_problem(router: Router, settings: Settings) -> Problem | None:
    """Why nothing points a gateway here by itself."""
    if router.spec.gateway is None or settings.entrance.inference_pools:
        return None
    return Problem(
        "GatewayReady",
        "NoInferencePools",
        "the picker answers, but this installation makes no InferencePool for a route to name; "
        "install the definitions of the Gateway API Inference Extension and set "
        "routers.inferencePools=true of the chart, or make a pool yourself",
    )


def add_picker(
    router: Router,
    container: Object,
    args: list[str],
    mounts: list[Object],
    volumes: list[Object],
    settings: Settings,
) -> None:
    """Add the picker's port, and the certificate that it shows, to a router pod."""
    gateway = router.spec.gateway
    if gateway is None:
        return
    port = {"name": PORT_NAME, "containerPort": settings.gateway_port, "protocol": "TCP"}
    container["ports"].append(port)
    if (secret := gateway.tls_secret_name) is not None:
        args += ["--gateway-tls", TLS_DIR]
        mounts.append({"name": "gateway-tls", "mountPath": TLS_DIR, "readOnly": True})
        volumes.append({"name": "gateway-tls", "secret": {"secretName": secret}})


def _picker_service(router: Router, name: str, settings: Settings) -> Object:
    """Of its own: the Router's may be open to the outside."""
    port = {
        "name": PORT_NAME,
        "port": settings.gateway_port,
        "targetPort": PORT_NAME,
        "protocol": "TCP",
    }
    if router.spec.gateway is not None and router.spec.gateway.tls_secret_name is None:
        # Of gRPC over TLS appProtocol has no word; the gateway is told of that by its own policy.
        port["appProtocol"] = "kubernetes.io/h2c"
    spec = {
        "type": "ClusterIP",
        "selector": {ROUTER_LABEL: router.metadata.name},
        "ports": [port],
    }
    return child(router, "v1", "Service", picker_name(name), {"spec": spec})


def _pool(router: Router, name: str, settings: Settings) -> Object:
    """All of Tandem's pods: the picker names the one, a worker or the router itself.

    A pool selects by labels that all its pods have, and workers of several Models and router pods
    have no other in common.
    """
    spec = {
        "selector": {"matchLabels": dict(MANAGED)},
        "targetPorts": [{"number": settings.worker_port}, {"number": settings.router_port}],
        "endpointPickerRef": {
            "group": "",
            "kind": "Service",
            "name": picker_name(name),
            "port": {"number": settings.gateway_port},
            # Whom a gateway tried without asking would refuse it.
            "failureMode": "FailClose",
        },
    }
    version = "inference.networking.k8s.io/v1"
    return child(router, version, "InferencePool", router.metadata.name, {"spec": spec})
