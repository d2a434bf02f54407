"""`tandem plan FILES TRACE`: which layout, how many workers and which threshold to run."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tandem_operator.cli.errors import CommandError

MOST_REQUESTS = 6000


def register(subparsers: Any) -> None:
    """Adds the command."""
    from tandem_operator.cli.traffic import add_traffic

    parser = subparsers.add_parser(
        "plan",
        help="search the cheapest plan that holds SLO, floor and budget",
        description="Searches layouts (unified, or prefill and decode apart), replicas and the "
        "routing threshold for the Models and the Router of the files under a trace: first by the "
        "control loop's formulas, then by simulation. Prints the plan with its reasons, the Pareto "
        "front, what breaks the next cheaper plan, and the YAML.",
    )
    add_traffic(parser)
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the YAML here")
    parser.add_argument("--requests", type=int, default=MOST_REQUESTS, metavar="N",
                        help="of the trace, for each simulation")  # fmt: skip
    parser.add_argument("--what-if", metavar="CHANGES",
                        help="such as floor=0.9,price.large=2,rate=1.5,budget=20")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result as data")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """The command; raises CommandError with a sentence."""
    from tandem_operator.cli.traffic import inputs

    changes = _changes(arguments.what_if)
    with inputs() as read:
        resources, profiles, arrivals = read(arguments)
        return _plan(arguments, resources, profiles, list(arrivals), changes)


def _changes(text: str | None) -> dict[str, float]:
    found: dict[str, float] = {}
    for part in (text or "").split(","):
        if not part:
            continue
        name, equals, number = part.partition("=")
        known = name in ("floor", "rate", "budget", "gpus") or name.startswith("price.")
        try:
            value = float(number)
        except ValueError:
            value = float("nan")
        if not (equals and known and value >= 0.0):
            raise CommandError(
                f"--what-if {part!r}: write floor=, rate=, budget=, gpus= or price.TIER=, a number"
            )
        found[name] = value
    return found


def _plan(
    arguments: argparse.Namespace,
    resources: Any,
    profiles: Any,
    arrivals: list[Any],
    changes: dict[str, float],
) -> int:
    from tandem_operator.planner import report
    from tandem_operator.planner.candidates import propose, shares_of
    from tandem_operator.planner.search import search
    from tandem_operator.simulate.plan_file import with_floor

    if not arrivals:
        raise CommandError("the trace is empty")
    if (floor := changes.get("floor")) is not None:
        resources = with_floor(resources, floor)
    if (factor := changes.get("rate")) is not None:
        if factor <= 0.0:
            raise CommandError("--what-if rate=0: a rate is a factor above 0")
        arrivals = [replace(a, at_s=a.at_s / factor) for a in arrivals]
    tiers, wanted, slo = _question(resources, profiles, changes)
    names = [tier.name for tier in resources.router.spec.tiers]
    points = shares_of(arrivals, names, resources.router.spec.fallback_tier)
    candidates = list(propose(tiers, points, arrivals, slo, wanted.quality_floor))
    simulate = _Simulator(resources, profiles, tiers, arrivals)
    count = min(len(arrivals), arguments.requests)
    found = search(candidates, tiers, wanted, simulate, count, _say)
    lines = report.sentences(found, wanted, scored=any(p.quality_ratio is not None for p in points))
    print("\n".join([*lines, "", *report.front_table(found)]))
    best = found.best
    if best is not None:
        free = resources.router.spec.threshold is None and wanted.quality_floor is None
        text = report.manifests(best.candidate, resources.router, resources.models, free)
        if arguments.output is not None:
            arguments.output.write_text(text)
            print(f"\nwrote {arguments.output}; run it with `tandem up {arguments.output}`")
        else:
            print("\n" + text)
    if arguments.json is not None:
        data = {
            "sentences": lines,
            "best": _data(best),
            "front": [_data(one) for one in found.front],
            "simulated": found.num_simulated,
        }
        arguments.json.write_text(json.dumps(data, indent=1) + "\n")
    return 0 if best is not None else 1


def _question(resources: Any, profiles: Any, changes: dict[str, float]) -> tuple[Any, Any, Any]:
    """Tiers to be sized, what has to hold, and the SLO for the formulas."""
    from tandem_operator.planner.candidates import TierSpec
    from tandem_operator.planner.search import Wanted
    from tandem_operator.simulate.plan_file import loop_slo, wanted_floor

    router = resources.router
    known = {tier.name for tier in router.spec.tiers}
    for name in changes:
        if name.startswith("price.") and name.removeprefix("price.") not in known:
            raise CommandError(f"--what-if {name}: the Router has the tiers {', '.join(known)}")
    tiers = []
    for tier in router.spec.tiers:
        if tier.model_ref is None:
            continue
        model = resources.models[tier.model_ref.name]
        roles = list(model.spec.roles().values())
        price = changes.get(f"price.{tier.name}", float(roles[0].usd_per_hour or 0.0))
        tiers.append(
            TierSpec(
                tier.name,
                profiles[tier.name],
                max(role.gpus for role in roles),
                price,
                model.spec.engine.max_num_seqs,
            )
        )
    slo = loop_slo(resources)
    budget = router.spec.budget
    wanted = Wanted(
        min(slo.ttft_percentile, slo.tpot_percentile) / 100.0,
        wanted_floor(resources),
        changes.get("budget", float(budget.usd_per_hour) if budget.usd_per_hour else None),
        int(changes["gpus"]) if "gpus" in changes else budget.gpus,
    )
    return tiers, wanted, slo


class _Simulator:
    """Scores a plan by a run without scaling."""

    def __init__(
        self, resources: Any, profiles: Any, tiers: Sequence[Any], arrivals: list[Any]
    ) -> None:
        self._resources = resources
        self._profiles = profiles
        self._tiers = tiers
        self._arrivals = arrivals

    def __call__(self, plan: Any, num_requests: int) -> Any:
        from tandem_operator.planner.search import Score
        from tandem_operator.simulate.plan_file import fixed_plan
        from tandem_operator.simulate.simulation import Simulation

        simulated = fixed_plan(
            self._resources,
            self._profiles,
            dict(plan.workers),
            plan.threshold,
            plan.max_batched_tokens,
        )
        result = Simulation(simulated, iter(self._arrivals[:num_requests])).run()
        return Score(
            result["slo"]["both"] or 0.0,
            result["quality_ratio"],
            result["ttft_s"]["p95"],
            result["tpot_s"]["p95"],
        )


def _data(one: Any) -> Any:
    if one is None:
        return None
    return {
        "workers": {f"{tier}/{role}": count for (tier, role), count in one.candidate.workers},
        "threshold": one.candidate.threshold,
        "max_batched_tokens": one.candidate.max_batched_tokens,
        "usd_per_hour": one.candidate.usd_per_hour,
        "gpus": one.candidate.gpus,
        "slo_met": one.score.slo_met,
        "quality_ratio": one.score.quality_ratio,
    }


def _say(text: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(text + "\n")
