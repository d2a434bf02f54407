"""Which edits of a Router make new pods: those of what a pod mounts, is, or is built around."""

from __future__ import annotations

import doors_resources as resources
from doors_kit import doors
from tandem_operator.plan import Settings, plan_router
from tandem_operator.resources import SPECS, Router

# docs/operator.md, "Settings of a running Router", says the same.
RESTARTING = (
    "access",
    "cache",
    "image",
    "keySecretRef",
    "learning.judge.apiKeySecretRef.name",
    "metricsTokenSecretRef",
    "podPatch",
    "predictor",
    "resources",
    "store.postgres",
    "tiers.external",
    "tiers.modelRef",
    "tiers.name",
)
PRICES = "tiers.external.usdPer1M"


def restarts(path: str) -> bool:
    """Whether a change of the field is said to make new pods."""
    named = any(path == field or path.startswith(f"{field}.") for field in RESTARTING)
    return named and not path.startswith(PRICES)


def revisions(door: object) -> set[str]:
    """The revisions of the pods under each value of a field."""
    found = set()
    for spec in resources.variants("Router", door, resources.ROWS["Router"]) or []:  # type: ignore[arg-type]
        router = resources.typed("Router", "r", spec)
        if isinstance(router, Router):
            plan = plan_router(router, resources.MODELS, [router], Settings(), "token")
            found.add(plan.revision)
    return found


def test_only_what_a_pod_mounts_or_is_built_around_makes_new_pods() -> None:
    made = {door.path: len(revisions(door)) > 1 for door in doors(SPECS["Router"])}

    assert {path for path, new in made.items() if new} == {p for p in made if restarts(p)}
    for path in ("threshold", "budget.usdPerHour", "slo.ttft.target", "tenants.maxConcurrency"):
        assert not made[path]
    for path in ("port", "replicas", "serviceType", "routing", "objective.qualityFloor"):
        assert not made[path]
