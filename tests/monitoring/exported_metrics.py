"""What operator, router and worker export, with at least one series of every family."""

from __future__ import annotations

import itertools
from dataclasses import MISSING, fields
from typing import Any

from prometheus_client import generate_latest

from tandem_operator.kube.operator import Vitals
from tandem_operator.kube.probes import exposition
from tandem_operator.kube.resource_metrics import ResourceMetrics
from tandem_router.telemetry.metrics import Family, Metrics
from tandem_worker.engine.core import EngineCounters
from tandem_worker.engine.thread import EngineLoad
from tandem_worker.metrics import WorkerMetrics
from tandem_worker.transfer import TransferStats

Object = dict[str, Any]
_steps = itertools.count(1)


class _Counted:
    num_writes = num_reads = 0


def _numbers(kind: Any, value: int) -> Any:
    return kind(**{f.name: value for f in fields(kind) if f.default_factory is MISSING})


def _resource(kind: str) -> list[Object]:
    """A Model or Router with every part of a status that is exported."""
    conditions = [
        {"type": name, "status": "False", "reason": "Missed"}
        for name in ("Ready", "SLOMet", "WithinBudget")
    ]
    conditions.append({"type": "Progressing", "status": "True", "reason": "RollingOut"})
    tiers = [{"name": n, "modelRef": {"name": n}} for n in ("small", "large")]
    spec: Object = {
        "tiers": tiers,
        "budget": {"usdPerHour": "9"},
        "predictor": {"type": "Learned", "artifact": "pvc://claim/p"},
    }
    roles = [{"role": "unified", "wanted": 2, "ready": 1, "updated": 1}]
    status = {"conditions": conditions, "usdPerHour": "3", "roles": roles}
    metadata = {"name": "x", "namespace": "n", "uid": "u"}
    return [{"kind": kind, "metadata": metadata, "spec": spec, "status": status}]


def _router() -> str:
    metrics = Metrics(["small"])
    number = float(next(_steps))
    for family in vars(metrics).values():
        if isinstance(family, Family) and family.names:
            family[tuple("x" for _ in family.names)]
    for family in [v for v in vars(metrics).values() if isinstance(v, Family)]:
        for child in family.values():
            for change in ("inc", "observe"):
                if hasattr(child, change):
                    getattr(child, change)(number)
                    break
    for name in ("measured_quality", "measured_low", "measured_high"):
        getattr(metrics, name).set(0.97)
    metrics.cost_all_large.inc(2 * number)
    return generate_latest(metrics.registry).decode()


def text() -> str:
    """All three in Prometheus' text format; counters grow from call to call."""
    number = next(_steps)
    worker = WorkerMetrics("m")
    worker.watch(
        lambda: _numbers(EngineLoad, number),
        lambda: _numbers(EngineCounters, number),
    )
    worker.watch_transfer(lambda: _numbers(TransferStats, number))
    operator = exposition(
        Vitals(_Counted()).readings(),  # type: ignore[arg-type]
        ResourceMetrics(_resource),
    )
    return operator.decode() + _router() + generate_latest(worker.registry).decode()
