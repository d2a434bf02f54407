"""Two answers become grades: compared by rule, or by an external judge asked in both orders.

An external judge can also be asked of one answer alone (`quality/answer_judge`). The rules and the
judge's questions are those of `tandem grade` (`grading/graders`). A judge that is down, slow,
garbled or dear costs labels, never a request: failures are counted and told, and after several in a
row it is left alone for a while.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from tandem_router.config import JudgeConfig
from tandem_router.errors import UpstreamError
from tandem_router.grading.graders import judge as judging
from tandem_router.grading.graders import reference as references
from tandem_router.openai.answer import NotAnAnswer, answer_of
from tandem_router.openai.usage import read_usage, reply_chars, text_tokens

#: Tokens of a verdict: a short thought and a mark.
VERDICT_TOKENS = 512
FAILURES_BEFORE_A_PAUSE = 5
FIRST_PAUSE_S, LONGEST_PAUSE_S = 15.0, 300.0

_RULES: dict[str, references.Kind] = {
    "Exact": "exact",
    "Normalised": "normalised",
    "Numeric": "numeric",
    "Json": "json",
}


Said = TypeVar("Said")


class JudgeFailed(Exception):
    """There is no verdict; the text says why. cost_usd: what was paid all the same."""

    def __init__(self, why: str, cost_usd: float = 0.0) -> None:
        super().__init__(why)
        self.cost_usd = cost_usd


#: POST of a JSON body to the judge's chat completions; (status, body). Raises UpstreamError.
Post = Callable[[JudgeConfig, bytes], Awaitable[tuple[int, bytes]]]


@dataclass(slots=True)
class JudgeHealth:
    """How the judge does. error: the last failure, None once it answered again."""

    num_pairs: int = 0
    num_failed: int = 0
    num_garbled: int = 0
    num_contradicted: int = 0  # the two orders named different winners
    num_in_a_row: int = 0  # failures
    error: str | None = None
    paused_until: float = 0.0  # of the router's clock


@dataclass(frozen=True, slots=True)
class Grades:
    """Quality of both answers, 0 to 1, and what finding it out cost."""

    other: float
    dearest: float
    cost_usd: float = 0.0


@dataclass(frozen=True, slots=True)
class Opinion:
    """What an external judge says of one answer, and what that cost."""

    good: bool
    cost_usd: float


class Judge:
    """Grades pairs of answers, of which the second is the dearest tier's, or one alone."""

    def __init__(self, config: JudgeConfig, post: Post, clock: Callable[[], float]) -> None:
        self.config = config
        self._post = post
        self._clock = clock
        self.health = JudgeHealth()

    @property
    def external(self) -> bool:
        return self.config.type == "External"

    def paused(self) -> bool:
        return self._clock() < self.health.paused_until

    def most_usd(self, question: str, first: str, second: str) -> float:
        """The most that a verdict in both orders can cost."""
        if not self.external:
            return 0.0
        # Both orders show the same text.
        return 2 * self.most_usd_of_one(question, first, second)

    def most_usd_of_one(self, *shown: str) -> float:
        """The most that one verdict on texts can cost."""
        # A token is rarely less than two bytes of text.
        cut = (text[: judging.MAX_SHOWN_CHARS].encode("utf-8", "replace") for text in shown)
        num_bytes = sum(map(len, cut)) + 2000
        return self._price(num_bytes / 2, VERDICT_TOKENS)

    async def grade(self, question: str, other: str, dearest: str) -> Grades:
        """Raises JudgeFailed."""
        self.health.num_pairs += 1
        if not self.external:
            return self._by_rule(other, dearest)
        if other.strip() == dearest.strip():
            return Grades(1.0, 1.0)
        cost_usd, verdicts = 0.0, []
        for first, second, turned in ((other, dearest, False), (dearest, other, True)):
            asked = judging.messages(question, first, second)
            verdict: judging.Verdict
            verdict, usd = await self._verdict(asked, judging.parse, cost_usd)
            cost_usd += usd
            verdicts.append(judging.turned(verdict) if turned else verdict)
        self.health.num_contradicted += set(verdicts) == {"first", "second"}
        self.health.num_in_a_row, self.health.error = 0, None
        own, of_dearest = judging.scores(verdicts)
        return Grades(own, of_dearest, cost_usd)

    async def opinion(self, question: str, answer: str, timeout_s: float) -> Opinion:
        """Whether one answer is good, by an external judge. Raises JudgeFailed."""
        asked = judging.messages_of_one(question, answer)
        good, cost_usd = await self._verdict(asked, judging.parse_of_one, 0.0, timeout_s)
        self.health.num_in_a_row, self.health.error = 0, None
        return Opinion(good, cost_usd)

    def _by_rule(self, other: str, dearest: str) -> Grades:
        """The dearest tier's answer is the reference: does the other say the same?"""
        kind = _RULES[self.config.type]
        try:
            reference = references.concluded(dearest) if kind == "normalised" else None
            same = references.grade(other, reference or dearest.strip(), kind)
        except references.BadReference as error:
            raise JudgeFailed(f"the dearest tier's answer is no reference: {error}") from error
        return Grades(same, 1.0)

    async def _verdict(
        self,
        messages: list[dict[str, str]],
        parse: Callable[[str], Said | None],
        paid_usd: float,
        timeout_s: float = math.inf,
    ) -> tuple[Said, float]:
        config, paid = self.config, paid_usd
        timeout_s = min(timeout_s, config.timeout_s)
        body = {
            "model": config.model,
            "messages": messages,
            "temperature": 0,
            "max_tokens": VERDICT_TOKENS,
        }
        try:
            async with asyncio.timeout(timeout_s):
                status, reply = await self._post(config, json.dumps(body).encode())
        except TimeoutError:
            # Who was asked may bill the question all the same.
            paid += self._price(len(json.dumps(body)) / 4, 0)
            raise self._failed(f"no verdict within {timeout_s:.3g} s", paid) from None
        except UpstreamError as error:
            raise self._failed(f"it cannot be reached: {error}", paid) from error
        if status != 200:
            raise self._failed(f"it answered with status {status}", paid)
        try:
            said = answer_of(reply, "chat")
        except NotAnAnswer as error:
            paid += self._price(len(json.dumps(body)) / 4, 0)
            raise self._failed(f"what it answered is no answer: {error}", paid) from error
        usage = read_usage(
            said.get("usage"), len(json.dumps(body)) // 4, text_tokens(reply_chars(said))
        )
        cost_usd = self._price(usage.prompt_tokens, usage.output_tokens)
        text = said["choices"][0]["message"].get("content")
        verdict = parse(text) if isinstance(text, str) else None
        if verdict is None:
            self.health.num_garbled += 1
            raise self._failed("its reply names no verdict", paid + cost_usd)
        return verdict, cost_usd

    def _price(self, prompt_tokens: float, output_tokens: float) -> float:
        config = self.config
        usd = (
            prompt_tokens * config.usd_per_1m_input_tokens
            + output_tokens * config.usd_per_1m_output_tokens
        ) / 1e6
        return usd if math.isfinite(usd) else 0.0

    def _failed(self, why: str, cost_usd: float) -> JudgeFailed:
        health = self.health
        health.num_failed += 1
        health.num_in_a_row += 1
        health.error = why
        if health.num_in_a_row >= FAILURES_BEFORE_A_PAUSE:
            doubled = FIRST_PAUSE_S * 2.0 ** (health.num_in_a_row - FAILURES_BEFORE_A_PAUSE)
            health.paused_until = self._clock() + min(LONGEST_PAUSE_S, doubled)
        return JudgeFailed(why, cost_usd)

    def state(self) -> dict[str, Any]:
        health = self.health
        return {
            "type": self.config.type,
            "ok": health.error is None,
            "error": health.error,
            "paused": self.paused(),
            "num_pairs": health.num_pairs,
            "num_failed": health.num_failed,
            "num_garbled": health.num_garbled,
            "num_contradicted": health.num_contradicted,
        }
