"""Who is asked what, and when to stop: bounded concurrency, money held before, nothing twice.

One question at a time is one unit: all its missing answers are asked together, then the judge, so
that whatever ends the run leaves whole rows behind. A tier that fails again and again is left
alone; the others go on, and its answers are missing until the command is run again.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from tandem_router.grading.asking import Answer, Asker
from tandem_router.grading.endpoints import Endpoint
from tandem_router.grading.errors import AskFailed
from tandem_router.grading.graders import judge as judging
from tandem_router.grading.journal import Journal, verdict_key
from tandem_router.grading.prompts import Question
from tandem_router.grading.spend import Spend

#: Failures in a row after which a tier is left alone: with nothing between that it answered.
GIVE_UP_AFTER = 5
#: The same for refusals of single requests, which odd prompts can cause by themselves.
GIVE_UP_AFTER_REFUSALS = 20
#: A prompt has at most about so many tokens a byte; only for money held in advance.
TOKENS_PER_BYTE = 0.5
#: Length of an answer that money is held for where the tier's own limit ends it.
ASSUMED_TOKENS = 1024
ORDERS = (0, 1)
#: A judge that garbles is asked once more.
JUDGE_TRIES = 2


@dataclass(frozen=True, slots=True)
class Settings:
    """What a run asks of every tier, and how many questions at a time."""

    samples: int = 1
    max_tokens: int | None = None
    concurrency: int = 8


@dataclass(slots=True)
class Outcome:
    """How a run ended: failures per name, who was left alone and why, and what stopped it."""

    failures: Counter[str] = field(default_factory=Counter)
    last_failure: dict[str, str] = field(default_factory=dict)
    given_up: dict[str, str] = field(default_factory=dict)
    stopped: str = ""
    num_asked: int = 0


class Run:
    """One run over the questions; `progress` hears of every question that is done."""

    def __init__(
        self,
        questions: Sequence[Question],
        tiers: Sequence[Endpoint],
        settings: Settings,
        asker: Asker,
        journal: Journal,
        spend: Spend,
        *,
        judge: Endpoint | None = None,
        judged: frozenset[str] = frozenset(),
        progress: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._questions = questions
        self._tiers = tiers
        self._settings = settings
        self._asker = asker
        self._journal = journal
        self._spend = spend
        self._judge = judge
        self._judged = judged
        self._progress = progress
        self._row_of_failures: Counter[str] = Counter()
        self._done = 0
        self._first: dict[str, asyncio.Lock] = {}
        self.outcome = Outcome()
        for (_, who, _, _), entry in journal.entries().items():
            spend.book(_payer(who), entry.get("cost_usd"))

    def stop(self, why: str) -> None:
        """Begin nothing more; what is under way is finished, since it is paid for."""
        self.outcome.stopped = self.outcome.stopped or why

    @property
    def stopping(self) -> bool:
        return bool(self.outcome.stopped)

    async def run(self) -> Outcome:
        """Asks what is missing. Raises GradingError where the journal cannot be written."""
        waiting = iter(self._questions)
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self._settings.concurrency, len(self._questions))):
                    group.create_task(self._work(waiting))
        except ExceptionGroup as group_error:
            raise group_error.exceptions[0] from None
        return self.outcome

    async def _work(self, waiting: Iterator[Question]) -> None:
        for question in waiting:
            if self.stopping:
                return
            held = self._bound(question)
            if not self._spend.hold(held):
                self.stop("max_usd")
                return
            try:
                await self._complete(question)
            finally:
                self._spend.release(held)
            self._done += 1
            self._progress(self._done)

    def _missing(self, question: Question) -> list[tuple[Endpoint, int]]:
        return [
            (tier, sample)
            for tier in self._tiers
            if tier.name not in self.outcome.given_up
            for sample in range(self._settings.samples)
            if self._journal.get((question.key, tier.name, sample, 0)) is None
        ]

    async def _complete(self, question: Question) -> None:
        await asyncio.gather(
            *(self._answer(question, tier, sample) for tier, sample in self._missing(question))
        )
        judge = self._judge
        if judge is None or question.key not in self._judged:
            return
        await asyncio.gather(
            *(
                self._verdict(judge, question, tier.name, sample, order)
                for tier in self._tiers[:-1]
                for sample in range(self._settings.samples)
                for order in ORDERS
            )
        )

    async def _answer(self, question: Question, tier: Endpoint, sample: int) -> None:
        # A cached reply would cost nothing and hide what the tier costs.
        headers = {"cache-control": "no-cache"} if tier.router else None
        answer = await self._ask(tier, question.messages, headers)
        if answer is not None:
            self._journal.put((question.key, tier.name, sample, 0), answer.record())

    async def _ask(
        self,
        endpoint: Endpoint,
        messages: Sequence[Mapping[str, Any]],
        headers: dict[str, str] | None = None,
    ) -> Answer | None:
        """The answer, booked; None where it failed, counted."""
        name = endpoint.name
        if name in self.outcome.given_up:
            return None
        # Until it is known what an answer costs, one is asked at a time: money cannot be held.
        unpriced = endpoint.list_price() is None and not self._spend.dearest[name]
        alone: AbstractAsyncContextManager[object] = nullcontext()
        if unpriced and self._spend.limited:
            alone = self._first.setdefault(name, asyncio.Lock())
        try:
            async with alone:
                answer, _ = await self._asker.ask(endpoint, messages, headers=headers)
                self._spend.book(name, answer.cost_usd)
        except AskFailed as error:
            self._failed(name, error)
            return None
        self.outcome.num_asked += 1
        self._row_of_failures[name] = 0
        return answer

    def _failed(self, name: str, error: AskFailed) -> None:
        if self.stopping:
            return  # not asked to the end, because the run was stopped
        outcome = self.outcome
        outcome.failures[name] += 1
        outcome.last_failure[name] = str(error)
        self._row_of_failures[name] += 1
        limit = GIVE_UP_AFTER_REFUSALS if error.blames_request else GIVE_UP_AFTER
        if error.blames_tier or self._row_of_failures[name] >= limit:
            outcome.given_up.setdefault(name, str(error))
            if all(tier.name in outcome.given_up for tier in self._tiers):
                self.stop("no tier is left")

    async def _verdict(
        self, judge: Endpoint, question: Question, tier: str, sample: int, order: int
    ) -> None:
        key = verdict_key(question.key, judge.identity(), tier, sample, order)
        answers = [
            self._journal.get((question.key, name, sample, 0))
            for name in (tier, self._tiers[-1].name)
        ]
        if self._journal.get(key) is not None or None in answers:
            return
        first, second = (str(answer["text"]) for answer in answers if answer is not None)
        if first.strip() == second.strip():
            return  # the same answer is a tie, whoever judges
        shown = (first, second) if order == 0 else (second, first)
        cost = 0.0
        verdict = None
        for _ in range(JUDGE_TRIES):
            reply = await self._ask(judge, judging.messages(question.text(), *shown))
            if reply is None:
                return
            cost += reply.cost_usd or 0.0
            verdict = judging.parse(reply.text)
            if verdict is not None:
                break
        if verdict is not None and order == 1:
            verdict = judging.turned(verdict)
        self._journal.put(key, {"verdict": verdict, "cost_usd": cost})

    def _bound(self, question: Question) -> float:
        """Dollars that the missing answers and verdicts of a question may cost at most."""
        size = sum(len(str(message.get("content")).encode()) for message in question.messages)
        bound = sum(self._at_most(tier, size) for tier, _ in self._missing(question))
        if self._judge is not None and question.key in self._judged:
            open_verdicts = sum(
                self._journal.get(
                    verdict_key(question.key, self._judge.identity(), tier.name, sample, order)
                )
                is None
                for tier in self._tiers[:-1]
                for sample in range(self._settings.samples)
                for order in ORDERS
            )
            shown = size + 8 * (self._settings.max_tokens or ASSUMED_TOKENS) + 2000
            bound += JUDGE_TRIES * open_verdicts * self._at_most(self._judge, shown)
        return bound

    def _at_most(self, endpoint: Endpoint, prompt_bytes: int) -> float:
        limit = self._settings.max_tokens
        listed = endpoint.cost_usd(TOKENS_PER_BYTE * prompt_bytes + 50, limit or ASSUMED_TOKENS)
        seen = 2.0 * self._spend.dearest[endpoint.name]
        if listed is None:
            return seen
        return listed if limit is not None else max(listed, seen)


def _payer(who: str) -> str:
    """Verdicts are paid to the judge, whichever tier they are about."""
    return "judge" if who.startswith("judge ") else who
