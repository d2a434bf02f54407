"""What `tandem simulate` and `tandem plan` are given: resources, profiles and traffic."""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from tandem_operator.cli.errors import CommandError

Read = Callable[[argparse.Namespace], tuple[Any, Any, Iterator[Any]]]


def add_traffic(parser: argparse.ArgumentParser) -> None:
    """The arguments that say what runs and what is asked of it."""
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
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what is drawn")


@contextlib.contextmanager
def inputs() -> Iterator[Read]:
    """A reader of those arguments: resources, profiles by tier, arrivals.

    What is wrong with them, while reading or later (a trace is read as it goes), is a
    CommandError.
    """
    try:
        from tandem_operator.manifests import ManifestError
        from tandem_operator.simulate.arrivals import TraceError
        from tandem_operator.simulate.plan_file import PlanError
        from tandem_operator.simulate.profiles import ProfileError, load_profile
    except ModuleNotFoundError as error:
        raise CommandError(
            f"the simulator needs {error.name}: pip install 'tandem[simulate]'"
        ) from error

    def read(arguments: argparse.Namespace) -> tuple[Any, Any, Iterator[Any]]:
        for path in (arguments.json, getattr(arguments, "html", None)):
            if path is not None and not path.parent.is_dir():
                raise CommandError(f"cannot write {path}: its folder does not exist; create it")
        if len(arguments.plan) < 2:
            raise CommandError("give the plan's YAML and then the trace (or poisson:RATE,SECONDS)")
        *files, trace = arguments.plan
        profiles = {tier: load_profile(Path(file)) for tier, file in _pairs(arguments.profile)}
        return _resources(files), profiles, _arrivals(trace, arguments)

    try:
        yield read
    except (ManifestError, PlanError, ProfileError, TraceError) as error:
        raise CommandError(str(error)) from error


def _resources(files: list[str]) -> Any:
    from tandem_operator.manifests import load_paths
    from tandem_operator.plan.decode import parse
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
        rows = read_outcomes(arguments.outcomes, scores_of(artifact_of(arguments)))
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


def scores_of(predictor: Any) -> Callable[[str], Any] | None:
    """What a router decides by: the predictor's gains, not two qualities subtracted."""
    if predictor is None:
        return None
    from tandem_router.routing.scorer import with_gains

    return lambda prompt: with_gains(predictor.score(prompt))


def artifact_of(arguments: argparse.Namespace) -> Any:
    """The predictor of `--artifact`; None without one."""
    return None if arguments.artifact is None else _loaded(arguments.artifact)


@functools.lru_cache(maxsize=1)
def _loaded(artifact: Path) -> Any:
    """It scores outcomes and stands for the router's: read once."""
    from tandem_router.predictor.runtime import load

    return load(artifact)
