"""How requests get into a cluster to its routers; the chart's `routers` values."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from tandem_operator.resources.base import Values

_HOST = re.compile(r"^(\*\.)?[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")
_PLACES = ("{router}", "{namespace}")


def _host(text: str) -> str:
    """A host with a place for the Router's name, since each Router needs its own."""
    if not text:
        return text
    plain = text
    for place in _PLACES:
        plain = plain.replace(place, "x")
    if _PLACES[0] not in text:
        raise ValueError(f"{text!r} would be every Router's; write {{router}} into it")
    if not _HOST.match(plain):
        raise ValueError(f"{text!r} is no host; write one such as {{router}}.{{namespace}}.ai.test")
    return text


Host = Annotated[str, AfterValidator(_host)]
Annotations = dict[str, str]


class IngressRules(Values):
    """An Ingress per Router."""

    host: Host = Field(default="", description="Host; empty makes no Ingress.")
    class_name: str = Field(default="", description="ingressClassName; the cluster's when empty.")
    annotations: Annotations = Field(default_factory=dict, description="For the controller.")
    tls_secret: str = Field(
        default="", description="Secret of the Router's namespace with the certificate."
    )
    cluster_issuer: str = Field(
        default="", description="ClusterIssuer by which cert-manager makes that Secret."
    )


class RouteRules(Values):
    """An HTTPRoute per Router, for Gateway API."""

    host: Host = Field(default="", description="Host; empty makes no HTTPRoute.")
    parent_refs: tuple[dict[str, Any], ...] = Field(
        default=(), description="Gateways, as in an HTTPRoute."
    )
    annotations: Annotations = Field(default_factory=dict, description="For the controller.")


class Entrance(Values):
    """Plain Services inside the cluster, where nothing is said."""

    service_type: Literal["ClusterIP", "NodePort", "LoadBalancer"] = Field(
        default="ClusterIP", description="Type of the Service, where a Router says none."
    )
    service_annotations: Annotations = Field(
        default_factory=dict, description="Annotations of each Router's Service."
    )
    ip_family_policy: Literal["", "SingleStack", "PreferDualStack", "RequireDualStack"] = Field(
        default="", description="Of each Router's Service; the cluster's own when empty."
    )
    ingress: IngressRules = Field(default_factory=IngressRules)
    http_route: RouteRules = Field(default_factory=RouteRules)
    inference_pools: bool = Field(
        default=False, description="An InferencePool for each Router that names a gateway."
    )

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of objects that it makes besides Services."""
        made = (
            ("Ingress", self.ingress.host),
            ("HTTPRoute", self.http_route.host),
            ("InferencePool", self.inference_pools),
        )
        return tuple(kind for kind, wanted in made if wanted)


def filled(text: str, router: str, namespace: str) -> str:
    """A host or name with the Router's own name and namespace in it."""
    return text.replace("{router}", router).replace("{namespace}", namespace)
