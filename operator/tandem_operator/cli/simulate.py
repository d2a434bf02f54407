"""`tandem simulate PLAN TRACE`: what a plan would have done with a trace."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from tandem_operator.cli.traffic import add_traffic, artifact_of, inputs


def register(subparsers: Any) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "simulate",
        help="replay a trace against a plan on a virtual clock",
        description="Replays a trace against the Models and the Router of PLAN on a virtual clock, "
        "with the policies that the services use. Needs a performance profile of each tier, as "
        "`tandem profile` writes it.",
    )
    add_traffic(parser)
    parser.add_argument("--startup", type=float, default=60.0, metavar="SECONDS",
                        help="from a new worker's start until it serves")  # fmt: skip
    parser.add_argument("--fixed", action="store_true", help="no scaling: replicas stay")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result as data")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write one page with plots")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """The command; raises CommandError with a sentence."""
    with inputs() as read:
        from tandem_operator.simulate import report
        from tandem_operator.simulate.plan_file import simulation_plan
        from tandem_operator.simulate.simulation import Simulation

        resources, profiles, arrivals = read(arguments)
        plan = simulation_plan(
            resources,
            profiles,
            seed=arguments.seed,
            startup_s=arguments.startup,
            scaling=not arguments.fixed,
            predictor=artifact_of(arguments),
        )
        result = Simulation(plan, arrivals).run(_progress if sys.stderr.isatty() else None)
    if sys.stderr.isatty():
        sys.stderr.write("\r\x1b[K")
    print(report.table(result))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    if arguments.html is not None:
        title = f"Simulated: {resources.router.metadata.name} under {arguments.plan[-1]}"
        arguments.html.write_text(report.page(result, title))
    return 0


def _progress(virtual_s: float, served: int) -> None:
    sys.stderr.write(f"\rsimulated {virtual_s / 60.0:.0f} min, {served} requests served\x1b[K")
    sys.stderr.flush()
