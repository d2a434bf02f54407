"""`tandem verify`: what a running Router delivered on graded questions, beside one tier for all."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from tandem_router.grading import endpoints, prompts, rows
from tandem_router.grading.asking import Asker
from tandem_router.grading.delivered import Asked, assess, lines
from tandem_router.grading.endpoints import Endpoint
from tandem_router.grading.errors import AskFailed, GradingError
from tandem_router.grading.grade_command import report, router_state, say
from tandem_router.grading.graders import reference as references
from tandem_router.grading.progress import Progress
from tandem_router.grading.prompts import Question
from tandem_router.predictor.records import dataset


@dataclass(slots=True)
class _Failures:
    count: int = 0
    last: str = ""


def verify(arguments: argparse.Namespace) -> int:
    """Runs the command; the exit status: 0 unless nothing was answered or the floor is broken."""
    url = endpoints.base_url(arguments.url, "--url")
    state = router_state(url, "--url")
    name = state.get("name")
    tiers = [tier.name for tier in endpoints.of_state(url, state)]
    if not isinstance(name, str) or not tiers:
        raise GradingError(f"--url {url}: its /admin/state names no Router with tiers")
    router = endpoints.with_key(Endpoint(endpoints.ROUTER, url, name, router=True), arguments.key)
    path = Path(arguments.file)
    known = {row.line: row for row in dataset.read_dataset([path]).rows}
    questions = prompts.read(arguments.file, limit=arguments.limit).items
    pairs = [(q, known[q.place]) for q in questions if q.place in known]
    graded = {tier for _, row in pairs for tier in row.quality}
    strangers = sorted(graded - set(tiers))
    if not graded & set(tiers):
        raise GradingError(
            f"{path} grades {', '.join(strangers) or 'no tier'}, the Router has "
            f"{', '.join(tiers)}; verify needs grades of its tiers"
        )
    if strangers:
        say(f"note: the Router has no tier {', '.join(strangers)}; those grades are not used")
    rows.check_references([q for q, _ in pairs], None)
    progress = Progress(len(pairs), lambda: sum(a.cost_usd or 0.0 for a in asked))
    asked: list[Asked] = []
    failures = _Failures()
    asyncio.run(_ask(arguments, router, pairs, asked, failures, progress))
    progress.close()
    if not asked:
        raise GradingError(f"the Router answered none of {len(pairs)} questions: {failures.last}")
    floor = arguments.floor if arguments.floor is not None else state.get("quality_floor")
    found = assess(asked, tiers, floor)
    found["router"] = name
    found["failures"] = failures.count
    found["last_failure"] = failures.last or None
    report(found, lines(found), arguments.json)
    return 1 if found["floor_held"] is False else 0


async def _ask(
    arguments: argparse.Namespace,
    router: Endpoint,
    pairs: Sequence[tuple[Question, dataset.Row]],
    asked: list[Asked],
    failures: _Failures,
    progress: Progress,
) -> None:
    waiting = iter(pairs)
    row_of_failures = 0
    done = 0

    async def work(asker: Asker) -> None:
        nonlocal done, row_of_failures
        for question, row in waiting:
            if row_of_failures >= 5:
                return
            try:
                answer, headers = await asker.ask(router, question.messages)
            except AskFailed as error:
                failures.count += 1
                failures.last = str(error)
                row_of_failures += 5 if error.blames_tier else 1
            else:
                row_of_failures = 0
                tier = headers.get("x-tandem-tier", "")
                asked.append(
                    Asked(row, tier, _grade(question, row, tier, answer.text), answer.cost_usd)
                )
            done += 1
            progress(done)

    async with httpx.AsyncClient(timeout=None) as client:
        asker = Asker(
            client,
            max_tokens=arguments.max_tokens,
            temperature=None,
            timeout_s=arguments.timeout,
        )
        async with asyncio.TaskGroup() as group:
            for _ in range(min(arguments.concurrency, len(pairs))):
                group.create_task(work(asker))


def _grade(question: Question, row: dataset.Row, tier: str, answer: str) -> float | None:
    """By the reference where the row has one; else the grade of the tier that answered."""
    if question.reference is not None:
        return references.grade(answer, question.reference, question.grader)
    return row.quality.get(tier)
