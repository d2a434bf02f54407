"""The trained predictor as the router runs it: load an artifact, score a prompt, nothing else.

Only numpy is imported. The work per prompt is bounded by the excerpt
(:data:`tandem_router.predictor.reading.ngrams.HEAD_CHARS`) and by the size of the artifact.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tandem_router.predictor import artifact
from tandem_router.predictor.artifact import Arrays
from tandem_router.predictor.cascade.stored import Cascade
from tandem_router.predictor.cascade.stored import build as build_cascade
from tandem_router.predictor.errors import ArtifactError, PredictorError
from tandem_router.predictor.linear_algebra import (
    DenseLinear,
    FloatArray,
    Grams,
    HandLinear,
    Monotone,
    Neighbours,
    TextLinear,
    Trees,
    join_trees,
    need,
    round_topics,
    scoped,
)
from tandem_router.predictor.reading import hand_features, ngrams, rarity
from tandem_router.predictor.reading.captured import WORDS_TO, Captured
from tandem_router.predictor.reading.embedding import MAX_WIDTH, StaticEmbedding

MAX_TIERS = 16
MAX_VIEWS = 8
MAX_TOPICS = 128
QUANTILES = (0.1, 0.5, 0.9)
#: Least spread of log(1 + tokens): 2 %, whatever a forest that fits everything says.
MIN_SPREAD = 0.02


@dataclass(frozen=True, slots=True)
class Score:
    """What is expected of each tier on one prompt.

    `quality` is the calibrated probability that the tier's answer is good (its expected quality).
    `utility` ranks the tiers: ``gain((a, b))`` is the expected quality won by asking `b` instead
    of `a`, antisymmetric and additive over tiers. It is learned for the difference itself and so
    ranks prompts better than subtracting two qualities. `output_tokens` holds (q10, q50, q90) per
    tier whose lengths were in the training data, `mean_tokens` the expected length, whose sum over
    many requests is right, and `cost_usd` the expected cost at the prices of the training data, for
    tiers whose rows said what they cost.
    """

    quality: dict[str, float]
    utility: dict[str, float]
    out_of_distribution: bool
    version: str
    novelty: float = 0.0
    output_tokens: dict[str, tuple[float, float, float]] | None = None
    mean_tokens: dict[str, float] | None = None
    cost_usd: dict[str, float] | None = None

    def gain(self, pair: tuple[str, str]) -> float:
        """Expected quality of `pair[1]` minus that of `pair[0]`, between -1 and 1."""
        return min(max(self.utility[pair[1]] - self.utility[pair[0]], -1.0), 1.0)

    @property
    def difficulty(self) -> float:
        """1 - quality of the first tier: what is shown to people, never used to decide."""
        return 1.0 - next(iter(self.quality.values()))


@dataclass(frozen=True, slots=True)
class _View:
    """Linear on text, on hand features or on an embedding; or trees, perhaps with topics."""

    name: str
    text: TextLinear | None = None
    hand: HandLinear | None = None
    trees: Trees | None = None
    topics: TextLinear | None = None
    dense: DenseLinear | None = None
    neighbours: Neighbours | None = None


@dataclass(frozen=True, slots=True)
class _Lengths:
    """Heads of answer lengths and costs: middle, spread and mean per tier, then mean costs."""

    tiers: tuple[str, ...]
    cost_tiers: tuple[str, ...]
    trees: Trees
    factors: FloatArray  # (num_tiers, 3)
    units: FloatArray  # (num_tiers + num_cost_tiers,): tokens or dollars per unit of the forest


@dataclass(frozen=True, slots=True)
class _Read:
    """A prompt after all views: their outputs in a row, and what else was found on the way."""

    values: FloatArray  # (num_views * num_outputs,)
    row: FloatArray  # hand features
    unknown: float  # share of distinct words and word pairs the word view does not know
    lengths: FloatArray  # raw outputs of the length heads, empty without any


class Predictor:
    """Scores prompts; immutable after loading, so it may be shared between threads."""

    def __init__(self, source: artifact.Artifact, embedding: StaticEmbedding | None = None) -> None:
        rarity.table()  # read with the artifact, not with the first prompt
        meta, arrays = source.meta, source.arrays
        self.meta: Mapping[str, Any] = meta
        self.version: str = f"{source.digest[:12]}"
        if meta.get("kind") != "predictor":
            raise ArtifactError(
                f"kind={str(meta.get('kind'))[:40]!r} is not a predictor; train with `tandem train`"
            )
        self.tiers: tuple[str, ...] = _names(meta, "tiers", MAX_TIERS)
        outputs = _names(meta, "outputs", MAX_TIERS * (MAX_TIERS + 1))
        if outputs[: len(self.tiers)] != self.tiers:
            raise ArtifactError("its outputs do not start with its tiers: damaged")
        if tuple(meta.get("features", ())) != hand_features.NAMES:
            raise ArtifactError(
                "its features differ from those of this version; train again with `tandem train`"
            )
        if meta.get("excerpt") != list(ngrams.EXCERPT):
            raise ArtifactError("it reads prompts of another length; train again")
        views = meta.get("views")
        if not isinstance(views, list) or not 1 <= len(views) <= MAX_VIEWS:
            raise ArtifactError(f"it must have 1 to {MAX_VIEWS} views: damaged")
        #: Why the embedding view does not take part, where the artifact has one.
        self.embedding_problem: str | None = None
        width = self._take_embedding(meta.get("embedding"), embedding)
        self._views = [
            _build_view(view, scoped(arrays, f"view/{i}/"), len(outputs), width)
            for i, view in enumerate(views)
        ]
        self._check_topics()
        parts = [part for view in self._views for part in (view.text, view.topics)]
        self._grams = {part.grams for part in parts if part is not None}
        self._num_outputs = len(outputs)
        width = len(views) * len(outputs)
        count = len(self.tiers)
        if self.embedding_problem is not None:
            arrays = arrays | scoped(arrays, "without embedding/")
        maps = [
            (
                need(arrays, f"stack/{name}", np.float64, (count, width)),
                need(arrays, f"stack/{name}_bias", np.float64, (count,)),
            )
            for name in ("quality", "utility")
        ]
        self._linear = np.concatenate([weights for weights, _ in maps])
        self._bias = np.concatenate([bias for _, bias in maps])
        self._calibration, self._steps = (
            [
                Monotone.build(
                    need(arrays, f"{name}/{i}/x", np.float64, (None,)),
                    need(arrays, f"{name}/{i}/y", np.float64, (None,)),
                )
                for i in range(curves)
            ]
            for name, curves in (("calibration", count), ("steps", count - 1))
        )
        self._lengths = self._build_lengths(meta, arrays)
        forests = [view.trees for view in self._views if view.trees is not None]
        if self._lengths is not None:
            forests.append(self._lengths.trees)
        self._forest = join_trees(forests) if forests else None
        self._ood_center = need(arrays, "ood/center", np.float64, (len(hand_features.NAMES),))
        self._ood_scale = need(arrays, "ood/scale", np.float64, (len(hand_features.NAMES),))
        self._ood_limits: list[float] = need(arrays, "ood/limits", np.float64, (2,)).tolist()
        if min(self._ood_limits) <= 0.0:
            raise ArtifactError("its out-of-distribution limits are not positive: damaged")
        if (self._ood_scale <= 0).any():
            raise ArtifactError("a feature has no spread: damaged")
        #: The verifier of the first tier's answers, where the training data held answers.
        self.cascade: Cascade | None = build_cascade(
            meta.get("cascade"), scoped(arrays, "cascade/"), self.tiers
        )
        #: Deciles of the training prompts' features, and the shares between them; for drift.
        self.reference: tuple[FloatArray, FloatArray] = (
            need(arrays, "reference/edges", np.float64, (9, len(hand_features.NAMES))),
            need(arrays, "reference/shares", np.float64, (10, len(hand_features.NAMES))),
        )
        #: (11, num_tiers): deciles of the out-of-fold utilities of the training prompts.
        self.utility_deciles: FloatArray = need(
            arrays, "reference/utility", np.float64, (11, len(self.tiers))
        )
        #: Per tier, how far a graded answer is from its predicted quality in nine of ten cases.
        self.intervals: dict[str, float] = {
            tier: float(width)
            for tier, width in (meta.get("intervals") or {}).items()
            if tier in self.tiers and isinstance(width, int | float)
        }

    def _check_topics(self) -> None:
        """One topic space at most, and the neighbours lie in it."""
        widths = [view.topics.coef.shape[1] for view in self._views if view.topics is not None]
        if len(widths) > 1:
            raise ArtifactError("more than one view has topics: damaged")
        num_features = (widths[0] if widths else 0) + len(hand_features.NAMES)
        for view in self._views:
            if view.neighbours is not None and len(view.neighbours.center) != num_features:
                raise ArtifactError("its neighbours lie in another topic space: damaged")

    def _take_embedding(self, described: Any, embedding: StaticEmbedding | None) -> int:
        """The width of the artifact's embedding, 0 for none; the view is off where it is absent."""
        self._embedding: StaticEmbedding | None = None
        if described is None:
            return 0
        name, width = str(described["name"])[:80], described["width"]
        if not isinstance(width, int) or not 1 <= width <= MAX_WIDTH:
            raise ArtifactError(f"its embedding has {str(width)[:40]} columns: damaged")
        if embedding is None:
            self.embedding_problem = (
                f"it was trained with the embedding {name!r}, which is not configured: that view "
                "is off; name the model directory to switch it on"
            )
        elif embedding.digest != described["digest"]:
            self.embedding_problem = (
                f"it was trained with the embedding {name!r}, and {embedding.name!r} has another "
                "tokenizer or other vectors: that view is off; use the same directory, or train "
                "again"
            )
        else:
            self._embedding = embedding
        return width

    def _build_lengths(self, meta: Mapping[str, Any], arrays: Arrays) -> _Lengths | None:
        tiers, cost_tiers = meta.get("length_tiers") or [], meta.get("cost_tiers") or []
        if not tiers and not cost_tiers:
            return None
        for named in (tiers, cost_tiers):
            if not isinstance(named, list) or not set(named) <= set(self.tiers):
                raise ArtifactError("its length heads are for unknown tiers: damaged")
        return _Lengths(
            tuple(tiers),
            tuple(cost_tiers),
            Trees.build(
                scoped(arrays, "lengths/trees/"),
                len(hand_features.NAMES),
                3 * len(tiers) + len(cost_tiers),
            ),
            need(arrays, "lengths/factors", np.float64, (len(tiers), len(QUANTILES))),
            need(arrays, "lengths/units", np.float64, (len(tiers) + len(cost_tiers),)),
        )

    @property
    def reads_words_alone(self) -> bool:
        """Whether what is captured of a prompt is all that it reads."""
        dense = any(view.dense is not None for view in self._views)
        return not dense and self._grams <= {Grams("word", 1, WORDS_TO)}

    def _read(self, prompt: str | Captured) -> _Read:
        if isinstance(prompt, Captured):
            if not self.reads_words_alone:
                raise PredictorError(
                    "the predictor reads characters of a prompt, and only its words were kept"
                )
            said_words = (prompt.keys, prompt.counts)
            return self._read_counts("", prompt.hand, dict.fromkeys(self._grams, said_words))
        item = ngrams.read(prompt)
        counted = {grams: _count(grams, item) for grams in self._grams}
        return self._read_counts(item.text, hand_features.features(item), counted)

    def _read_counts(
        self,
        text: str,
        row: FloatArray,
        counted: Mapping[Grams, tuple[ngrams.UInt32Array, npt.NDArray[np.int64]]],
    ) -> _Read:
        unknown = 0.0
        said: list[FloatArray | None] = []
        features, topics = row, np.empty(0)
        for view in self._views:
            if view.text is not None:
                keys, counts = counted[view.text.grams]
                outputs, known = view.text(keys, counts)
                said.append(outputs)
                if view.text.kind == "word":
                    unknown = 1.0 - known / len(keys) if len(keys) else 1.0
            elif view.hand is not None:
                said.append(view.hand(row))
            elif view.dense is not None:
                if self._embedding is None:
                    said.append(np.zeros(self._num_outputs))
                else:
                    said.append(view.dense(self._embedding(text)))
            else:
                said.append(None)
                if view.topics is not None:
                    exact, _ = view.topics(*counted[view.topics.grams])
                    topics = round_topics(exact)
                    features = np.concatenate((row, topics))
        grown = self._forest(features) if self._forest is not None else np.empty(0)
        width = self._num_outputs
        values = np.empty(len(said) * width)
        for index, (view, found) in enumerate(zip(self._views, said, strict=True)):
            if view.neighbours is not None:
                found = view.neighbours(row, topics)
            elif found is None:
                found, grown = grown[:width], grown[width:]
            values[index * width : (index + 1) * width] = found
        return _Read(values, row, unknown, grown)

    @property
    def verdicts(self) -> tuple[str, ...]:
        """What training said to do with each pair of tiers, a sentence each."""
        evaluation = self.meta.get("evaluation")
        pairs = evaluation.get("pairs") if isinstance(evaluation, dict) else None
        if not isinstance(pairs, dict):
            return ()
        return tuple(
            f"{name}: {pair['sentence']}"[:1000]
            for name, pair in pairs.items()
            if isinstance(pair, dict) and isinstance(pair.get("sentence"), str)
        )

    @property
    def view_names(self) -> tuple[str, ...]:
        return tuple(view.name for view in self._views)

    def score(self, prompt: str | Captured) -> Score:
        """Scores one prompt of any length; about 1 ms, never more than a few.

        Raises PredictorError for what is kept of a prompt, unless `reads_words_alone`.
        """
        return self._score(self._read(prompt))

    def score_with_views(self, prompt: str | Captured) -> tuple[Score, FloatArray]:
        """The score and what each view said, ``(num_views, num_outputs)``; for evaluation."""
        read = self._read(prompt)
        return self._score(read), read.values.reshape(len(self._views), -1)

    def _score(self, read: _Read) -> Score:
        count = len(self.tiers)
        outputs = (self._linear @ read.values + self._bias).tolist()
        heads = [curve(value) for curve, value in zip(self._calibration, outputs, strict=False)]
        raw = outputs[count:]
        utility = [0.0]
        for curve, (below, above) in zip(self._steps, pairwise(raw), strict=True):
            utility.append(utility[-1] + curve(above - below))
        middle = sum(utility) / count
        utility = [value - middle for value in utility]
        # As model.combine: the heads' level, and the utilities' differences.
        level = sum(heads) / count
        quality = [min(max(level + value, 0.0), 1.0) for value in utility]
        far = np.abs(read.row - self._ood_center) / self._ood_scale
        distance = float(np.add.reduce(np.minimum(far, 8.0))) / len(far)
        novelty = max(read.unknown / self._ood_limits[0], distance / self._ood_limits[1])
        return Score(
            dict(zip(self.tiers, quality, strict=True)),
            dict(zip(self.tiers, utility, strict=True)),
            novelty > 1.0,
            self.version,
            novelty,
            **self._answers(read.lengths),
        )

    def _answers(self, outputs: FloatArray) -> dict[str, Any]:
        """Lengths and costs as fields of a score."""
        heads = self._lengths
        if heads is None:
            return {}
        found: dict[str, Any] = {}
        count = len(heads.tiers)
        means = np.maximum(outputs[2 * count :], 0.0) * heads.units
        if count:
            middle, spread = outputs[:count], np.maximum(outputs[count : 2 * count], MIN_SPREAD)
            logs = middle[:, None] + spread[:, None] * heads.factors
            quantiles = np.sort(np.expm1(np.minimum(np.maximum(logs, 0.0), 16.0)), axis=1)
            found["output_tokens"] = {
                tier: (low, median, high)
                for tier, (low, median, high) in zip(heads.tiers, quantiles.tolist(), strict=True)
            }
            found["mean_tokens"] = dict(zip(heads.tiers, means[:count].tolist(), strict=True))
        if heads.cost_tiers:
            found["cost_usd"] = dict(zip(heads.cost_tiers, means[count:].tolist(), strict=True))
        return found


def load(path: str | Path, embedding: StaticEmbedding | None = None) -> Predictor:
    """The predictor in the artifact at `path`; :class:`ArtifactError` says why one will not do.

    An artifact with an embedding view needs its `embedding`; without it the view is off, the
    others are weighed as if it had never been there, and `embedding_problem` says so.
    """
    where = _only_file(Path(path))
    source = artifact.read(where)
    try:
        return _built(source, embedding)
    except ArtifactError as error:
        raise ArtifactError(f"{where}: {error}") from error


def _only_file(path: Path) -> Path:
    """The one file in a directory, as a mounted ConfigMap has it; any other path as it is."""
    try:
        if path.is_dir():
            inside = [file for file in path.iterdir() if not file.name.startswith(".")]
            if len(inside) == 1:
                return inside[0]
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror}") from error
    return path


def loads(data: bytes, embedding: StaticEmbedding | None = None) -> Predictor:
    """The predictor in an artifact's bytes."""
    return _built(artifact.loads(data), embedding)


def _built(source: artifact.Artifact, embedding: StaticEmbedding | None) -> Predictor:
    try:
        return Predictor(source, embedding)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # Metadata is JSON of any shape: what no check above foresaw is still a bad file.
        raise ArtifactError(f"its metadata is not as `tandem train` writes it ({error})") from error


def _names(meta: Mapping[str, Any], key: str, limit: int) -> tuple[str, ...]:
    found = meta.get(key)
    if (
        not isinstance(found, list)
        or not 1 <= len(found) <= limit
        or not all(isinstance(name, str) and 1 <= len(name) <= 200 for name in found)
        or len(set(found)) != len(found)
    ):
        raise ArtifactError(f"its {key} are not 1 to {limit} different names: damaged")
    return tuple(found)


def _build_view(meta: Any, arrays: Arrays, num_outputs: int, width: int) -> _View:
    if not isinstance(meta, dict):
        raise ArtifactError("a view is not described: damaged")
    kind, name = meta.get("type"), str(meta.get("name"))[:80]
    if kind == "text":
        return _View(name, text=TextLinear.build(meta, arrays, num_outputs))
    if kind == "hand":
        return _View(name, hand=HandLinear.build(arrays, len(hand_features.NAMES), num_outputs))
    if kind == "embedding":
        return _View(name, dense=DenseLinear.build(arrays, width, num_outputs))
    if kind == "neighbours":
        return _View(
            name,
            neighbours=Neighbours.build(
                arrays, len(hand_features.NAMES), _num_topics(meta, name, 0), num_outputs
            ),
        )
    if kind != "trees":
        raise ArtifactError(f"the view {name!r} is of the unknown type {str(kind)[:40]!r}: damaged")
    described = meta.get("topics")
    if described is None:
        return _View(name, trees=Trees.build(arrays, len(hand_features.NAMES), num_outputs))
    count = _num_topics(described, name, 1)
    topics = TextLinear.build(described, scoped(arrays, "topics/"), count, np.float16)
    trees = Trees.build(arrays, len(hand_features.NAMES) + count, num_outputs)
    return _View(name, trees=trees, topics=topics)


def _num_topics(described: Any, name: str, least: int) -> int:
    count = described.get("width") if isinstance(described, dict) else None
    if not isinstance(count, int) or not least <= count <= MAX_TOPICS:
        raise ArtifactError(f"the view {name!r} has {str(count)[:40]} topics: damaged")
    return count


def _count(grams: Grams, item: ngrams.Reading) -> tuple[ngrams.UInt32Array, npt.NDArray[np.int64]]:
    if grams.kind == "word":
        return ngrams.count(ngrams.word_grams(item, grams.max_n))
    return ngrams.count(ngrams.char_grams(item, grams.min_n, grams.max_n))
