"""`tandem grade`: from a file of prompts and two endpoints to graded rows and a verdict."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx

from tandem_router.grading import endpoints, prompts, rows, so_far, summary
from tandem_router.grading.asking import Asker
from tandem_router.grading.endpoints import Endpoint
from tandem_router.grading.errors import GradingError
from tandem_router.grading.graders.command import Command, NoGrade
from tandem_router.grading.journal import Journal
from tandem_router.grading.progress import Progress
from tandem_router.grading.prompts import Question
from tandem_router.grading.runner import Outcome, Run, Settings
from tandem_router.grading.spend import Spend


def grade(arguments: argparse.Namespace) -> int:
    """Runs the command; the exit status: 0 done, 1 nothing graded or a tier lost, 130 stopped."""
    tiers = choose_tiers(arguments)
    judge = _judge(arguments)
    command = _command(arguments)
    if judge is not None and command is not None:
        raise GradingError("--judge and --grade-command both grade; name one of them")
    _check_money(arguments, tiers, judge)
    questions = prompts.read(
        arguments.prompts, reference=arguments.reference, limit=arguments.limit
    )
    for place, reason in questions.rejected:
        say(f"left out {place}: {reason}")
    judged = _judged(questions.items, arguments.judge_check) if judge else frozenset()
    if judge is None and command is None and not _has_reference(questions.items):
        raise questions.no_reference()
    kind = None if arguments.grader == "auto" else arguments.grader
    if command is None:
        rows.check_references(questions.items, kind)
    output = Path(arguments.output)
    path = output.with_name(output.name + ".journal")
    _check_output(output, path)
    head = {
        "tiers": [tier.fingerprint() for tier in tiers],
        "max_tokens": arguments.max_tokens,
        "temperature": arguments.temperature,
    }
    if arguments.token_statistics:
        head["token_statistics"] = True
    with Journal(path, head) as journal:
        if len(journal):
            say(f"going on with the {len(journal):,} answers and verdicts of {path}")
        spend = Spend(arguments.max_usd)
        progress = Progress(len(questions.items), lambda: spend.total_usd)
        settings = Settings(arguments.samples, arguments.max_tokens, arguments.concurrency)
        outcome = _ask(
            arguments, questions.items, tiers, judge, judged, settings, journal, spend, progress
        )
        progress.close()
        by_command = None
        if command is not None:
            by_command, reasons = _run_command(command, questions.items, tiers, journal, settings)
            for reason, count in reasons.items():
                say(f"--grade-command gave no grade for {count:,} answers: {reason}")
        graded = rows.Grader(
            [tier.name for tier in tiers],
            arguments.samples,
            journal,
            kind,
            by_command,
            judged,
            judge.identity() if judge else "",
        ).grade(questions.items)
    pairs: list[so_far.PairSoFar] = []
    if graded.rows:
        rows.write(output, graded.rows)
        if outcome.stopped != "interrupted" and len(tiers) > 1:
            pairs = so_far.verdicts(output, say)
    found = summary.summarise(
        tiers,
        graded,
        outcome,
        spend,
        num_questions=len(questions.items),
        samples=arguments.samples,
        judged=judge is not None,
        pairs=pairs,
    )
    report(found, summary.lines(found, str(output)), arguments.json)
    if outcome.stopped == "interrupted":
        return 130
    return 0 if graded.rows and not outcome.given_up else 1


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def report(found: dict[str, Any], lines: Iterable[str], as_json: bool) -> None:
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        print("\n".join(lines))


def choose_tiers(arguments: argparse.Namespace) -> list[Endpoint]:
    """The tiers of --router and --tier with their prices and keys. Raises GradingError."""
    named = [endpoints.parse_tier(text) for text in arguments.tier]
    tiers = [*(_of_router(arguments) if arguments.router else []), *named]
    endpoints.check(tiers)
    names = [tier.name for tier in tiers]
    if "judge" in names:
        raise GradingError("a tier cannot be called judge; that is the judge's name")
    tiers = endpoints.with_prices(tiers, endpoints.named(arguments.price, "--price", names))
    keys = endpoints.named(arguments.key, "--key", names)
    return [endpoints.with_key(tier, keys.get(tier.name)) for tier in tiers]


def _of_router(arguments: argparse.Namespace) -> list[Endpoint]:
    given = arguments.router
    if "://" not in given:
        return endpoints.of_file(Path(given), endpoints.base_url(arguments.url, "--url"))
    url = endpoints.base_url(given, "--router")
    tiers = endpoints.of_state(url, router_state(url, "--router"))
    if not tiers:
        raise GradingError(f"the Router at {url} names no tiers; name them with --tier")
    return tiers


def router_state(url: str, option: str) -> dict[str, Any]:
    """What a running Router says of itself. Raises GradingError."""
    address = url.removesuffix("/v1") + "/admin/state"
    token = os.environ.get("TANDEM_PEER_TOKEN")
    try:
        headers = {"authorization": f"Bearer {token}"} if token else {}
        response = httpx.get(address, timeout=10.0, headers=headers)
        state = response.json() if response.status_code == 200 else None
    except httpx.HTTPError as error:
        why = str(error) or type(error).__name__
        raise GradingError(f"{option}: no Router answers at {url}: {why}") from error
    except ValueError:
        state = None
    if response.status_code == 401:
        raise GradingError(
            f"{option}: {address} needs the peer token, because tenants exist; put it into "
            "TANDEM_PEER_TOKEN (a tenant's key belongs into TANDEM_API_KEY)"
        )
    if not isinstance(state, dict):
        raise GradingError(
            f"{option}: {address} answered {response.status_code}, not a Router's state; is {url} "
            "a Router? Other endpoints are named with --tier NAME=URL#MODEL"
        )
    return state


def _judge(arguments: argparse.Namespace) -> Endpoint | None:
    if arguments.judge is None:
        for option in ("judge_key", "judge_price"):
            if getattr(arguments, option) is not None:
                name = option.replace("_", "-")
                raise GradingError(f"--{name} speaks of a judge; name it with --judge URL#MODEL")
        return None
    judge = endpoints.parse_judge(arguments.judge)
    if arguments.judge_price is not None:
        given, made = endpoints.parse_price(arguments.judge_price, "--judge-price")
        judge = replace(judge, usd_per_1m_input=given, usd_per_1m_output=made)
    return endpoints.with_key(judge, arguments.judge_key)


def _command(arguments: argparse.Namespace) -> Command | None:
    if arguments.grade_command is None:
        return None
    return Command.parse(
        arguments.grade_command,
        arguments.command_timeout,
        arguments.command_memory * 1024 * 1024,
    )


def _check_money(
    arguments: argparse.Namespace, tiers: Sequence[Endpoint], judge: Endpoint | None
) -> None:
    """A limit that could not be held is refused: of a Router alone the costs come with answers."""
    if arguments.max_usd is None:
        return
    for each in (*tiers, *([judge] if judge else [])):
        if each.list_price() is None and not each.router:
            option = "--judge-price" if each is judge else f"--price {each.name}="
            raise GradingError(
                f"--max-usd {arguments.max_usd:g} cannot be held, {each.name} has no price; give "
                f"{option}{' ' if each is judge else ''}IN/OUT in dollars per million tokens"
            )


def _has_reference(questions: Sequence[Question]) -> bool:
    return any(question.reference is not None for question in questions)


def _judged(questions: Sequence[Question], check: int) -> frozenset[str]:
    """Whom the judge is asked about: rows without a reference, and some with, to measure it."""
    with_reference = [q.key for q in questions if q.reference is not None]
    without = [q.key for q in questions if q.reference is None]
    return frozenset([*without, *with_reference[:check]])


def _check_output(output: Path, journal: Path) -> None:
    if output.is_dir():
        raise GradingError(f"-o {output} is a directory; name a file in it")
    if not output.parent.is_dir():
        raise GradingError(f"-o {output}: there is no folder {output.parent}; make it first")
    if output.exists() and not journal.exists():
        raise GradingError(
            f"-o {output} exists and {journal.name}, which a run leaves beside it, does not; it "
            "would be overwritten: name another file or move it away"
        )


def _ask(
    arguments: argparse.Namespace,
    questions: Sequence[Question],
    tiers: Sequence[Endpoint],
    judge: Endpoint | None,
    judged: frozenset[str],
    settings: Settings,
    journal: Journal,
    spend: Spend,
    progress: Progress,
) -> Outcome:
    """Asks what is missing; the first Ctrl-C finishes what is under way, the second drops it."""

    async def main() -> Outcome:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(limits=limits, timeout=None) as client:
            asker = Asker(
                client,
                max_tokens=arguments.max_tokens,
                temperature=arguments.temperature,
                timeout_s=arguments.timeout,
                stopping=lambda: run.stopping,
                token_statistics=arguments.token_statistics,
            )
            run = Run(
                questions,
                tiers,
                settings,
                asker,
                journal,
                spend,
                judge=judge,
                judged=judged,
                progress=progress,
            )
            task = asyncio.ensure_future(run.run())

            def interrupt() -> None:
                if run.stopping:
                    task.cancel()
                    return
                run.stop("interrupted")
                progress.say("finishing the questions under way; Ctrl-C again drops them")

            loop = asyncio.get_running_loop()
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, interrupt)
            try:
                return await task
            except asyncio.CancelledError:
                return run.outcome
            finally:
                for number in (signal.SIGINT, signal.SIGTERM):
                    loop.remove_signal_handler(number)

    return asyncio.run(main())


def _run_command(
    command: Command,
    questions: Sequence[Question],
    tiers: Sequence[Endpoint],
    journal: Journal,
    settings: Settings,
) -> tuple[dict[tuple[str, str, int], float | str], dict[str, int]]:
    """The command's grade of every answer there is, and how often it gave none, by reason."""
    work = [
        (question, tier.name, sample, entry)
        for question in questions
        for tier in tiers
        for sample in range(settings.samples)
        if (entry := journal.get((question.key, tier.name, sample, 0))) is not None
    ]

    def one(item: tuple[Question, str, int, dict[str, Any]]) -> float | str:
        question, tier, _, entry = item
        variables = {"TANDEM_PROMPT": question.text(), "TANDEM_TIER": tier}
        for name in ("reference", "task", "id"):
            if getattr(question, name) is not None:
                variables[f"TANDEM_{name.upper()}"] = getattr(question, name)
        try:
            return command.grade(entry["text"], variables)
        except NoGrade as error:
            return str(error)

    found: dict[tuple[str, str, int], float | str] = {}
    reasons: dict[str, int] = {}
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for (question, tier, sample, _), given in zip(work, pool.map(one, work), strict=True):
            found[question.key, tier, sample] = given
            if isinstance(given, str):
                reasons[given] = reasons.get(given, 0) + 1
    return found, reasons
