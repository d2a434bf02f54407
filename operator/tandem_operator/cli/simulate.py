"""`tandem simulate PLAN TRACE`: what a plan would have done with a trace."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tandem_operator.cli.errors import CommandError


def register(subparsers: Any) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "simulate",
        help="replay a trace against a plan on a virtual clock",
        description="Replays a trace against the Models and the Router of PLAN on a virtual clock, "
        "with the policies that the services use. Needs a performance profile of each tier, as "
        "`tandem profile` writes it.",
    )
    parser.add_argument("plan", nargs="+", help="files or folders with YAML, then the trace: a "
                        "file, or poisson:RATE,SECONDS or gamma:RATE,SECONDS,SHAPE")  # fmt: skip
    parser.add_argument("--profile", action="append", default=[], metavar="TIER=FILE",
                        help="performance profile of a tier's workers; once per tier")  # fmt: skip
    parser.add_argument("--outcomes", type=Path, metavar="FILE",
                        help="graded rows as for `tandem train`; qualities are drawn")  # fmt: skip
    parser.add_argument("--artifact", type=Path, metavar="FILE",
                        help="predictor that scores the outcomes' prompts")  # fmt: skip
    parser.add_argument("--lengths", type=Path, metavar="TRACE",
                        help="for generated arrivals: trace whose lengths are drawn")  # fmt: skip
    parser.add_argument("--rate", type=float, default=1.0, metavar="FACTOR",
                        help="speeds the trace up by this factor")  # fmt: skip
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N requests")
    parser.add_argument("--startup", type=float, default=60.0, metavar="SECONDS",
                        help="from a new worker's start until it serves")  # fmt: skip
    parser.add_argument("--fixed", action="store_true", help="no scaling: replicas stay")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result as data")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write one page with plots")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """The command; raises CommandError with a sentence."""
    try:
        from tandem_operator.manifests import ManifestError
        from tandem_operator.simulate import report
        from tandem_operator.simulate.arrivals import TraceError
        from tandem_operator.simulate.plan_file import PlanError, simulation_plan
        from tandem_operator.simulate.profiles import ProfileError, load_profile
        from tandem_operator.simulate.simulation import Simulation
    except ModuleNotFoundError as error:
        raise CommandError(
            f"the simulator needs {error.name}: pip install 'tandem[simulate]'"
        ) from error
    for path in (arguments.json, arguments.html):
        if path is not None and not path.parent.is_dir():
            raise CommandError(f"cannot write {path}: its folder does not exist; create it first")
    if len(arguments.plan) < 2:
        raise CommandError("give the plan's YAML and then the trace (or poisson:RATE,SECONDS)")
    *files, trace = arguments.plan
    try:
        resources = _resources(files)
        profiles = {tier: load_profile(Path(file)) for tier, file in _pairs(arguments.profile)}
        plan = simulation_plan(
            resources,
            profiles,
            seed=arguments.seed,
            startup_s=arguments.startup,
            scaling=not arguments.fixed,
        )
        simulation = Simulation(plan, _arrivals(trace, arguments))
        result = simulation.run(_progress if sys.stderr.isatty() else None)
    except (ManifestError, PlanError, ProfileError, TraceError) as error:
        raise CommandError(str(error)) from error
    if sys.stderr.isatty():
        sys.stderr.write("\r\x1b[K")
    print(report.table(result))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    if arguments.html is not None:
        title = f"Simulated: {resources.router.metadata.name} under {trace}"
        arguments.html.write_text(report.page(result, title))
    return 0


def _resources(files: list[str]) -> Any:
    from tandem_operator.manifests import load_paths
    from tandem_operator.reconcile.decode import parse
    from tandem_operator.resources import AutoscalingPolicy, Model, Router
    from tandem_operator.simulate.plan_file import PlanError, resources_of

    found = []
    for manifest in load_paths(files):
        one = parse(manifest.obj)
        if isinstance(one, Model | Router | AutoscalingPolicy):
            found.append(one)
        elif manifest.kind in ("Model", "Router", "AutoscalingPolicy"):
            raise PlanError(f"{manifest.kind} {manifest.name}: {getattr(one, 'message', one)}")
    return resources_of(found)


def _progress(virtual_s: float, served: int) -> None:
    sys.stderr.write(f"\rsimulated {virtual_s / 60.0:.0f} min, {served} requests served\x1b[K")
    sys.stderr.flush()


def _pairs(texts: list[str]) -> list[tuple[str, str]]:
    pairs = []
    for text in texts:
        tier, equals, file = text.partition("=")
        if not (tier and equals and file):
            raise CommandError(f"--profile {text!r}: write TIER=FILE")
        pairs.append((tier, file))
    return pairs


def _arrivals(trace: str, arguments: argparse.Namespace) -> Iterator[Any]:
    from tandem_operator.simulate.arrivals import generate, read_outcomes, read_trace, with_outcomes

    kind, colon, numbers = trace.partition(":")
    if kind in ("poisson", "gamma") and colon:
        rate, seconds, shape = _numbers(trace, numbers, kind)
        lengths: dict[str, Any] = {}
        if arguments.lengths is not None:
            known = list(itertools.islice(read_trace(arguments.lengths), 200_000))
            lengths = {
                "prompt_tokens": [a.prompt_tokens for a in known],
                "output_tokens": [a.output_of("") for a in known],
            }
        arrivals = generate(rate, seconds, arguments.seed, shape=shape, **lengths)
    else:
        arrivals = read_trace(Path(trace))
    if arguments.rate <= 0.0:
        raise CommandError(f"--rate {arguments.rate} must be above 0")
    if arguments.rate != 1.0:
        arrivals = (replace(a, at_s=a.at_s / arguments.rate) for a in arrivals)
    if arguments.limit is not None:
        arrivals = itertools.islice(arrivals, arguments.limit)
    if arguments.outcomes is not None:
        rows = read_outcomes(arguments.outcomes, _predictor(arguments.artifact))
        arrivals = with_outcomes(arrivals, rows, arguments.seed)
    elif arguments.artifact is not None:
        raise CommandError("--artifact scores the prompts of --outcomes; name both")
    return arrivals


def _numbers(trace: str, text: str, kind: str) -> tuple[float, float, float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    wanted = 2 if kind == "poisson" else 3
    if len(numbers) != wanted:
        form = "RATE,SECONDS" if kind == "poisson" else "RATE,SECONDS,SHAPE"
        raise CommandError(f"{trace!r}: write {kind}:{form}, such as {kind}:10,600"
                           + (",0.5" if wanted == 3 else ""))  # fmt: skip
    return numbers[0], numbers[1], numbers[2] if wanted == 3 else 1.0


def _predictor(artifact: Path | None) -> Any:
    if artifact is None:
        return None
    from tandem_router.predictor.runtime import load

    predictor = load(artifact)

    def predict(prompt: str) -> Mapping[str, float]:
        return dict(predictor.score(prompt).quality)

    return predict
