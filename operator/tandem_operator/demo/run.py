"""`tandem demo`: start the pair, route test questions, and show what routing saved.

Everything shown is measured in the run: each question goes to both tiers and to the router.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

from tandem_operator.cli.commands import port_number
from tandem_operator.cli.errors import CommandError
from tandem_operator.cli.up import show_changes
from tandem_operator.local.cluster import ClusterError, LocalCluster
from tandem_operator.local.control_socket import ControlServer
from tandem_operator.local.port_forward import PortInUseError
from tandem_operator.local.state_dir import RunDir, RunDirError
from tandem_operator.manifests import Manifest, ManifestError, load_paths

from . import report
from .client import Answer, AskError, ask, ask_all
from .strategies import Measured, Outcome, Summary, summarize
from .suite import Question, generate

EXAMPLE = Path("examples") / "01-hybrid"
MINIMUM_QUESTIONS = 60
MINIMUM_HELD_OUT = 500


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the `demo` subcommand."""
    parser = subparsers.add_parser(
        "demo",
        help="start a small and a large model, route test questions, show what was saved",
        description=__doc__,
    )
    parser.add_argument(
        "--once", action="store_true", help="end after the summary instead of serving on"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the same as data")
    parser.add_argument(
        "--questions",
        type=int,
        default=64,
        metavar="N",
        help=f"questions shown one by one (default 64, at least {MINIMUM_QUESTIONS})",
    )
    parser.add_argument(
        "--held-out",
        type=int,
        default=MINIMUM_HELD_OUT,
        metavar="N",
        help=f"test questions behind the summary (default and least {MINIMUM_HELD_OUT})",
    )
    parser.add_argument(
        "--port",
        type=port_number,
        metavar="N",
        help="port of the endpoint (default: 8000 or next free)",
    )
    parser.add_argument(
        "--seed", type=int, default=7, metavar="N", help="seed of the test questions (default 7)"
    )
    parser.add_argument(
        "--timeout", type=float, default=180.0, metavar="S", help="seconds to wait until ready"
    )
    parser.add_argument(
        "--example", type=Path, metavar="DIR", help="folder of YAML to run (default: 01-hybrid)"
    )
    parser.set_defaults(run=demo)


def demo(args: argparse.Namespace) -> int:
    """Run the demo; the exit status."""
    if args.questions < MINIMUM_QUESTIONS:
        raise CommandError(
            f"--questions {args.questions} is too few; ask for {MINIMUM_QUESTIONS} or more"
        )
    if args.held_out < MINIMUM_HELD_OUT:
        raise CommandError(
            f"--held-out {args.held_out} is too few to tell one point of quality; "
            f"ask for {MINIMUM_HELD_OUT} or more"
        )
    if args.json is not None and not args.json.resolve().parent.is_dir():
        raise CommandError(f"--json {args.json}: its folder does not exist; create it first")
    folder = args.example or find_example()
    try:
        manifests = load_paths([str(folder)])
        rundir = RunDir("demo", exact=False)
    except ManifestError as error:
        raise CommandError(f"the YAML of the demo cannot be used\n{error}") from error
    except RunDirError as error:
        raise CommandError(str(error)) from error
    try:
        return asyncio.run(_run(args, manifests, rundir))
    except (PortInUseError, ClusterError, RunDirError) as error:
        raise CommandError(str(error)) from error
    except AskError as error:
        raise CommandError(f"a question failed: {error}; see `tandem logs`") from error


def find_example() -> Path:
    """The example's folder in the checkout that this package or the caller stands in.

    Raises:
        CommandError: there is no checkout around.
    """
    for root in (Path.cwd(), *Path(__file__).resolve().parents):
        if (root / EXAMPLE).is_dir():
            return root / EXAMPLE
    raise CommandError(
        f"{EXAMPLE} was not found; run this in a checkout, or name a folder: --example DIR"
    )


async def _run(args: argparse.Namespace, manifests: list[Manifest], rundir: RunDir) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop.set)
    cluster = LocalCluster(rundir, port=args.port or 8000, exact_port=args.port is not None)
    cluster.on_problem = lambda text: print(text, file=sys.stderr)
    async with cluster:
        server = ControlServer(cluster, rundir.socket)
        await server.start()
        try:
            work = asyncio.create_task(_work(args, cluster, manifests))
            stopped = asyncio.create_task(stop.wait())
            await asyncio.wait({work, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                _say("\nstopping")
                work.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await work
                return 130
            work.result()
            if not args.once:
                await stop.wait()
                _say("\nstopping")
            stopped.cancel()
            return 0
        finally:
            await server.close()


async def _work(args: argparse.Namespace, cluster: LocalCluster, manifests: list[Manifest]) -> None:
    began = time.monotonic()
    (router,) = [m.obj["metadata"]["name"] for m in manifests if m.obj["kind"] == "Router"]
    _say("starting the small tier (unified), the large tier (prefill + decode) and the router\n")
    shower = asyncio.create_task(show_changes(cluster))
    try:
        await cluster.apply_manifests(manifests)
        await cluster.wait_ready(args.timeout)
    except TimeoutError as error:
        raise ClusterError(f"{error}; `tandem logs NAME` of a second run shows why") from error
    finally:
        shower.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await shower
    url = cluster.url(router)
    _say(f"\nready after {time.monotonic() - began:.1f} s at {url}/v1\n")

    questions = generate("test", args.seed, args.held_out)
    limits = httpx.Limits(max_connections=64)
    timeout = httpx.Timeout(60.0, read=120.0)
    async with httpx.AsyncClient(
        base_url=url, limits=limits, timeout=timeout, trust_env=False
    ) as client:
        shown = await _show_questions(client, router, questions[: args.questions])
        tiers = [t["name"] for m in manifests if m.obj["kind"] == "Router" for t in _tiers(m)]
        small, large = tiers[0], tiers[-1]
        answers = {
            model: await _ask_quietly(client, model, label, questions)
            for model, label in (
                (small, "small answers all"),
                (large, "large answers all"),
                (router, "tandem routes all"),
            )
        }
    measured = compared(answers[small], answers[large], answers[router], large)
    summaries = summarize(measured)
    held_out = held_out_result(summaries)
    drop = held_out["quality_drop"]
    _say(
        f"\n{len(measured)} held-out test questions, each answered by both tiers and routed once:\n"
    )
    _say(report.strategy_table(summaries))
    _say(
        f"\nrouted: {held_out['large_call_reduction']:.1%} fewer large calls, "
        f"{100 * abs(drop):.1f} points of quality {'lost' if drop >= 0 else 'won'} "
        "against all-large"
    )
    if args.json is not None:
        data = {
            "endpoint": f"{url}/v1",
            "questions": [report.as_json(answer) for answer in shown],
            "summary": [summary.as_dict() for summary in summaries],
            "held_out": held_out,
        }
        await asyncio.to_thread(args.json.write_text, json.dumps(data, indent=1) + "\n")
        _say(f"written: {args.json}")
    if not args.once:
        body = (
            f'{{"model": "{router}", "messages": [{{"role": "user", "content": "What is 7*8?"}}]}}'
        )
        _say(f"\nstill serving at {url}/v1 (Ctrl-C stops); the dashboard is {url}/")
        _say(f"  curl {url}/v1/chat/completions -H 'content-type: application/json' -d '{body}'")


def _tiers(manifest: Manifest) -> Sequence[dict[str, Any]]:
    tiers: Sequence[dict[str, Any]] = manifest.obj["spec"]["tiers"]
    return tiers


async def _show_questions(
    client: httpx.AsyncClient, router: str, questions: Sequence[Question]
) -> list[Answer]:
    """One question after another, so that TTFT is that of an idle system."""
    _say(report.header())
    answers = []
    for number, question in enumerate(questions, 1):
        answer = await ask(client, router, question)
        _say(report.answer_line(number, answer))
        answers.append(answer)
    right = sum(answer.right for answer in answers)
    _say(f"\n{right} of {len(answers)} right\n")
    return answers


async def _ask_quietly(
    client: httpx.AsyncClient, model: str, label: str, questions: Sequence[Question]
) -> list[Answer]:
    began = time.monotonic()
    with _progress(label, len(questions)) as count:
        answers = await ask_all(client, model, questions, concurrency=8, on_answer=count)
    _say(f"{label}: {len(questions)} questions in {time.monotonic() - began:.1f} s")
    return answers


@contextlib.contextmanager
def _progress(label: str, total: int) -> Iterator[Callable[[Answer], None]]:
    """A counter that overwrites itself on a terminal and stays silent elsewhere."""
    done = 0
    live = sys.stdout.isatty()

    def count(_: Answer) -> None:
        nonlocal done
        done += 1
        if live:
            sys.stdout.write(f"\r{label}: {done} of {total}")
            sys.stdout.flush()

    yield count
    if live:
        sys.stdout.write("\r\x1b[K")


def _outcome(answer: Answer) -> Outcome:
    return Outcome(answer.right, answer.cost_usd, answer.ttft_s, answer.tpot_s)


def compared(
    small: Sequence[Answer], large: Sequence[Answer], routed: Sequence[Answer], large_tier: str
) -> list[Measured]:
    """Each question's three answers beside each other."""
    return [
        Measured(
            prompt_characters=len(r.question.prompt),
            small=_outcome(s),
            large=_outcome(big),
            routed=_outcome(r),
            routed_large=r.tier == large_tier,
        )
        for s, big, r in zip(small, large, routed, strict=True)
    ]


def held_out_result(summaries: Sequence[Summary]) -> dict[str, float | int]:
    """What routing did on the held-out questions, as fractions against all-large."""
    found = {summary.strategy: summary for summary in summaries}
    routed, all_large = found["tandem"], found["all large"]
    return {
        "num_questions": routed.num_questions,
        "large_call_reduction": 1.0 - routed.large_share,
        "quality_drop": all_large.quality - routed.quality,
        "quality": routed.quality,
        "all_large_quality": all_large.quality,
        "all_small_quality": found["all small"].quality,
        "cost_saved": routed.cost_saved,
    }


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
