"""A predictor trained again from live labels: shadowed, compared, promoted or taken back.

Training happens elsewhere (a process of low priority, or a Job of the cluster); no request waits
for it, and one that dies, runs out of memory or learns nothing is told and changes nothing. Policy
and test are `control/promotion.py`; what is kept, and who of several decides, is in `archive.py`.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tandem_router.config import RouterConfig
from tandem_router.control.promotion import Compared, PredictorLife, Step
from tandem_router.predictor import Predictor, PredictorError, load
from tandem_router.quality.measured import Change
from tandem_router.quality.retraining.archive import RENEW_S, Archive
from tandem_router.quality.retraining.training import (
    TRAINING_LIMIT_S,
    Train,
    scored,
    train_apart,
    usable,
    write_rows,
)
from tandem_router.routing.predictor_source import ArtifactPredictor
from tandem_router.store.records import Label, StoreError
from tandem_router.store.writer import Store

logger = logging.getLogger("tandem.router")

STEP_S = 2.0
MOST_WAITING = 1_000
#: A Job may wait for a node before it runs.
JOB_LIMIT_S = TRAINING_LIMIT_S + 900.0
FAILURES = (OSError, StoreError, PredictorError, ValueError, KeyError, TypeError)


class Retraining:
    """One router's; `run` until cancelled.

    data: graded rows that are learned from beside the labels. use: told of another predictor, with
    the labels that it was not trained from and what it says of them.
    """

    def __init__(
        self,
        config: RouterConfig,
        source: ArtifactPredictor,
        store: Store,
        archive: Archive,
        use: Callable[[Sequence[Label]], None],
        wall_clock: Callable[[], float],
        data: Path | None = None,
        train: Train = train_apart,
    ) -> None:
        settings = config.predictor.retraining
        assert settings is not None
        self._config, self._source, self._store = config, source, store
        self._archive, self.data, self.train = archive, data, train
        self._use, self._wall_clock = use, wall_clock
        self._by_job = settings.by == "Job"
        self.life = PredictorLife(settings.every_s, settings.min_labels)
        self.problem = ""
        #: When another predictor came into use.
        self.switched_at: list[float] = []
        self._base, self._mounted = source.version, source.current
        self._other: Predictor | None = None
        self._since = 0.0  # labels up to then were trained from, by the newest
        self._in_use_since = 0.0  # the same, by the one in use
        self._changed_at = 0.0  # what was measured before is no longer so
        self._run = ""  # the training that a Job does
        self._num_new = 0
        self._waiting: deque[Label] = deque(maxlen=MOST_WAITING)
        self._prepared_at: float | None = None
        self._leads, self._followed = False, False
        self._fell: str | None = None
        self._unsaved = False

    # -- what comes in ----------------------------------------------------------------------

    def learn(self, label: Label) -> None:
        """One new label; looked at a little later, off the event loop."""
        known = self._prepared_at is None or label.at <= self._prepared_at
        if usable(label) and not known:
            self._num_new += 1
            self._waiting.append(label)

    def reconfigure(self, config: RouterConfig) -> None:
        self._config = config
        if (settings := config.predictor.retraining) is not None:
            self.life.every_s, self.life.min_labels = settings.every_s, settings.min_labels

    def mounted(self) -> None:
        """Another file was mounted: it is in use, and what was compared with the old one is not."""
        self._base, self._mounted = self._source.version, self._source.current
        self._other, self._in_use_since = None, 0.0
        self.life.forget()
        self._unsaved = True

    def changed(self, change: Change) -> None:
        """A tier's measured quality has changed; a fall takes a promotion back."""
        self._changed_at = change.at
        if self._prepared_at is None or change.at <= self._prepared_at:
            return  # an earlier process acted on it
        self._num_new = 0
        self._waiting.clear()
        way = "rose" if change.rose else "fell"
        self._fell = f"the measured quality of {change.tier} {way} to about {change.after:.2f}"
        if not change.rose and self.life.phase == "watched":
            return  # at the next step
        if self.life.outdated(self._wall_clock(), f"{self._fell} after it was trained"):
            self._other, self._unsaved = None, True
        self._fell = None

    # -- what is done -----------------------------------------------------------------------

    async def run(self) -> None:
        while True:
            await self.step()
            await asyncio.sleep(STEP_S)

    async def prepare(self) -> None:
        """Take what an earlier process, or another router, left; once, and as soon as possible."""
        if self._prepared_at is None:
            await self._guarded(self._restore)

    async def step(self) -> None:
        """Compare what came in; train where it is time to."""
        await self._guarded(self._step)

    async def _guarded(self, call: Callable[[], Any]) -> None:
        try:
            self.problem = ""
            await call()
        except FAILURES as error:
            self.problem = f"what becomes of predictors cannot be kept or read: {error}"[:500]
            logger.warning("predictor: %s", self.problem)

    async def _step(self) -> None:
        if self._prepared_at is None:
            await self._restore()
        if not await self._archive.leads():
            self._leads = False
            await self._follow()
            return
        if self._followed:
            await self._restore()
        self._leads, self._followed = True, False
        now = self._wall_clock()
        if self._fell is not None:
            why, self._fell = self._fell, None
            if self.life.quality_fell(now, self._source.version or "", why):
                await self._swap()
        await self._compare()
        self.problem = self._missing()
        if self._run and self.life.phase == "training":
            await self._look_for_result(now)
        elif not self.problem and self.life.due(now, self._num_new):
            await self._retrain(now)
        if self._unsaved:
            await self._save()

    def _missing(self) -> str:
        learning = self._config.learning
        if learning.capture == "None":
            return (
                "labels hold nothing of prompts to train from; set learning.capture to Features or "
                "Prompts"
            )
        if learning.judge is None or learning.shadow_share <= 0.0:
            return "nothing makes labels; set learning.judge and learning.shadow_share"
        return ""

    async def _compare(self) -> None:
        labels = [self._waiting.popleft() for _ in range(len(self._waiting))]
        active, other = self._source.current, self._other
        if not labels or active is None or other is None:
            return
        self._unsaved = True
        compared = await asyncio.to_thread(_scored, labels, active, other)
        for number, (label, tiers) in enumerate(compared, 1):
            share = self._config.learning.shadow_share or 1.0
            weight = min(1.0, share / label.probability)
            version = self._source.version or ""
            said = self.life.observe(self._wall_clock(), version, tiers, weight)
            if said is None:
                continue
            logger.info("predictor: %s: %s", said, self.life.steps[-1].why)
            if said in ("promote", "roll back"):
                await self._swap()
            else:
                self._other = None
            # What is left tells of whoever is compared from now on.
            self._waiting.extendleft(later for later, _ in reversed(compared[number:]))
            return

    async def _swap(self) -> None:
        """The other predictor is used from now on, and this one is the other."""
        other, self._other = self._other, self._source.current
        self._in_use_since = self._since
        if other is not None:
            if other.version == self._base:
                self._in_use_since = 0.0
            self.switched_at.append(self._wall_clock())
            await self._adopt(other)
        if self.life.other is None:
            self._other = None
        self._unsaved = True

    async def _adopt(self, predictor: Predictor) -> None:
        self._source.adopt(predictor)
        labels = await self._labels(max(self._in_use_since, self._changed_at))
        rescored = await asyncio.to_thread(self.rescore, labels)
        self._use(list((rescored or {}).values()))

    def rescore(self, labels: Sequence[Label]) -> dict[str, Label] | None:
        """What the predictor in use says of labels that it was not trained from, by request.

        None where there was no other one: then it is what labels say themselves.
        """
        active = self._source.current
        if active is None or (self._source.version == self._base and not self.switched_at):
            return None
        found = {}
        for label in labels:
            if usable(label) and label.at > self._in_use_since:
                said = scored(label, active)
                if said is not None:
                    found[label.request_id] = replace(label, predicted=dict(said))
        return found

    # -- training ---------------------------------------------------------------------------

    async def _retrain(self, now: float) -> None:
        self.life.began(now)
        self._other = None
        self._since, self._num_new = now, 0
        if self._by_job:
            self._run = f"{int(now):x}"
            self._unsaved = True
            return
        await self._save()
        fresh = self._archive.workspace / "fresh"
        try:
            labels = await self._labels(self._changed_at)
            data = self.data if self._changed_at == 0.0 else None
            rows = await asyncio.to_thread(write_rows, self._archive.workspace, labels, data)
            problem = await self._while_leading(self.train([rows], fresh))
            if problem:
                self.life.failed(now, problem)
            else:
                await self._trained(fresh, len(labels))
        except FAILURES as error:
            self.life.failed(self._wall_clock(), str(error)[:500])
        except asyncio.CancelledError:
            self.life.failed(self._wall_clock(), "the router ended meanwhile")
            await self._save()
            raise
        self._tell()

    async def _while_leading(self, training: Awaitable[str]) -> str:
        """The end of a training, during which no other router begins to decide."""
        task = asyncio.ensure_future(training)
        try:
            while not (await asyncio.wait({task}, timeout=RENEW_S))[0]:
                await self._archive.leads()
            return task.result()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _trained(self, fresh: Path, num_labels: int) -> None:
        trained = await asyncio.to_thread(load, fresh)
        await self._archive.keep(fresh, trained.version)
        self._other = trained
        self.life.trained(self._wall_clock(), trained.version, num_labels)

    async def _look_for_result(self, now: float) -> None:
        """What a Job has left for us."""
        result = await self._archive.result(self._run)
        if result is None:
            if now - self._since < JOB_LIMIT_S:
                return
            result = {"problem": f"there was no result within {JOB_LIMIT_S / 60:g} minutes"}
        try:
            if problem := result.get("problem"):
                self.life.failed(now, str(problem)[:500])
            else:
                version = str(result["version"])
                self._other = await self._archive.load(version)
                self.life.trained(now, version, int(result["num_labels"]))
        except FAILURES as error:
            self.life.failed(now, str(error)[:500])
        self._run = ""
        self._tell()

    def _tell(self) -> None:
        self._unsaved = True
        step = self.life.steps[-1]
        level = logging.WARNING if step.kind == "failed" else logging.INFO
        logger.log(level, "predictor: %s %s: %s", step.kind, step.version, step.why)

    async def _labels(self, since: float) -> list[Label]:
        """Those that can be trained from."""
        return [one for one in await self._store.labels(since) if usable(one) and one.at > since]

    # -- what is kept -----------------------------------------------------------------------

    async def _restore(self) -> None:
        """Go on where it was left; raises what an Archive does."""
        state = await self._archive.state()
        self._prepared_at = self._wall_clock()
        if state is None or state["base"] != self._base:
            # Another file is mounted: what was compared with the old one concerns it no longer.
            if state is not None:
                self.life.restore({**state["life"], "phase": "idle", "other": None, "test": None})
        else:
            self.life.restore(state["life"])
            self._since = float(state["since"])
            self._in_use_since = float(state["in_use_since"])
            self._changed_at = max(self._changed_at, float(state["changed_at"]))
            self._run = str(state["run"])
            self.switched_at[:] = _switches(self.life.steps)
            if (active := state["active"]) is not None and active != self._source.version:
                # Labels are learned again after this, with what it says of them.
                self._source.adopt(await self._load(active))
                self._use(())
            await self._restore_other()
        self._num_new = len(await self._labels(max(self._since, self._changed_at)))
        if self.life.phase == "training" and not self._run:
            self.life.failed(self._prepared_at, "the router ended meanwhile")
            self._unsaved = True

    async def _restore_other(self) -> None:
        name, self._other = self.life.other, None
        if name is None:
            return
        try:
            self._other = await self._load(name)
        except FAILURES as error:
            logger.warning("predictor %s cannot be compared any more: %s", name, error)
            self.life.forget()

    async def _load(self, version: str) -> Predictor:
        if version == self._base and self._mounted is not None:
            return self._mounted
        return await self._archive.load(version)

    async def _follow(self) -> None:
        """Another router decides: what it uses is used here."""
        self._waiting.clear()
        self._followed = True
        state = await self._archive.state()
        if state is None or state["base"] != self._base:
            return
        self._in_use_since = float(state["in_use_since"])
        self.life.restore({**state["life"], "phase": "idle", "other": None, "test": None})
        version = state["active"] or self._base
        if version is not None and version != self._source.version:
            self.switched_at.append(self._wall_clock())
            await self._adopt(await self._load(version))

    async def _save(self) -> None:
        """Which predictor is in use, and what happened; artifacts of others go."""
        active = self._source.version if self._source.version != self._base else None
        state = {
            "base": self._base,
            "active": active,
            "since": self._since,
            "in_use_since": self._in_use_since,
            "changed_at": self._changed_at,
            "run": self._run,
            "life": self.life.state(),
        }
        await self._archive.save(state, {name for name in (active, self.life.other) if name})
        self._unsaved = False

    def state(self) -> dict[str, Any]:
        """For status and page."""
        life, other = self.life, self._other
        test = life.test
        return {
            "phase": life.phase,
            "run": self._run if life.phase == "training" else "",
            "candidate": other.version if other is not None and life.phase == "shadowed" else None,
            "predecessor": other.version if other is not None and life.phase == "watched" else None,
            "num_new_labels": self._num_new,
            "min_labels": life.min_labels,
            "comparison": None
            if test is None
            else {"num_labels": test.num_labels, "smaller_error": test.mean},
            "steps": [asdict(step) for step in life.steps],
            "problem": self.problem,
            "leads": self._leads,
        }


def _switches(steps: Sequence[Step] | deque[Step]) -> list[float]:
    return [step.at for step in steps if step.kind in ("promoted", "rolled back")]


def _scored(
    labels: Sequence[Label], active: Predictor, other: Predictor
) -> list[tuple[Label, list[Compared]]]:
    """What both predictors say of the labels' prompts, beside what was measured."""
    found = []
    for label in labels:
        # What was said at the time is what the one in use says, where it reads more than was kept.
        in_use = scored(label, active) or label.predicted
        tested = scored(label, other) or {}
        tiers = label.quality.keys() & in_use.keys() & tested.keys()
        if tiers:
            compared = [Compared(label.quality[t], in_use[t], tested[t]) for t in sorted(tiers)]
            found.append((label, compared))
    return found
