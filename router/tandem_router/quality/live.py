"""Learning from live traffic, put together: labels move the floor, estimates, metrics and the page.

At the start the last labels of the store are learned again, so that a restart changes nothing;
where several routers share a store, each learns what the others found.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from tandem_router.config import RouterConfig
from tandem_router.predictor.cascade.opinions import Opinions
from tandem_router.quality.labels import Labels
from tandem_router.quality.measured import Change, Measured
from tandem_router.routing.set_points import Steering
from tandem_router.store.records import Label, StoreError
from tandem_router.store.writer import Store
from tandem_router.telemetry.metrics import Metrics

logger = logging.getLogger("tandem.router")

MOST_REPLAYED = 5_000
MOST_KNOWN = 50_000
DAY_S = 86_400.0
LABELS_KEPT_S = 365 * DAY_S
STEP_S = 10.0
#: Labels that move the floor's limit: one a request, drawn at a known probability.
CERTIFYING = frozenset({"judge", "shadow"})
#: Labels that say whether a judge was right of an answer before it was sent.
CHECKING = frozenset({"judge", "cascade", "gold"})
RETENTION_STEPS = 60
#: Under which the store keeps whose verdicts the labels are.
JUDGE = "judge"
#: A label may be written this long after it was made.
LATE_S = 60.0


def _judge_of(config: RouterConfig) -> str:
    judge = config.learning.judge
    return "" if judge is None else f"{judge.type} {judge.url} {judge.model}"


class Retrained(Protocol):
    """What learning needs of a predictor that is trained again from what is learned.

    switched_at: when another one came into use.
    """

    switched_at: list[float]

    async def prepare(self) -> None: ...

    def learn(self, label: Label) -> None: ...

    def rescore(self, labels: Sequence[Label]) -> dict[str, Label] | None:
        """What the predictor in use says of those that it was not trained from, by request.

        None where there was no other one.
        """
        ...


class LiveQuality:
    """The quality of one router's answers, as labels have it."""

    def __init__(
        self,
        config: RouterConfig,
        labels: Labels,
        store: Store,
        steering: Steering,
        metrics: Metrics,
        cheapest: str,
        dearest: str,
        wall_clock: Callable[[], float],
    ) -> None:
        self._config = config
        self.store = store
        self._steering = steering
        self._metrics = metrics
        self._wall_clock = wall_clock
        self._cheapest = cheapest
        self._retrained: Retrained | None = None
        self._leaned_at = 0  # gold labels
        # Whose verdicts labels are, and from when on.
        self._judge, self._since, self._unkept = "", 0.0, False
        names = tuple(tier.name for tier in config.tiers)
        self.measured = Measured(names, dearest, steering.states_quality)
        self.measured.on_change = self._changed
        # What was learned already: the store says it again.
        self._known: OrderedDict[tuple[str, str, float], None] = OrderedDict()
        self._newest = 0.0
        self.opinions = Opinions()
        self.replayed = False
        self.error: str | None = None
        labels.on_label.append(self.learn_new)

    def reconfigure(self, config: RouterConfig, cheapest: str, dearest: str) -> None:
        self._config, self._cheapest = config, cheapest
        self.measured.set_tiers(tuple(tier.name for tier in config.tiers), dearest)
        if self.replayed and not self._judged_by(_judge_of(config)):
            self._other_judge(self._wall_clock())

    def _judged_by(self, judge: str) -> bool:
        """Whether labels until now are of this judge; where there is none, nothing has changed."""
        return not judge or judge == self._judge

    def _other_judge(self, now: float) -> None:
        """Two judges have two scales: what one said says nothing of the other."""
        before, self._judge = self._judge, _judge_of(self._config)
        if before:
            logger.warning("another judge: what was learned from the one before is forgotten")
            self._since = now
            self.opinions.forget()
            self.measured.restart(now)
            self._steering.forget_labels()
        self._unkept = True

    def served(self, tenant: str, tier: str, predicted: Mapping[str, float]) -> None:
        """One answered request that may be learned from."""
        self.measured.served(tenant, tier, predicted)

    def attach(self, retrained: Retrained) -> None:
        """Where the predictor is trained anew from what is learned here."""
        self._retrained = retrained

    def predictor_changed(self, labels: Sequence[Label] = ()) -> None:
        """Another predictor is in use; labels: not trained from, with what it says of them."""
        self.measured.rebase(labels)
        for label in labels:
            if label.source in CERTIFYING:
                self._steering.learn(label)
        self._lean()

    def _lean(self) -> None:
        """Correct the floor by what gold labels say of the judge."""
        measured = self.measured
        self._leaned_at = measured.num_checked
        self._steering.judge_leans(measured.judge_lean(self._cheapest, measured.dearest))

    def learn_new(self, label: Label) -> None:
        """One label, of this router or another; nothing here waits."""
        self.learn(label, label)

    def learn(self, label: Label, steers: Label | None) -> None:
        """steers: the label with what the predictor in use says of it, to move the floor's limit.

        None where that is not known, as it was trained from it.
        """
        key = (label.request_id, label.source, label.at)
        if key in self._known or label.at <= self._since:
            return
        self._known[key] = None
        if len(self._known) > MOST_KNOWN:
            self._known.popitem(last=False)
        self._newest = max(self._newest, label.at)
        self._metrics.quality_labels[(label.source,)].inc()
        if label.source == "explored":
            # It says what a new tier is worth beside another, and nothing of the dearest.
            self._steering.new_tiers.learn(label)
            return
        self.measured.learn(label)
        if label.source in CHECKING:
            is_gold = label.source == "gold"
            self.opinions.found(label.request_id, label.quality, label.probability, is_gold)
        if self._retrained is not None:
            self._retrained.learn(label)
        if label.source in CERTIFYING:
            if steers is not None and self._steering.learn(steers):
                logger.warning(
                    "labels prove that the quality floor was broken; only what they certify counts "
                    "from now on, and what is delivered is measured anew"
                )
                self.measured.delivers_otherwise(label.at)
        elif label.source == "gold":
            num = self.measured.num_checked
            if abs(num - self._leaned_at) > num // 50:
                self._lean()

    def _changed(self, change: Change) -> None:
        logger.warning(
            "the quality of tier %s went %s, from about %.2f to %.2f (log of the capital won %.1f "
            "after %d labels); what was learned before is forgotten",
            change.tier,
            "up" if change.rose else "down",
            change.before,
            change.after,
            change.statistic,
            change.num_labels,
        )

    async def run(self) -> None:
        """Learn what the store knows, forget what is too old; until cancelled."""
        num_steps = 0
        while True:
            await self.step(forget=num_steps % RETENTION_STEPS == 0)
            num_steps += self.replayed
            await asyncio.sleep(STEP_S if self.replayed else 1.0)

    async def step(self, forget: bool = False) -> None:
        """Once; a store that does not answer is told by `state`, and asked again."""
        try:
            if not self.replayed and self.store.health.ok:
                await self._replay()
            elif self.replayed and self._config.store.type == "postgres":
                await self._learn_all(await self.store.labels(self._newest - LATE_S))
            if forget and self.replayed:
                await self.forget(self._wall_clock())
            if self._unkept and self.store.backend is not None:
                kept = {"judge": self._judge, "since": self._since}
                await self.store.backend.keep(JUDGE, json.dumps(kept).encode())
                self._unkept = False
            self.error = None
        except StoreError as error:
            self.error = f"labels cannot be read: {error}"

    async def _replay(self) -> None:
        now, backend = self._wall_clock(), self.store.backend
        if backend is not None and (body := await backend.kept(JUDGE)) is not None:
            known = json.loads(body)
            self._judge, self._since = str(known["judge"]), float(known["since"])
        if not self._judged_by(_judge_of(self._config)):
            self._other_judge(now)
        if self.store.backend is not None:
            since = max(now - LABELS_KEPT_S, self._since)
            kept = await self.store.labels(since)
            decisions = await self.store.backend.decisions(MOST_REPLAYED)
            for decision in reversed(decisions):
                self._judged_before(decision)
            await self._learn_again(kept[-MOST_REPLAYED:])
            for decision in reversed(decisions):
                self._served_before(decision)
            self.measured.estimate_anew()
        self.replayed = True

    async def _learn_again(self, labels: list[Label]) -> None:
        """Labels of earlier processes, some of them scored by earlier predictors."""
        retrained, rescored = self._retrained, None
        switches = deque[float]()
        if retrained is not None:
            await retrained.prepare()
            rescored = await asyncio.to_thread(retrained.rescore, labels)
            switches.extend(sorted(retrained.switched_at))
        for number, label in enumerate(labels):
            while switches and label.at >= switches[0]:
                switches.popleft()
                self.measured.rebase()
            steers = label if rescored is None else rescored.get(label.request_id)
            self.learn(label, steers)
            if number % 10 == 9:
                await asyncio.sleep(0)  # requests go on

    def _judged_before(self, decision: Mapping[str, Any]) -> None:
        read = decision.get("read") or {}
        if read.get("judge") in ("good", "bad") and decision["time"] > self._since:
            good = read["judge"] == "good"
            self.opinions.said(decision["request_id"], read["tier"], good)

    def _served_before(self, decision: Mapping[str, Any]) -> None:
        since = self.measured.since
        routed = decision.get("reason") not in ("forced", "cached")
        if decision.get("status") == 200 and routed and decision["time"] >= (since or 0.0):
            self.measured.served(decision["tenant"], decision["tier"], decision["quality"])

    async def _learn_all(self, labels: list[Label]) -> None:
        for number, label in enumerate(labels):
            self.learn_new(label)
            if number % 10 == 9:
                await asyncio.sleep(0)  # requests go on

    async def forget(self, now: float) -> None:
        """Delete what is too old. Raises StoreError."""
        captured_before = now - self._config.learning.retention_days * DAY_S
        await self.store.forget_labels(now - LABELS_KEPT_S, captured_before)

    def show(self) -> None:
        """Set the gauges."""
        found = self.measured.ratio()
        if found.ratio is not None and found.low is not None and found.high is not None:
            self._metrics.measured_quality.set(found.ratio)
            self._metrics.measured_low.set(found.low)
            self._metrics.measured_high.set(found.high)

    def state(self) -> dict[str, Any]:
        return {**self.measured.state(), "error": self.error}
