"""A predictor trained again from live labels: shadowed, compared, promoted or taken back.

Training is another process of low priority; no request waits for it, and one that dies, runs out of
memory or learns nothing is told and changes nothing. Policy and test are `control/promotion.py`;
here are the files and the process. `folder` holds the predictor in use where it is not the mounted
one, so that a restart goes on with it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import sys
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tandem_router.config import RouterConfig
from tandem_router.control.promotion import PredictorLife, Step
from tandem_router.predictor import Predictor, PredictorError, load
from tandem_router.quality.measured import Change
from tandem_router.routing.predictor_source import ArtifactPredictor
from tandem_router.store.records import Label, StoreError
from tandem_router.store.writer import Store

logger = logging.getLogger("tandem.router")

STEP_S = 2.0
TRAINING_LIMIT_S = 3600.0
MOST_WAITING = 1_000
STATE, ROWS = "state.json", "labels.jsonl"

#: Trains from the files into a file; returns why not, or nothing.
Train = Callable[[Sequence[Path], Path], Awaitable[str]]


async def train_apart(data: Sequence[Path], into: Path) -> str:
    """Train in a process of its own that everything else goes before."""
    code = "import sys; from tandem_router.predictor.cli import main; sys.exit(main(sys.argv[1:]))"
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        code,
        "train",
        *map(str, data),
        "-o",
        str(into),
        "--quiet",
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        os.setpriority(os.PRIO_PROCESS, process.pid, 19)
        async with asyncio.timeout(TRAINING_LIMIT_S):
            _, said = await process.communicate()
    except TimeoutError:
        return f"training took longer than {TRAINING_LIMIT_S:g} s"
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        last = said.decode(errors="replace").strip().splitlines()[-1:]
        return f"training ended with status {process.returncode}: {''.join(last)[:500]}"
    return ""


class Retraining:
    """One router's; `run` until cancelled.

    data: graded rows that are learned from beside the labels. use: told of another predictor.
    """

    def __init__(
        self,
        config: RouterConfig,
        source: ArtifactPredictor,
        store: Store,
        folder: Path,
        use: Callable[[], None],
        wall_clock: Callable[[], float],
        data: Path | None = None,
        train: Train = train_apart,
    ) -> None:
        settings = config.predictor.retraining
        assert settings is not None
        self._config, self._source, self._store = config, source, store
        self._folder, self._data, self._train = folder, data, train
        self._use, self._wall_clock = use, wall_clock
        self.life = PredictorLife(settings.every_s, settings.min_labels)
        self.problem = ""
        self._base = source.version  # of the mounted file
        self._other: Predictor | None = None
        self._since = 0.0  # labels up to then were trained from
        self._num_new = 0
        self._waiting: deque[Label] = deque(maxlen=MOST_WAITING)
        self._files: dict[str, Path] = {}  # by version, of those trained here
        self._restore()

    # -- what comes in ----------------------------------------------------------------------

    def learn(self, label: Label) -> None:
        """One new label; looked at a little later, off the event loop."""
        if label.source != "feedback" and isinstance(label.prompt, str):
            self._num_new += 1
            self._waiting.append(label)

    def reconfigure(self, config: RouterConfig) -> None:
        self._config = config

    def mounted(self) -> None:
        """Another file was mounted: it is in use, and what was compared with the old one is not."""
        self._base, self._other = self._source.version, None
        self.life.forget()
        self._save()

    def changed(self, change: Change) -> None:
        """A tier's measured quality has changed; a fall takes a promotion back."""
        before = self._source.version or ""
        why = f"the measured quality of {change.tier} fell to about {change.after:.2f}"
        if not change.rose and self.life.quality_fell(self._wall_clock(), before, why):
            self._swap()

    # -- what is done -----------------------------------------------------------------------

    async def run(self) -> None:
        self._num_new = sum(label.at > self._since for label in await self._labels())
        while True:
            await self.step()
            await asyncio.sleep(STEP_S)

    async def step(self) -> None:
        """Compare what came in; train where it is time to."""
        labels = [self._waiting.popleft() for _ in range(len(self._waiting))]
        active, other = self._source.current, self._other
        if labels and active is not None and other is not None:
            errors = await asyncio.to_thread(_errors, labels, active, other)
            for label, (in_use, tested) in errors:
                if self._compared(label, in_use, tested):
                    break
        now = self._wall_clock()
        self.problem = self._missing()
        if not self.problem and self.life.due(now, self._num_new):
            await self._retrain(now)

    def _missing(self) -> str:
        learning = self._config.learning
        if learning.capture != "Prompts":
            return "labels hold no prompts to train from; set learning.capture to Prompts"
        if learning.judge is None or learning.shadow_share <= 0.0:
            return "nothing makes labels; set learning.judge and learning.shadow_share"
        return ""

    def _compared(self, label: Label, in_use: float, tested: float) -> bool:
        """Whether the comparison ended with this label."""
        share = self._config.learning.shadow_share or 1.0
        weight = min(1.0, share / label.probability)
        version = self._source.version or ""
        said = self.life.observe(self._wall_clock(), version, in_use, tested, weight)
        if said in ("promote", "roll back"):
            self._swap()
            if said == "roll back":
                self._other = None
        elif said is not None:
            self._other = None
        if said is not None:
            self._save()
            logger.info("predictor: %s: %s", said, self.life.steps[-1].why)
        return said is not None

    def _swap(self) -> None:
        """The other predictor is used from now on, and this one is the other."""
        other, self._other = self._other, self._source.current
        if other is not None:
            self._source.adopt(other)
            self._use()
        if self.life.other is None:
            self._other = None
        self._save()

    async def _retrain(self, now: float) -> None:
        self.life.began(now)
        self._other = None
        folder = self._folder
        fresh = folder / f"trained-{int(now)}"
        try:
            labels = await self._labels()
            self._since, self._num_new = now, 0
            rows = await asyncio.to_thread(self._write_rows, labels)
            data = [rows, *([self._data] if self._data is not None else [])]
            problem = await self._train(data, fresh)
            if problem:
                self.life.failed(now, problem)
            else:
                self._other = await asyncio.to_thread(load, fresh)
                self._files[self._other.version] = fresh
                self.life.trained(self._wall_clock(), self._other.version, len(labels))
        except (OSError, PredictorError, StoreError) as error:
            self.life.failed(self._wall_clock(), str(error)[:500])
        except asyncio.CancelledError:
            self.life.failed(self._wall_clock(), "the router ended meanwhile")
            self._save()
            raise
        self._save()
        step = self.life.steps[-1]
        logger.log(
            logging.WARNING if step.kind == "failed" else logging.INFO,
            "predictor: %s %s: %s",
            step.kind,
            step.version,
            step.why,
        )

    async def _labels(self) -> list[Label]:
        """Those with prompts, since the last training for counting, all of them for learning."""
        try:
            found = await self._store.labels()
        except StoreError as error:
            self.problem = f"labels cannot be read: {error}"
            return []
        return [
            label
            for label in found
            if label.source != "feedback" and isinstance(label.prompt, str) and label.quality
        ]

    def _write_rows(self, labels: Sequence[Label]) -> Path:
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / ROWS
        with path.open("w", encoding="utf-8") as file:
            for row in rows_of(labels):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        path.chmod(0o600)
        return path

    # -- what is kept -----------------------------------------------------------------------

    def _restore(self) -> None:
        try:
            kept = json.loads((self._folder / STATE).read_text())
            self.life.steps.extend(Step(**step) for step in kept["steps"])
            self._since = float(kept["since"])
            active = kept["active"]
            if active is not None and kept["base"] == self._base:
                path = self._folder / Path(active).name
                self._source.adopt(load(path))
                self._files[self._source.version or ""] = path
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError, PredictorError) as error:
            self.problem = f"what was trained before cannot be used: {error}"
            logger.warning("predictor: %s", self.problem)

    def _save(self) -> None:
        """Which predictor is in use, and what happened; files of others go."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            known = self._files.get(self._source.version or "")
            active = None if known is None else known.name
            state = {
                "base": self._base,
                "active": active,
                "since": self._since,
                "steps": [asdict(step) for step in self.life.steps],
            }
            new = self._folder / f"{STATE}.new"
            new.write_text(json.dumps(state))
            new.replace(self._folder / STATE)
            other = self._files.get(self._other.version) if self._other is not None else None
            for path in self._folder.glob("trained-*"):
                if path not in (known, other) and self.life.phase != "training":
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        except OSError as error:
            self.problem = f"{self._folder} cannot be written: {error.strerror}"
            logger.warning("predictor: %s", self.problem)

    def state(self) -> dict[str, Any]:
        """For status and page."""
        life, other = self.life, self._other
        test = life.test
        return {
            "phase": life.phase,
            "candidate": other.version if other is not None and life.phase == "shadowed" else None,
            "predecessor": other.version if other is not None and life.phase == "watched" else None,
            "num_new_labels": self._num_new,
            "min_labels": life.min_labels,
            "comparison": None
            if test is None
            else {"num_labels": test.num_labels, "smaller_error": test.mean},
            "steps": [asdict(step) for step in life.steps],
            "problem": self.problem,
        }


def rows_of(labels: Sequence[Label]) -> list[dict[str, Any]]:
    """What `tandem train` reads, a row per request; gold labels go before judged ones."""
    rows: dict[str, dict[str, Any]] = {}
    for label in sorted(labels, key=lambda label: (label.gold or label.source == "gold", label.at)):
        row = rows.setdefault(label.request_id, {"prompt": label.prompt, "quality": {}})
        row["quality"] |= dict(label.quality)
    return list(rows.values())


def _errors(
    labels: Sequence[Label], active: Predictor, other: Predictor
) -> list[tuple[Label, tuple[float, float]]]:
    found = []
    for label in labels:
        in_use, tested = active.score(label.prompt).quality, other.score(label.prompt).quality
        tiers = label.quality.keys() & in_use.keys() & tested.keys()
        if tiers:
            found.append(
                (
                    label,
                    (
                        _squared(label.quality, in_use, tiers),
                        _squared(label.quality, tested, tiers),
                    ),
                )
            )
    return found


def _squared(measured: Mapping[str, float], said: Mapping[str, float], tiers: set[str]) -> float:
    return sum((measured[tier] - said[tier]) ** 2 for tier in tiers) / len(tiers)
