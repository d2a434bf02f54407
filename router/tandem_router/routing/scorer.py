"""A prompt's score in time, or one by its length alone.

A predictor that is late or broken costs a counter, never a request.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor

from msgspec import Struct

from tandem_router.config import PredictorConfig
from tandem_router.policy import PlainScore, Score, ScoreStatus
from tandem_router.routing.predictor_source import Predictor
from tandem_router.routing.recent_scores import RecentScores
from tandem_router.telemetry.metrics import Metrics

logger = logging.getLogger("tandem.router")

# A predictor that scores a long prompt within this runs on the event loop: a thread hop costs about
# 0.1 ms and its wake-up competes with the streams.
INLINE_BELOW_S = 0.005
# Outcome of a score that was late and is replaced by one of the prompt's length.
ESTIMATED = "estimated"
# Inline scores above the deadline, in a row, before the predictor is moved to a thread.
SLOW_IN_A_ROW = 3


class Scored(Struct, frozen=True, gc=False):
    """What the predictor said about one prompt, and whether it said it in time."""

    score: Score | None
    status: ScoreStatus


UNSCORED = Scored(None, ScoreStatus.ABSENT)
_OK, _FAILED = (ScoreStatus.OK.value,), (ScoreStatus.FAILED.value,)


class Scorer:
    """Runs a predictor under its deadline, inline as long as it is quick.

    Late is a score that was not ready in time, not one whose result waited for a busy event loop:
    a finished score is used. Inline there is nothing to be saved by throwing a slow score away;
    it moves the predictor to a thread instead, where lateness costs no stream anything.
    """

    def __init__(
        self, predictor: Predictor | None, config: PredictorConfig, metrics: Metrics
    ) -> None:
        self._predictor: Predictor | None = None
        self.reconfigure(config)
        self._metrics = metrics
        self._executor: ThreadPoolExecutor | None = None
        self._running: Future[tuple[Score, float]] | None = None
        self._recent = RecentScores(_read)
        self._late: tuple[int, Future[tuple[Score, float]]] | None = None
        self._num_slow = 0
        self._complained = False
        self.use(predictor)

    def reconfigure(self, config: PredictorConfig) -> None:
        """Take another deadline and length of what is scored."""
        self._type = config.type
        self._deadline_s = config.deadline_ms / 1000.0
        self._max_chars = config.max_prompt_chars

    def use(self, predictor: Predictor | None) -> None:
        """Another predictor scores from now on, on a scale of its own."""
        self._predictor = predictor
        self.predictor_changed()
        self._complained, self._num_slow = False, 0
        if self._executor is None and predictor is not None and not self._is_quick(predictor):
            self._leave_the_loop()

    @property
    def name(self) -> str:
        """For people: the configured type, and the version of a learned predictor."""
        version = getattr(self._predictor, "version", None)
        return f"{self._type} {version}" if isinstance(version, str) else self._type

    @property
    def artifact(self) -> dict[str, object] | None:
        """What is known of a learned predictor's file; None where the type needs none."""
        report = getattr(self._predictor, "report", None)
        return report() if callable(report) else None

    @property
    def is_scoring(self) -> bool:
        """Whether a prompt is being scored in the thread."""
        return self._running is not None and not self._running.done()

    @property
    def inline(self) -> bool:
        return self._executor is None

    def predictor_changed(self) -> None:
        """Another artifact is in use, on a scale of its own."""
        self._recent.forget()
        self._late = None

    def _leave_the_loop(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="predictor")

    def _is_quick(self, predictor: Predictor) -> bool:
        """Best of three on a long prompt: noise of a busy machine only ever adds time."""
        probe = "How many tokens does a long prompt take to read, and why? 12 + 34. " * 480
        best = math.inf
        try:
            for _ in range(3):
                start = time.perf_counter()
                predictor.score(probe[: self._max_chars])
                best = min(best, time.perf_counter() - start)
        except Exception as error:
            logger.warning("the predictor failed on a probe prompt: %s", error)
            return True
        return best <= INLINE_BELOW_S

    def score_now(self, prompt: str) -> Scored | None:
        """The score of a predictor that runs here; None where it has to be waited for."""
        predictor = self._predictor
        if predictor is None:
            return UNSCORED
        if self._executor is not None:
            return None
        prompt = prompt[: self._max_chars]
        try:
            start = time.perf_counter()
            score = predictor.score(prompt)
            took_s = time.perf_counter() - start
            self._recent.saw(len(prompt), score)
        except Exception:
            self._complain()
            self._metrics.predictor_outcomes[_FAILED].inc()
            return Scored(None, ScoreStatus.FAILED)
        if took_s <= self._deadline_s:
            self._num_slow = 0
        else:
            self._num_slow += 1
            if self._num_slow >= SLOW_IN_A_ROW:
                logger.warning("the predictor has become slow; it now runs in a thread")
                self._leave_the_loop()
        self._metrics.predictor_seconds.observe(took_s)
        self._metrics.predictor_outcomes[_OK].value += 1.0
        return Scored(score, ScoreStatus.OK)

    def _complain(self) -> None:
        """In an exception's handler."""
        if not self._complained:
            self._complained = True
            logger.exception("the predictor failed; the fallback tier answers (said once)")

    async def score(self, prompt: str) -> Scored:
        predictor, executor = self._predictor, self._executor
        if predictor is None or executor is None:
            return self.score_now(prompt) or UNSCORED
        prompt = prompt[: self._max_chars]
        status = ScoreStatus.OK
        score: Score | None = None
        took_s: float | None = None
        try:
            score, took_s = await self._in_thread(executor, predictor, prompt)
            if score is None:
                status = ScoreStatus.LATE
            else:
                self._recent.saw(len(prompt), score)
        except Exception:
            status = ScoreStatus.FAILED
            self._complain()
        if took_s is not None:
            self._metrics.predictor_seconds.observe(took_s)
        self._metrics.predictor_outcomes[(status.value,)].inc()
        if status is ScoreStatus.LATE:
            score = self._recent.estimate(len(prompt))
            if score is not None:
                self._metrics.predictor_outcomes[(ESTIMATED,)].inc()
                status = ScoreStatus.OK
        return Scored(score, status)

    async def _in_thread(
        self, executor: ThreadPoolExecutor, predictor: Predictor, prompt: str
    ) -> tuple[Score | None, float | None]:
        if self.is_scoring:
            # One late score at a time: a queue behind it would make all of them late.
            return None, None
        self._learn_late()
        running = self._running = executor.submit(_timed, predictor, prompt)
        try:
            async with asyncio.timeout(self._deadline_s):
                return await asyncio.shield(asyncio.wrap_future(running))
        except TimeoutError:
            if running.done():
                score, took_s = running.result()
                if took_s <= self._deadline_s:
                    return score, took_s
            self._late = (len(prompt), running)
            return None, None

    def _learn_late(self) -> None:
        """A score that came too late for its request tells of the next ones."""
        late, self._late = self._late, None
        if late is not None:
            num_chars, running = late
            if not running.cancelled() and running.exception() is None:
                self._recent.saw(num_chars, running.result()[0])

    def close(self) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)


def _read(score: Score) -> Score:
    return with_gains(score) or score


def _timed(predictor: Predictor, prompt: str) -> tuple[Score, float]:
    start = time.perf_counter()
    score = predictor.score(prompt)
    return score, time.perf_counter() - start


def with_gains(score: Score | None) -> Score | None:
    """The score with qualities whose differences are the predictor's gains.

    A learned predictor's `utility` is trained on differences between tiers and ranks prompts
    better than subtracting two calibrated qualities does. The dearest tier's quality stays where
    it is, unless the scale 0..1 forces a shift.
    """
    utility: Mapping[str, float] | None = getattr(score, "utility", None)
    if score is None or not utility or set(utility) != set(score.quality):
        return score
    if not all(map(math.isfinite, utility.values())):
        return score
    best = max(utility, key=lambda tier: utility[tier])
    offset = score.quality[best] - utility[best]
    lowest = min(utility.values()) + offset
    offset += max(0.0, -lowest)
    return PlainScore(
        {tier: min(1.0, max(0.0, value + offset)) for tier, value in utility.items()},
        score.output_tokens,
        score.out_of_distribution,
        getattr(score, "mean_tokens", None),
    )
