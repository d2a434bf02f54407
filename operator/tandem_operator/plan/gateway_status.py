"""What a gateway's controller says of the routes and pools that an installation makes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tandem_operator.plan.conditions import Conditions
from tandem_operator.plan.objects import Plan
from tandem_operator.resources import Router
from tandem_operator.resources.base import Object

# What to do about the reasons that Gateway API defines; `{host}` and `{namespace}` are the route's.
_STEPS = {
    "NotAllowedByListeners": "let a listener of the Gateway take routes of namespace {namespace} "
    "(allowedRoutes)",
    "NoMatchingListenerHostname": "give the Gateway a listener for {host}, or change "
    "routers.httpRoute.host of the chart",
    "NoMatchingParent": "correct routers.httpRoute.parentRefs of the chart: sectionName and port "
    "name a listener",
    "InvalidListener": "repair the Gateway's listener first (kubectl describe gateway)",
    "RefNotPermitted": "grant the reference (ReferenceGrant) in the namespace that it leads to",
    "BackendNotFound": "see whether the Service or pool is there (kubectl get services)",
}
_DESCRIBE = "kubectl describe {kind} {name} says more"


def add_gateway_conditions(
    conditions: Conditions, router: Router, plan: Plan, made: Iterable[Object]
) -> None:
    """RouteReady where there is an HTTPRoute, GatewayReady where a gateway is named.

    made: the Router's children as they are.
    """
    by_kind = {obj["kind"]: obj for obj in made if obj["kind"] in ("HTTPRoute", "InferencePool")}
    if (route := by_kind.get("HTTPRoute")) is not None:
        _route(conditions, route)
    if router.spec.gateway is None:
        return
    problem = next((p for p in plan.problems if p.condition == "GatewayReady"), None)
    if problem is not None:
        conditions.add("GatewayReady", False, problem.reason, problem.message)
    else:
        _pool(conditions, router.spec.gateway.namespace, by_kind.get("InferencePool"))


def _route(conditions: Conditions, route: Object) -> None:
    name, spec = route["metadata"]["name"], route.get("spec") or {}
    parents = _parents(route)
    wanted = ", ".join(_called(ref, route) for ref in spec.get("parentRefs") or []) or "none"
    if refused := _refused(parents, route):
        conditions.add("RouteReady", False, "RouteRefused", refused)
    elif not parents:
        text = (
            f"no gateway has looked at HTTPRoute {name} yet; where that lasts, {wanted} is not "
            "there (kubectl get gateways -A), or no controller runs it: correct "
            "routers.httpRoute.parentRefs of the chart"
        )
        conditions.add("RouteReady", None, "NoGateway", text)
    else:
        hosts = ", ".join(spec.get("hostnames") or [])
        taken = ", ".join(_called(p.get("parentRef") or {}, route) for p in parents)
        conditions.add("RouteReady", True, "RouteAccepted", f"{taken} leads {hosts} here")


def _pool(conditions: Conditions, namespace: str, pool: Object | None) -> None:
    parents = _parents(pool) if pool is not None else []
    if pool is not None and (refused := _refused(parents, pool)):
        conditions.add("GatewayReady", False, "PoolRefused", refused)
    elif pool is None or not parents:
        text = (
            "no gateway uses the InferencePool yet: name it in an HTTPRoute of your gateway, and "
            f"see that the gateway's pods run in namespace {namespace} (kubectl get pods -n "
            f"{namespace}), which alone may reach the picker; the picker answers meanwhile"
        )
        conditions.add("GatewayReady", None, "NoGateway", text)
    else:
        name = pool["metadata"]["name"]
        users = ", ".join(_called(p.get("parentRef") or {}, pool) for p in parents)
        text = f"InferencePool {name} names this Router as its endpoint picker, for {users}"
        conditions.add("GatewayReady", True, "Pooled", text)


def _parents(obj: Object) -> list[Mapping[str, Any]]:
    """Of the parents in a status those that a controller has said something of."""
    listed = (obj.get("status") or {}).get("parents") or []
    return [
        p
        for p in listed
        if any(c.get("status") in ("True", "False") for c in p.get("conditions") or [])
    ]


def _refused(parents: Iterable[Mapping[str, Any]], obj: Object) -> str:
    """The first thing that a controller holds against an object, with what to do; "" for none."""
    for parent in parents:
        for said in parent.get("conditions") or []:
            if said.get("type") not in ("Accepted", "ResolvedRefs") or said["status"] != "False":
                continue
            reason, message = str(said.get("reason", "")), str(said.get("message", ""))[:400]
            step = _STEPS.get(reason, _DESCRIBE).format(
                host=", ".join((obj.get("spec") or {}).get("hostnames") or []),
                namespace=obj["metadata"]["namespace"],
                kind=obj["kind"].lower(),
                name=obj["metadata"]["name"],
            )
            by = _called(parent.get("parentRef") or {}, obj)
            why = ", ".join(filter(None, (reason, message.rstrip(". "))))
            return f"{by} does not take it: {why}; {step}"
    return ""


def _called(ref: Mapping[str, Any], obj: Object) -> str:
    """A parent in words."""
    namespace = ref.get("namespace") or obj["metadata"]["namespace"]
    return f"{ref.get('kind') or 'Gateway'} {ref.get('name')} in namespace {namespace}"
