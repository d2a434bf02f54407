"""Plans what lets requests from outside reach a Router: its Service, an Ingress, an HTTPRoute."""

from __future__ import annotations

from tandem_operator.plan.objects import ROUTER_LABEL, Settings, child, service_name
from tandem_operator.resources import Router
from tandem_operator.resources.base import Object
from tandem_operator.resources.entrance import filled


def entrances(router: Router, name: str, settings: Settings) -> list[Object]:
    """The Service, and what the installation puts before it. name: of the router's objects."""
    made = [_service(router, name, settings)]
    rules = settings.entrance
    if rules.ingress.host:
        made.append(_ingress(router, name, settings))
    if rules.http_route.host:
        made.append(_http_route(router, name, settings))
    return made


def _service(router: Router, name: str, settings: Settings) -> Object:
    port = {"name": "http", "port": router.spec.port, "targetPort": "http", "protocol": "TCP"}
    spec: Object = {
        "type": router.spec.service_type or settings.entrance.service_type,
        "selector": {ROUTER_LABEL: router.metadata.name},
        "ports": [port],
    }
    if settings.entrance.ip_family_policy:
        spec["ipFamilyPolicy"] = settings.entrance.ip_family_policy
    marks = settings.entrance.service_annotations
    return child(router, "v1", "Service", service_name(name), {"spec": spec}, annotations=marks)


def _ingress(router: Router, name: str, settings: Settings) -> Object:
    rules = settings.entrance.ingress
    own = (router.metadata.name, router.metadata.namespace)
    host = filled(rules.host, *own)
    service = {"name": service_name(name), "port": {"name": "http"}}
    path = {"path": "/", "pathType": "Prefix", "backend": {"service": service}}
    spec: Object = {"rules": [{"host": host, "http": {"paths": [path]}}]}
    if rules.class_name:
        spec["ingressClassName"] = rules.class_name
    if rules.tls_secret:
        spec["tls"] = [{"hosts": [host], "secretName": filled(rules.tls_secret, *own)}]
    marks = dict(rules.annotations)
    if rules.cluster_issuer:
        marks["cert-manager.io/cluster-issuer"] = rules.cluster_issuer
    body = {"spec": spec}
    return child(router, "networking.k8s.io/v1", "Ingress", name, body, annotations=marks)


def _http_route(router: Router, name: str, settings: Settings) -> Object:
    rules = settings.entrance.http_route
    host = filled(rules.host, router.metadata.name, router.metadata.namespace)
    spec = {
        "parentRefs": [dict(ref) for ref in rules.parent_refs],
        "hostnames": [host],
        "rules": [
            {
                "matches": [{"path": {"type": "PathPrefix", "value": "/"}}],
                "backendRefs": [{"name": service_name(name), "port": router.spec.port}],
                # Answers of minutes are usual; a gateway's own limit would cut them off.
                "timeouts": {"request": "0s"},
            }
        ],
    }
    version, marks = "gateway.networking.k8s.io/v1", rules.annotations
    return child(router, version, "HTTPRoute", name, {"spec": spec}, annotations=marks)
