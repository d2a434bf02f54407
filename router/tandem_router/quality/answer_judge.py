"""The external judge as a view of the cascade's verifier: asked of an answer before it is sent.

It is asked only where its word can change what is done, within the time that the latency SLO
leaves and at most half of the day's money for learning, and never of tenants who opt out. One that
is down, slow, garbled or dear leaves the decision to the other views; each time is counted.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from tandem_router.config import RouterConfig
from tandem_router.limits.ledger import Ledger
from tandem_router.predictor.cascade.opinions import Opinions
from tandem_router.predictor.cascade.verifier import Verdict
from tandem_router.quality.daily_cap import DailyCap
from tandem_router.quality.judge import Judge, JudgeFailed, Opinion, Post
from tandem_router.quality.learner import LEARNING, Learner
from tandem_router.store.records import Spend
from tandem_router.telemetry.metrics import Metrics

logger = logging.getLogger("tandem.router")

#: Under whose name the store keeps what this costs.
READING = "(judge of answers)"
#: Of learning's daily money; labels have the rest.
SHARE_OF_DAY = 0.5
#: Answers that wait for a word at once; further ones go without.
MOST_AT_ONCE = 32


@dataclass(frozen=True, slots=True)
class Asked:
    """An answer whose verdict is to be weighed with the judge's word.

    left_s: what the SLO and the request's deadline leave. changes: whether a verdict would have
    something else done than is to be done now.
    """

    request_id: str
    tier: str
    question: str
    answer: str
    may_be_shown: bool  # to who is no part of answering: the tenant does not opt out
    left_s: float
    changes: Callable[[Verdict], bool]


@dataclass(frozen=True, slots=True)
class Word:
    """What came of asking: a word on the answer, or why there is none."""

    outcome: str  # good, bad, or why neither
    verdict: Verdict
    cost_usd: float = 0.0


class AnswerJudge:
    """Of one router. opinions: what the judge said before, and what was found out of it."""

    def __init__(
        self,
        config: RouterConfig,
        learner: Learner,
        opinions: Opinions,
        ledger: Ledger,
        metrics: Metrics,
        post: Post,
        clock: Callable[[], float],
    ) -> None:
        self._learner = learner
        self._opinions = opinions
        self._ledger = ledger
        self._metrics = metrics
        self._post = post
        self._clock = clock
        self._num_waiting = 0
        self._poor_day = ""
        self._cap = DailyCap(0.0)
        self.judge: Judge | None = None
        self.outcomes: Counter[str] = Counter()
        self.reconfigure(config)

    def reconfigure(self, config: RouterConfig) -> None:
        cascade, judge = config.cascade, config.learning.judge
        self._num_routers, self._poor_day = config.replicas, ""
        self._cap.daily_usd = SHARE_OF_DAY * config.learning.daily_usd / config.replicas
        if cascade is None or cascade.judge_timeout_s is None or judge is None:
            self.judge = None
            return
        # A judge of its own: one too slow here may be quick enough for labels.
        judge = judge.model_copy(update={"timeout_s": cascade.judge_timeout_s})
        if self.judge is None or self.judge.config != judge:
            self.judge = Judge(judge, self._post, self._clock)

    def restore(self, spend: Iterable[Spend]) -> None:
        """What earlier processes spent counts against today's money."""
        for row in spend:
            if row.tenant == LEARNING and row.tier == READING:
                self._cap.restore(row.day, row.cost_usd / self._num_routers)

    async def weigh(self, verdict: Verdict, asked: Asked) -> Word:
        """The verdict together with the judge's word, where that can be had."""
        try:
            word = await self._weigh(verdict, asked)
        except Exception:
            logger.exception("the judge of request %s failed inside the router", asked.request_id)
            word = Word("failed", verdict)
        self.outcomes[word.outcome] += 1
        self._metrics.cascade_judge[(word.outcome,)].inc()
        return word

    async def _weigh(self, verdict: Verdict, asked: Asked) -> Word:
        judge, opinions = self.judge, self._opinions
        why = self._why_not(verdict, asked)
        if judge is None or why is not None:
            return Word(why or "away", verdict)
        most_usd = judge.most_usd_of_one(asked.question, asked.answer)
        day = self._learner.day()
        if not self._hold(day, most_usd):
            self._poor_day = day
            return Word("no_money", verdict)
        usd = most_usd  # of a question whose client left
        self._num_waiting += 1
        found: Opinion | None = None
        try:
            found = await judge.opinion(asked.question, asked.answer, asked.left_s)
            usd = found.cost_usd
        except JudgeFailed as error:
            usd = error.cost_usd
        finally:
            self._num_waiting -= 1
            self._settle(day, most_usd, usd)
        if found is None:
            return Word("no_verdict", verdict, usd)
        opinions.said(asked.request_id, asked.tier, found.good)
        return Word("good" if found.good else "bad", opinions.weigh(verdict, found.good), usd)

    def _why_not(self, verdict: Verdict, asked: Asked) -> str | None:
        """Why nobody is asked; None where the judge is."""
        judge, weigh = self.judge, self._opinions.weigh
        if judge is None or judge.paused():
            return "away"
        if not asked.may_be_shown:
            return "opted_out"
        if not any(asked.changes(weigh(verdict, good)) for good in (True, False)):
            return "needless"
        if asked.left_s <= 0.0:
            return "no_time"
        return "busy" if self._num_waiting >= MOST_AT_ONCE else None

    def _hold(self, day: str, usd: float) -> bool:
        if not self._cap.hold(day, usd):
            return False
        if not self._learner.cap.hold(day, usd):
            self._cap.settle(day, usd, 0.0)
            return False
        if not self._ledger.hold_aside(usd):
            self._cap.settle(day, usd, 0.0)
            self._learner.cap.settle(day, usd, 0.0)
            return False
        return True

    def _settle(self, day: str, held: float, usd: float) -> None:
        self._cap.settle(day, held, usd)
        self._learner.cap.settle(day, held, usd)
        self._ledger.settle_aside(held, usd)
        self._learner.book(day, READING, usd)

    def report(self) -> dict[str, Any] | None:
        """For people: what was said, what it cost, and why nothing is said; None: nobody asks."""
        if self.judge is None:
            return None
        health, opinions, day = self.judge.health, self._opinions, self._learner.day()
        problem = ""
        if health.error is not None:
            problem = f"the judge gives no verdicts, the other views decide: {health.error}"
        elif self._poor_day == day:
            problem = (
                "the judge could not be paid today, the other views decide: it has half of "
                "learning.daily_usd, and what the budget has left"
            )
        return {
            "problem": problem,
            "outcomes": dict(self.outcomes),
            "spent_today_usd": self._cap.spent(day),
            "daily_usd": self._cap.daily_usd,
            "num_checked": opinions.num_known,
            "checked": opinions.checked,
            "paused": self.judge.paused(),
            "num_failed": health.num_failed,
            "num_garbled": health.num_garbled,
        }
