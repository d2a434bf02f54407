"""Which answers are read before they are sent, and what the verifier says of them.

A request is of the middle zone where reading is worth more than either tier alone, by the
expected utilities of `predictor.cascade.zones`, and where the latency SLO leaves time for both
answers. The verifier runs in a thread under a deadline; one that is late, fails or says nonsense
costs a counter, and the answer is sent.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from tandem_router.config import CascadeConfig, RouterConfig
from tandem_router.openai.request import InferenceRequest
from tandem_router.policy import Decision, Reason, TierVerdict
from tandem_router.predictor.cascade import (
    CascadeTerms,
    TokenStatistics,
    Verdict,
    VerifierPower,
    Zone,
    choose_zone,
    escalate,
)
from tandem_router.telemetry.metrics import Metrics

logger = logging.getLogger("tandem.router")

# Beside these a verdict on the text says too little of the answer.
READABLE_NEEDS = frozenset({"generation", "structured_output"})
_OPEN = frozenset({Reason.GAIN, Reason.SUFFICIENT})


class Verifier(Protocol):
    """Whatever can tell a right answer from a wrong one."""

    def verify(self, prompt: str, answer: str, tokens: TokenStatistics | None = None) -> Verdict:
        """The probability that the answer is good, and that the dearer tier's would be."""
        ...


class Cascade(Protocol):
    """A verifier with the tiers it stands between, as a predictor's artifact holds it."""

    @property
    def first(self) -> str: ...
    @property
    def second(self) -> str: ...
    @property
    def verifier(self) -> Verifier: ...
    @property
    def power(self) -> VerifierPower: ...
    def weigh(self, verdict: Verdict, small: float, large: float) -> Verdict:
        """The verdict together with what was predicted of the prompt."""
        ...


@dataclass(frozen=True, slots=True)
class Middle:
    """A request whose first answer is to be read: from whom, and against whom it is weighed."""

    first: str
    second: str
    terms: CascadeTerms
    cascade: Cascade
    predicted: tuple[float, float]  # quality of both, by the prompt alone


class AnswerReader:
    """The cascade of one router."""

    def __init__(self, config: RouterConfig, predictor: object, metrics: Metrics) -> None:
        self._config = config
        self._predictor = predictor
        self._metrics = metrics
        self._executor: ThreadPoolExecutor | None = None
        self._complained = False
        self.zones: Counter[str] = Counter()
        self.outcomes: Counter[str] = Counter()

    def reconfigure(self, config: RouterConfig) -> None:
        self._config = config

    def use(self, predictor: object) -> None:
        """Answers are read by this predictor's verifier from now on."""
        self._predictor = predictor

    @property
    def settings(self) -> CascadeConfig | None:
        return self._config.cascade

    @property
    def cascade(self) -> Cascade | None:
        """Of the artifact in use now."""
        found: Cascade | None = getattr(self._predictor, "cascade", None)
        names = {tier.name for tier in self._config.tiers}
        return found if found is not None and {found.first, found.second} <= names else None

    def report(self) -> dict[str, Any] | None:
        """For people: what is read, and why nothing is; None where no cascade is asked for."""
        if self.settings is None:
            return None
        cascade = self.cascade
        problem = ""
        if cascade is None:
            problem = (
                "no answer is read: the predictor's artifact holds no verifier of this router's "
                "tiers; train it on rows that hold answers (`responses`)"
            )
        return {
            "first": cascade.first if cascade is not None else None,
            "second": cascade.second if cascade is not None else None,
            "problem": problem,
            "zones": dict(self.zones),
            "outcomes": dict(self.outcomes),
        }

    def middle(
        self,
        request: InferenceRequest,
        decision: Decision,
        slo_s: float | None,
        first_p95_s: float | None,
    ) -> Middle | None:
        """The middle zone's terms for a decided request; None where its tier answers directly.

        slo_s: target of the first token. first_p95_s: of the cheaper tier's whole answers; None:
        none was seen yet, so that no SLO can be kept by it.
        """
        settings, cascade = self.settings, self.cascade
        if settings is None or cascade is None or decision.reason not in _OPEN:
            return None
        if not _readable(request) or (request.stream and not settings.streams):
            return None
        by_tier = {verdict.tier: verdict for verdict in decision.verdicts}
        small, large = by_tier.get(cascade.first), by_tier.get(cascade.second)
        if small is None or large is None or decision.tier not in (small.tier, large.tier):
            return None
        if small.excluded is not None or large.excluded is not None:
            return None
        terms = _terms(small, large, slo_s, first_p95_s)
        if terms is None or small.quality is None or large.quality is None:
            return None
        zone = choose_zone(small.quality, large.quality, cascade.power, terms)
        if zone is not Zone.VERIFY:
            # The policy has the last word on ties.
            zone = Zone.SMALL if decision.tier == small.tier else Zone.LARGE
        self.zones[str(zone)] += 1
        self._metrics.cascade_zones[(str(zone),)].inc()
        if zone is not Zone.VERIFY:
            return None
        predicted = (small.quality, large.quality)
        return Middle(small.tier, large.tier, terms, cascade, predicted)

    async def read(
        self, middle: Middle, prompt: str, answer: str, tokens: TokenStatistics | None
    ) -> Verdict | None:
        """What the verifier says in time; None where it says nothing usable."""
        prompt = prompt[: self._config.predictor.max_prompt_chars]
        deadline_s = (self.settings or CascadeConfig()).deadline_ms / 1000.0
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix="verifier")
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(deadline_s):
                verdict = await loop.run_in_executor(
                    self._executor, middle.cascade.verifier.verify, prompt, answer, tokens
                )
            verdict = middle.cascade.weigh(verdict, *middle.predicted)
        except TimeoutError:
            self.count("late")
            return None
        except Exception:
            self.count("failed")
            if not self._complained:
                self._complained = True
                logger.exception("the verifier failed; answers are sent unread (said once)")
            return None
        if not (0.0 <= verdict.quality_small <= 1.0 and 0.0 <= verdict.quality_large <= 1.0):
            self.count("failed")
            return None
        return verdict

    def wants_another(self, middle: Middle, verdict: Verdict) -> bool:
        return escalate(verdict, middle.terms)

    def count(self, outcome: str) -> None:
        """verified, escalated, or why an answer was sent without either."""
        self.outcomes[outcome] += 1
        self._metrics.cascade_outcomes[(outcome,)].inc()

    def close(self) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)


def _readable(request: InferenceRequest) -> bool:
    """Whether there is one question in words and one answer in words."""
    return (
        request.prompt is not None
        and request.num_choices == 1
        and request.needs.features <= READABLE_NEEDS
        and not request.fields.get("echo")
    )


def _terms(
    small: TierVerdict, large: TierVerdict, slo_s: float | None, first_p95_s: float | None
) -> CascadeTerms | None:
    """Costs in quality points as the policy reckons them, and the time there is."""
    cost_small, cost_large = _cost(small), _cost(large)
    if cost_small is None or cost_large is None:
        return None
    slack_s, p95_s = math.inf, 0.0
    if slo_s is not None:
        slack_s = slo_s - (large.wait_s or 0.0)
        p95_s = math.inf if first_p95_s is None else first_p95_s
    return CascadeTerms(cost_small, cost_large, slo_slack_s=slack_s, small_p95_s=p95_s)


def _cost(tier: TierVerdict) -> float | None:
    """Everything that counts against a tier; None where it has no score."""
    if tier.quality is None or tier.utility is None:
        return None
    cost = tier.quality - tier.utility
    return cost if math.isfinite(cost) else None


def text_of(reply: Mapping[str, Any], kind: str) -> str | None:
    """The words of a whole reply's one choice; None where it says something else."""
    (choice, *more) = reply["choices"]
    said: Any = choice.get("message") if kind == "chat" else choice
    if more or said.get("tool_calls") or said.get("function_call"):
        return None
    text = said.get("content" if kind == "chat" else "text")
    return text if isinstance(text, str) and text.strip() else None
