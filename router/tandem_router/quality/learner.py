"""From an answered request to a label: another tier answers it too, unseen, and a judge compares.

Everything here happens after the client has its answer, in tasks of its own. Whatever goes wrong
costs a label, is counted, and is told by `state`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tandem_router.config import LearningConfig
from tandem_router.limits.ledger import Ledger
from tandem_router.quality.budget_share import BudgetShare
from tandem_router.quality.capture import captured
from tandem_router.quality.daily_cap import DailyCap
from tandem_router.quality.judge import Judge, JudgeFailed, Post
from tandem_router.quality.labels import Labels
from tandem_router.quality.shadow_gate import Draw, Explored, ShadowGate
from tandem_router.store.records import Label, LabelSource, Spend
from tandem_router.store.writer import Store
from tandem_router.telemetry.metrics import Metrics

logger = logging.getLogger("tandem.router")

#: Shadow requests under way at once; further ones are not drawn.
MOST_UNDER_WAY = 8
#: Whose spend it is in the store; no tenant can have the name.
LEARNING = "(learning)"
JUDGE = "(judge)"
#: Nothing is drawn for so long after the Router's budget could not pay.
BUDGET_PAUSE_S = 60.0


@dataclass(frozen=True, slots=True)
class Answered:
    """One answered request, as far as learning looks at it."""

    request_id: str
    tenant: str
    tier: str
    text: str  # what the predictor scored
    answer: str
    predicted: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Unseen:
    """What another tier answered. usd: at list prices."""

    text: str
    prompt_tokens: int
    output_tokens: int
    usd: float


class NoAnswer(Exception):
    """The other tier gave none; the text says why. usd: what was paid all the same."""

    def __init__(self, why: str, usd: float = 0.0) -> None:
        super().__init__(why)
        self.usd = usd


class NoMoney(NoAnswer):
    """The day's cap or the budget cannot pay what it may cost."""


@dataclass(frozen=True, slots=True)
class Shadow:
    """How to ask the other tier. most_usd: what it can cost at most; raises NoAnswer."""

    most_usd: float
    ask: Callable[[], Awaitable[Unseen]]
    source: LabelSource | None = None  # of the label; None: by who judges


@dataclass(frozen=True, slots=True)
class Lesson:
    """An answered request that was drawn, and who else answers it. dearest: the dearest tier.

    beside: how to ask the dearest one too, where neither answer is its own.
    """

    draw: Draw
    answered: Answered
    dearest: str
    shadow: Shadow
    beside: Shadow | None = None


@dataclass(slots=True)
class Counts:
    """What became of shadow requests since the start."""

    num_drawn: int = 0
    num_labelled: int = 0
    failed: Counter[str] = field(default_factory=Counter)


class Learner:
    """Shadow answers of one router. unfit: why a tier can take none now; None where it can."""

    def __init__(
        self,
        config: LearningConfig,
        num_routers: int,
        labels: Labels,
        store: Store,
        ledger: Ledger,
        metrics: Metrics,
        post: Post,
        unfit: Callable[[str], str | None],
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
        random: Callable[[], float],
    ) -> None:
        self._labels = labels
        self._store = store
        self._ledger = ledger
        self._metrics = metrics
        self._post = post
        self._unfit = unfit
        self._clock = clock
        self._wall_clock = wall_clock
        self._random = random
        self._tasks: set[asyncio.Task[None]] = set()
        self.cap = DailyCap(0.0)
        self._share = BudgetShare()
        self.gate = ShadowGate(0.0, self._closed)
        self.judge: Judge | None = None
        self.counts = Counts()
        self.config = config
        self.cost_usd = 0.0  # ever, as far as the store knows
        self._take(config, num_routers)

    def _take(self, config: LearningConfig, num_routers: int) -> None:
        self.config = config
        self._num_routers = num_routers
        self.cap.daily_usd = config.daily_usd / num_routers
        # What could not be paid would be missing from the labels, unless nothing is drawn then.
        self._poor_day, self._poor_until = "", 0.0
        self.gate.set_share(config.shadow_share)
        self.gate.look_again()
        if config.judge is None:
            self.judge = None
        elif self.judge is None or self.judge.config != config.judge:
            self.judge = Judge(config.judge, self._post, self._clock)

    def reconfigure(self, config: LearningConfig, num_routers: int) -> None:
        """Other settings from now on; what is under way ends as it began."""
        self._take(config, num_routers)

    def restore(self, spend: Iterable[Spend]) -> None:
        """What earlier processes spent: today's counts against the cap, a router's part of it."""
        for row in spend:
            if row.tenant == LEARNING:
                self.cost_usd += row.cost_usd
                self.cap.restore(row.day, row.cost_usd / self._num_routers)

    @property
    def on(self) -> bool:
        return self.config.shadow_share > 0.0 and self.judge is not None

    @property
    def compares_any(self) -> bool:
        """Whether the judge tells the better of any two answers; rules need one that is right."""
        return self.judge is not None and self.judge.external

    @property
    def _budget_per_s(self) -> float | None:
        budget = self._ledger.budget
        return None if budget is None else budget.pace_per_s

    def day(self) -> str:
        return time.strftime("%Y-%m-%d", time.gmtime(self._wall_clock()))

    def _closed(self, tier: str, exploring: bool = False) -> str | None:
        """Why no shadow request goes to a tier now."""
        if self.judge is not None and self.judge.paused():
            return "the judge is away"
        if self.cap.left(self.day()) <= 0.0 or self.day() == self._poor_day:
            return "the day's money is spent"
        if self._clock() < self._poor_until:
            return "the budget cannot pay it now"
        if self._share.is_used_up(self._clock(), self._budget_per_s, exploring):
            return "learning has had its part of the budget"
        return self._unfit(tier)

    def draw(
        self, tier: str, cheapest: str, dearest: str, explored: Explored | None = None
    ) -> Draw | None:
        """Whether a request that `tier` answered is answered by another tier too."""
        full = len(self._tasks) >= MOST_UNDER_WAY
        return self.gate.draw(
            self._clock(), self._random(), tier, cheapest, dearest, full, explored
        )

    def draw_replaced(self, tier: str) -> Draw | None:
        """Whether to judge an escalation, of which both answers are there; `tier`: of the first.

        A verdict that costs nothing is had of all of them, one of an external judge of the share.
        """
        judge = self.judge
        if judge is None or judge.paused() or self.cap.left(self.day()) <= 0.0:
            return None
        share = self.config.shadow_share if judge.external else 1.0
        if len(self._tasks) >= MOST_UNDER_WAY or not self._random() < share:
            return None
        return Draw(tier, share, share)

    def start(self, lesson: Lesson) -> None:
        """Begin to learn from it; returns at once."""
        self.counts.num_drawn += 1
        name = f"shadow {lesson.answered.request_id}"
        task = asyncio.get_running_loop().create_task(self._learn(lesson), name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _learn(self, lesson: Lesson) -> None:
        request_id = lesson.answered.request_id
        try:
            label = await self._label(lesson)
        except (NoAnswer, JudgeFailed) as error:
            what = "no money" if isinstance(error, NoMoney) else "no answer"
            if isinstance(error, JudgeFailed):
                what = "no verdict"
            self.counts.failed[what] += 1
            logger.info("shadow of request %s: %s: %s", request_id, what, error)
        except asyncio.CancelledError:
            raise
        except Exception:
            self.counts.failed["the router failed"] += 1
            logger.exception("shadow of request %s failed inside the router", request_id)
        else:
            self.counts.num_labelled += 1
            self._labels.add(label)

    async def _label(self, lesson: Lesson) -> Label:
        judge = self.judge
        if judge is None:
            raise JudgeFailed("there is none any more")
        draw, answered, dearest = lesson.draw, lesson.answered, lesson.dearest
        unseen = await self._paid(draw.tier, lesson.shadow)
        asked_usd = unseen.usd
        texts = {answered.tier: answered.answer, draw.tier: unseen.text}
        if lesson.beside is not None:
            reference = await self._paid(dearest, lesson.beside)
            asked_usd += reference.usd
            texts = {draw.tier: unseen.text, dearest: reference.text}
        source = lesson.shadow.source or ("judge" if judge.external else "shadow")
        if dearest not in texts:
            source, dearest = "explored", answered.tier
        other = next(tier for tier in texts if tier != dearest)
        most_usd = judge.most_usd(answered.text, texts[other], texts[dearest])
        day = self._hold(most_usd, billed=True)
        usd = 0.0
        try:
            grades = await judge.grade(answered.text, texts[other], texts[dearest])
            usd = grades.cost_usd
        except JudgeFailed as error:
            usd = error.cost_usd
            raise
        finally:
            self._settle(day, most_usd, usd, JUDGE, billed=True)
        features, prompt = captured(self.config, answered.text)
        return Label(
            answered.request_id,
            source,
            self._wall_clock(),
            answered.tenant,
            answered.tier,
            draw.probability,
            {other: grades.other, dearest: grades.dearest},
            predicted={name: min(1.0, max(0.0, q)) for name, q in answered.predicted.items()},
            cost_usd=asked_usd + usd,
            features=features,
            prompt=prompt,
        )

    async def _paid(self, tier: str, shadow: Shadow) -> Unseen:
        billed = tier not in self._ledger.unbilled
        day = self._hold(shadow.most_usd, billed)
        usd, tokens = 0.0, (0, 0)
        try:
            unseen = await shadow.ask()
            usd, tokens = unseen.usd, (unseen.prompt_tokens, unseen.output_tokens)
            return unseen
        except NoAnswer as error:
            usd = error.usd
            raise
        finally:
            self._settle(day, shadow.most_usd, usd, tier, billed, tokens)

    def _hold(self, usd: float, billed: bool) -> str:
        """The day that pays. Raises NoAnswer where the cap or the budget cannot."""
        day = self.day()
        if not self.cap.hold(day, usd):
            self._poor_day = day
            self.gate.look_again()
            raise NoMoney(f"the day's money cannot pay {usd:.6f} more USD")
        if billed and not self._ledger.hold_aside(usd):
            self.cap.settle(day, usd, 0.0)
            self._poor_until = self._clock() + BUDGET_PAUSE_S
            self.gate.look_again()
            raise NoMoney("the budget cannot pay it now")
        return day

    def _settle(
        self,
        day: str,
        held: float,
        usd: float,
        tier: str,
        billed: bool,
        tokens: tuple[int, int] = (0, 0),
    ) -> None:
        self.cap.settle(day, held, usd)
        if billed:
            self._ledger.settle_aside(held, usd)
            self._share.pay(self._clock(), self._budget_per_s, usd)
            self.gate.look_again()
        self.book(day, tier, usd, tokens)

    def book(self, day: str, tier: str, usd: float, tokens: tuple[int, int] = (0, 0)) -> None:
        """What was spent on finding out about quality, told and kept."""
        if usd > 0.0:
            self.cost_usd += usd
            self._metrics.learning_cost.inc(usd)
            self._store.add_spend(Spend(day, LEARNING, tier, 1, *tokens, usd, 0.0))

    async def idle(self) -> None:
        """Until nothing is under way."""
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def close(self) -> None:
        """Give up what is under way."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def state(self, tiers: list[str]) -> dict[str, Any]:
        """For people: what is spent, what is skipped and why, how the judge does."""
        day = self.day()
        closed = {tier: why for tier in tiers if (why := self._closed(tier)) is not None}
        return {
            "shadow_share": self.config.shadow_share,
            "capture": self.config.capture,
            "spent_today_usd": self.cap.spent(day),
            "daily_usd": self.cap.daily_usd,
            "cost_usd": self.cost_usd,
            "num_drawn": self.counts.num_drawn,
            "num_labelled": self.counts.num_labelled,
            "num_under_way": len(self._tasks),
            "failed": dict(self.counts.failed),
            "skipped": dict(self.gate.skipped),
            "closed": closed,
            "judge": self.judge.state() if self.judge is not None else None,
        }
