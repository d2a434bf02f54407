"""Who may talk to workers and routers; the chart's `networkPolicies` values."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from tandem_operator.resources.base import Values

Peer = dict[str, Any]

MONITORING: Peer = {
    "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}
}


class NetworkRules(Values):
    """Peers are those of a Kubernetes NetworkPolicy."""

    enabled: bool = Field(
        default=True, description="NetworkPolicies for the pods of workers and routers."
    )
    metrics_from: tuple[Peer, ...] = Field(
        default=(MONITORING,), description="Who may scrape; Prometheus."
    )
    router_from: tuple[Peer, ...] = Field(
        default=(), description="Who may ask routers; empty means everybody."
    )
    restrict_egress: bool = Field(
        default=False,
        description="Let pods reach nobody but each other, DNS and egressTo.",
    )
    egress_to: tuple[Peer, ...] = Field(
        default=(),
        description="With restrictEgress: whom workers and routers may reach besides, such as the "
        "apiserver, external tiers and the hosts of weights.",
    )
