"""How Models and Routers stand, for Prometheus: what alerts ask, read from their own status.

Labels `namespace` and `name` are the resource's; a PodMonitor keeps them by honorLabels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tandem_operator.plan.decode import parse
from tandem_operator.resources import Router
from tandem_operator.resources.base import Object

# Copies of the resources of a kind; none from a replica that stands by.
Copies = Callable[[str], list[Object]]


class ResourceMetrics(Collector):
    """Read from the copies at each scrape, so that what is gone is gone from the metrics."""

    def __init__(self, copies: Copies) -> None:
        self._copies = copies

    def collect(self) -> Iterator[Metric]:
        """One family per question."""
        conditions = GaugeMetricFamily(
            "tandem_operator_condition",
            "1 for each condition of a Model or Router as it stands.",
            labels=["kind", "namespace", "name", "type", "status", "reason"],
        )
        workers = GaugeMetricFamily(
            "tandem_operator_workers",
            "Workers of a Model by role: wanted, ready, updated.",
            labels=["namespace", "name", "role", "state"],
        )
        price = GaugeMetricFamily(
            "tandem_operator_usd_per_hour",
            "Price of a Model's or Router's wanted workers, US dollars per hour.",
            labels=["kind", "namespace", "name"],
        )
        budget = GaugeMetricFamily(
            "tandem_operator_budget_usd_per_hour",
            "Budget of a Router, US dollars per hour.",
            labels=["namespace", "router"],
        )
        floor = GaugeMetricFamily(
            "tandem_operator_quality_floor",
            "Quality floor that a Router holds, a fraction of the dearest tier's quality.",
            labels=["namespace", "router"],
        )
        for kind in ("Model", "Router"):
            for obj in self._copies(kind):
                own = (obj["metadata"]["namespace"], obj["metadata"]["name"])
                status = obj.get("status") or {}
                for c in status.get("conditions") or []:
                    told = (c["type"], c["status"], c.get("reason", ""))
                    conditions.add_metric([kind, *own, *told], 1)
                for role in status.get("roles") or []:
                    for state in ("wanted", "ready", "updated"):
                        workers.add_metric([*own, role["role"], state], role.get(state, 0))
                if (usd := status.get("usdPerHour")) is not None:
                    price.add_metric([kind, *own], float(usd))
        for obj in self._copies("Router"):
            own = (obj["metadata"]["namespace"], obj["metadata"]["name"])
            router = parse(obj)
            if not isinstance(router, Router):
                continue
            if router.spec.budget.usd_per_hour is not None:
                budget.add_metric(own, float(router.spec.budget.usd_per_hour))
            if router.spec.held_floor is not None:
                floor.add_metric(own, router.spec.held_floor)
        yield from (conditions, workers, price, budget, floor)
