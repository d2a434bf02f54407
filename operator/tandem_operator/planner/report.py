"""A search as people read it: the recommendation in sentences, the front, the YAML to apply."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from tandem_operator.planner.candidates import Candidate
from tandem_operator.planner.search import Found, Judged, Wanted
from tandem_operator.resources import API_VERSION, Model, Router


def sentences(found: Found, wanted: Wanted, *, scored: bool) -> list[str]:
    """What to do and why.

    scored: whether the requests have predictions, so that there was a threshold to choose.
    """
    lines: list[str] = []
    best = found.best
    if best is None:
        holding = found.cheapest_holding
        if holding is None:
            lines.append("no plan tried holds the SLO: one request alone may take too long for it")
        else:
            budget = _budget(wanted)
            lines.append(
                f"this budget cannot hold this SLO: {budget} where the cheapest plan that holds it "
                f"costs ${holding.candidate.usd_per_hour:.2f}/h and {holding.candidate.gpus} GPUs "
                f"({holding.candidate.describe()})"
            )
        return lines
    plan = best.candidate
    lines.append(
        f"run {plan.describe()}: ${plan.usd_per_hour:.2f}/h, {plan.gpus} GPUs, "
        f"{_share(best.score.slo_met)} of requests within the SLO"
        + (
            f", quality {best.score.quality_ratio:.4f} of the dearest tier's"
            if best.score.quality_ratio is not None
            else ""
        )
    )
    used = {tier for (tier, _), _ in plan.workers}
    if len(used) == 1 and not scored:
        lines.append(
            f"every request goes to the fallback tier {next(iter(used))}, because nothing says "
            "which prompts need it; give --outcomes and --artifact to plan for routing"
        )
    elif len(used) == 1:
        lines.append(f"one tier is enough: {next(iter(used))} holds everything alone")
    for tier in sorted(used):
        if plan.count((tier, "unified")):
            lines.append(f"do not disaggregate {tier}: no split plan was cheaper at this SLO")
        else:
            lines.append(f"disaggregate {tier}: prefill and decode apart were cheaper at this SLO")
    if found.next_cheaper is not None:
        cheaper = found.next_cheaper
        lines.append(
            f"the next cheaper plan (${cheaper.candidate.usd_per_hour:.2f}/h, "
            f"{cheaper.candidate.describe()}) would need {_share(wanted.slo_share)} of requests "
            f"within the SLO and reaches {_share(cheaper.score.slo_met)}: TTFT p95 "
            f"{_time(cheaper.score.ttft_p95_s)}, TPOT p95 {_time(cheaper.score.tpot_p95_s)}"
        )
    return lines


def front_table(found: Found) -> list[str]:
    """The Pareto front, cheapest first."""
    lines = [f"{'$/h':>8} {'GPUs':>5} {'SLO met':>8} {'quality':>8}  plan"]
    for one in found.front:
        lines.append(_row(one))
    return lines


def _row(one: Judged) -> str:
    ratio = one.score.quality_ratio
    return (
        f"{one.candidate.usd_per_hour:8.2f} {one.candidate.gpus:5d} {_share(one.score.slo_met):>8} "
        f"{'-' if ratio is None else f'{ratio:.4f}':>8}  {one.candidate.describe()}"
    )


def manifests(
    plan: Candidate, router: Router, models: Mapping[str, Model], threshold_is_free: bool
) -> str:
    """The Models and the Router with this plan's pools, as YAML."""
    documents: list[dict[str, Any]] = []
    for tier in router.spec.tiers:
        if tier.model_ref is None:
            continue
        model = models[tier.model_ref.name]
        spec = model.spec.to_wire()
        roles = {role: spec.pop(role, None) for role in ("unified", "prefill", "decode")}
        usual = next(role for role in roles.values() if role is not None)
        for role in roles:
            count = plan.count((tier.name, role))  # type: ignore[arg-type]
            if count:
                spec[role] = {**(roles[role] or usual), "replicas": count}
        if plan.max_batched_tokens is not None:
            engine = {**spec.get("engine", {}), "maxBatchedTokens": plan.max_batched_tokens}
            spec["engine"] = engine
        if not any(role in spec for role in roles):
            spec["unified"] = {**usual, "replicas": 0}
        documents.append(_document("Model", model.metadata.name, spec))
    spec = router.spec.to_wire()
    if threshold_is_free and len(router.spec.tiers) > 1:
        # A Router takes 0 to 1: below, all that is worth anything goes to the dearest tier.
        spec["threshold"] = f"{min(1.0, max(0.0, plan.threshold)):.4f}"
    documents.append(_document("Router", router.metadata.name, spec))
    return yaml.safe_dump_all(documents, sort_keys=False)


def _document(kind: str, name: str, spec: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": API_VERSION, "kind": kind, "metadata": {"name": name}, "spec": spec}


def _budget(wanted: Wanted) -> str:
    parts = []
    if wanted.usd_per_hour is not None:
        parts.append(f"${wanted.usd_per_hour:.2f}/h")
    if wanted.gpus is not None:
        parts.append(f"{wanted.gpus} GPUs")
    return " and ".join(parts) + (" is given" if len(parts) == 1 else " are given")


def _share(value: float) -> str:
    return f"{100.0 * value:.1f} %"


def _time(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{1000.0 * value:.0f} ms" if value < 1.0 else f"{value:.2f} s"
