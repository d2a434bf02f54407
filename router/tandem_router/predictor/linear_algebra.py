"""The arithmetic of a trained predictor on plain arrays: linear text views, trees, calibration.

Each part is a frozen dataclass of numpy arrays that validates itself against hostile input when it
is built, evaluates one prompt, and names its arrays for the artifact. Nothing here needs
scikit-learn; :mod:`tandem_router.predictor.training.estimators` fits and exports to these classes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from tandem_router.predictor.artifact import Arrays
from tandem_router.predictor.errors import ArtifactError
from tandem_router.predictor.reading import ngrams

FloatArray = npt.NDArray[np.float64]

#: Deeper trees would make the work per prompt depend on the artifact.
MAX_TREE_DEPTH = 32


@dataclass(frozen=True, slots=True)
class Grams:
    """Which n-grams a text part reads; parts with equal grams share one count per prompt."""

    kind: str
    min_n: int
    max_n: int


@dataclass(frozen=True, slots=True)
class TextLinear:
    """A linear model over the TF-IDF weights of hashed n-grams.

    ``y = link(intercept + sum_j (1 + log tf_j) idf_j coef_j / norm)`` over the n-grams in `keys`
    (ascending uint32), norm the Euclidean length of the weighted counts: scikit-learn's
    ``TfidfTransformer(sublinear_tf=True)``. The link is the identity, or the logistic function.
    """

    kind: str
    min_n: int
    max_n: int
    logistic: bool
    keys: npt.NDArray[np.uint32]  # (num_features,)
    idf: npt.NDArray[np.float32]  # (num_features,)
    coef: npt.NDArray[np.floating[Any]]  # (num_features, num_outputs), float32 or float16
    intercept: FloatArray  # (num_outputs,)

    #: (num_features, 1 + num_outputs) of idf and float32 coef: one cache miss per n-gram, not two
    packed: npt.NDArray[np.float32] | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        narrow = self.coef.dtype == np.float32
        packed = np.concatenate((self.idf[:, None], self.coef), axis=1) if narrow else None
        object.__setattr__(self, "packed", packed)

    def __call__(
        self, keys: ngrams.UInt32Array, counts: npt.NDArray[np.int64]
    ) -> tuple[FloatArray, int]:
        """Outputs for the n-grams of a prompt, and how many of them are known."""
        linear = self.intercept
        known = 0
        if len(self.keys):
            place = self.keys.searchsorted(keys)
            np.minimum(place, len(self.keys) - 1, out=place)
            hit = (self.keys.take(place) == keys).nonzero()[0]
            known = len(hit)
            if known:
                linear = linear + self._weighed(place.take(hit), counts.take(hit))
        if self.logistic:
            linear = np.asarray(1.0 / (1.0 + np.exp(-np.clip(linear, -30.0, 30.0))))
        return linear, known

    def _weighed(self, columns: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]) -> FloatArray:
        """TF-IDF of unit length times the coefficients."""
        if self.packed is not None:
            found = self.packed.take(columns, axis=0).astype(np.float64)
            idf, coef = found[:, 0], found[:, 1:]
        else:
            idf = self.idf.take(columns).astype(np.float64)
            coef = self.coef.take(columns, axis=0).astype(np.float64)
        weights = (1.0 + np.log(counts)) * idf
        total: FloatArray = (weights @ coef) / float(np.sqrt(weights @ weights))
        return total

    @property
    def grams(self) -> Grams:
        return Grams(self.kind, self.min_n, self.max_n)

    def describe(self) -> dict[str, Any]:
        """What the artifact's metadata says about this part."""
        return {
            "kind": self.kind,
            "min_n": self.min_n,
            "max_n": self.max_n,
            "link": "logistic" if self.logistic else "identity",
        }

    def arrays(self) -> Arrays:
        return {
            "keys": self.keys,
            "idf": self.idf,
            "coef": self.coef,
            "intercept": self.intercept,
        }

    @classmethod
    def build(
        cls,
        meta: dict[str, Any],
        arrays: Arrays,
        num_outputs: int,
        precision: type[np.floating[Any]] = np.float32,
    ) -> TextLinear:
        kind, min_n, max_n = meta.get("kind"), meta.get("min_n"), meta.get("max_n")
        if kind not in ("word", "char"):
            raise ArtifactError(f"kind={str(kind)[:40]!r} is neither word nor char: damaged")
        if not (isinstance(min_n, int) and isinstance(max_n, int) and 1 <= min_n <= max_n <= 8):
            raise ArtifactError("n-gram lengths are not between 1 and 8: damaged")
        keys = need(arrays, "keys", np.uint32, (None,))
        count = len(keys)
        if count > 1 and not (keys[1:] > keys[:-1]).all():
            raise ArtifactError("the n-gram keys are not ascending: damaged")
        return cls(
            kind,
            min_n,
            max_n,
            meta.get("link") == "logistic",
            keys,
            need(arrays, "idf", np.float32, (count,)),
            need(arrays, "coef", precision, (count, num_outputs)),
            need(arrays, "intercept", np.float64, (num_outputs,)),
        )


@dataclass(frozen=True, slots=True)
class Trees:
    """A sum of decision trees with vector leaves; ``x[feature] <= threshold`` goes left.

    All trees are walked together, one level per step. A leaf has itself as both children.
    """

    root: npt.NDArray[np.int32]  # (num_trees,)
    feature: npt.NDArray[np.uint8]  # (num_nodes,)
    threshold: npt.NDArray[np.float32]  # (num_nodes,)
    child: npt.NDArray[np.int32]  # (2 * num_nodes,): left and right of node n at 2n and 2n + 1
    value: npt.NDArray[np.float32]  # (num_nodes, num_outputs)
    base: FloatArray  # (num_outputs,)
    depth: int
    #: (num_nodes, 4): feature, threshold's bits, left, right; one cache miss per node, not four
    packed: npt.NDArray[np.int32] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        packed = np.empty((len(self.feature), 4), dtype=np.int32)
        packed[:, 0] = self.feature
        packed[:, 1] = self.threshold.view(np.int32)
        packed[:, 2:] = self.child.reshape(-1, 2)
        object.__setattr__(self, "packed", packed)

    def __call__(self, row: FloatArray) -> FloatArray:
        total = self.value[self.leaves(row)].sum(axis=0, dtype=np.float64)
        return np.asarray(self.base + total)

    def leaves(self, row: FloatArray) -> npt.NDArray[np.int32]:
        node = self.root
        # float32 like the thresholds: mixed types would be converted at every step
        narrow = row.astype(np.float32)
        for _ in range(self.depth):
            at = self.packed.take(node, axis=0)
            goes_left = narrow.take(at[:, 0]) <= at[:, 1].view(np.float32)
            node = np.where(goes_left, at[:, 2], at[:, 3])
        return node

    def arrays(self) -> Arrays:
        start = np.repeat(self.root, np.diff(self.root, append=len(self.feature)))
        return {
            "root": self.root,
            "feature": self.feature,
            "threshold": self.threshold,
            "left": (self.child[0::2] - start).astype(np.uint16),
            "right": (self.child[1::2] - start).astype(np.uint16),
            "value": self.value,
            "base": self.base,
        }

    @classmethod
    def build(cls, arrays: Arrays, num_features: int, num_outputs: int) -> Trees:
        root = need(arrays, "root", np.int32, (None,))
        feature = need(arrays, "feature", np.uint8, (None,))
        count = len(feature)
        sizes = np.diff(root, append=count)
        if len(root) == 0 or root[0] != 0 or (sizes <= 0).any():
            raise ArtifactError("the roots of the trees are out of order: damaged")
        if int(feature.max()) >= num_features:
            raise ArtifactError("a tree asks for a feature that does not exist: damaged")
        start = np.repeat(root, sizes)
        end = np.repeat(root + sizes, sizes)
        here = np.arange(count)
        left = start + need(arrays, "left", np.uint16, (count,)).astype(np.int32)
        right = start + need(arrays, "right", np.uint16, (count,)).astype(np.int32)
        leaf = (left == here) & (right == here)
        # Children after their parent inside the same tree: walking always ends.
        ordered = (left > here) & (right > here) & (left < end) & (right < end)
        if not (leaf | ordered).all():
            raise ArtifactError("a tree points backwards or outside itself: damaged")
        depth = 0
        level = root[~leaf[root]]
        while len(level):
            depth += 1
            if depth > MAX_TREE_DEPTH:
                raise ArtifactError(f"a tree is deeper than {MAX_TREE_DEPTH}: damaged")
            level = np.unique(np.concatenate((left[level], right[level])))
            level = level[~leaf[level]]
        return cls(
            root,
            feature,
            need(arrays, "threshold", np.float32, (count,)),
            np.stack((left, right), axis=1).ravel().astype(np.int32),
            need(arrays, "value", np.float32, (count, num_outputs)),
            need(arrays, "base", np.float64, (num_outputs,)),
            depth,
        )


@dataclass(frozen=True, slots=True)
class HandLinear:
    """A linear model over standardised, clipped hand features and their squares.

    ``z = clip((x - mean) / scale, -4, 4)``; ``y = intercept + [z, z^2] @ coef``. Clipping bounds
    what one absurd prompt can do to the answer.
    """

    mean: FloatArray  # (num_features,)
    scale: FloatArray  # (num_features,)
    coef: FloatArray  # (2 * num_features, num_outputs)
    intercept: FloatArray  # (num_outputs,)

    def __call__(self, row: FloatArray) -> FloatArray:
        z = np.minimum(np.maximum((row - self.mean) / self.scale, -4.0), 4.0)
        return self.intercept + np.concatenate((z, z * z)) @ self.coef

    def arrays(self) -> Arrays:
        return {
            "mean": self.mean,
            "scale": self.scale,
            "coef": self.coef,
            "intercept": self.intercept,
        }

    @classmethod
    def build(cls, arrays: Arrays, num_features: int, num_outputs: int) -> HandLinear:
        scale = need(arrays, "scale", np.float64, (num_features,))
        if (scale <= 0).any():
            raise ArtifactError("a feature has no spread: damaged")
        return cls(
            need(arrays, "mean", np.float64, (num_features,)),
            scale,
            need(arrays, "coef", np.float64, (2 * num_features, num_outputs)),
            need(arrays, "intercept", np.float64, (num_outputs,)),
        )


@dataclass(frozen=True, slots=True)
class DenseLinear:
    """A linear model over a vector: ``y = intercept + x @ coef``."""

    coef: FloatArray  # (width, num_outputs)
    intercept: FloatArray  # (num_outputs,)

    def __call__(self, row: FloatArray) -> FloatArray:
        return np.asarray(self.intercept + row @ self.coef)

    def arrays(self) -> Arrays:
        return {"coef": self.coef, "intercept": self.intercept}

    @classmethod
    def build(cls, arrays: Arrays, width: int, num_outputs: int) -> DenseLinear:
        return cls(
            need(arrays, "coef", np.float64, (width, num_outputs)),
            need(arrays, "intercept", np.float64, (num_outputs,)),
        )


@dataclass(frozen=True, slots=True)
class Neighbours:
    """The mean outcome of the training prompts most like this one.

    ``q = (z - center) @ components``, z the topics at unit length beside the standardised, clipped
    hand features; of the `NUM_NEIGHBOURS` nearest points each counts ``1 / (CLOSE + distance^2)``,
    beside `PRIOR` rows of the mean outcome.
    """

    mean: FloatArray  # (num_features,)
    scale: FloatArray  # (num_features,)
    center: FloatArray  # (num_topics + num_features,)
    components: npt.NDArray[np.float16]  # (num_topics + num_features, num_dims)
    points: npt.NDArray[np.float16]  # (num_points, num_dims)
    value: npt.NDArray[np.float32]  # (num_points, num_outputs)
    #: float32 copies and squared lengths, so that a prompt costs one matrix product
    ready: tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], FloatArray, FloatArray] = field(
        init=False, repr=False, compare=False
    )

    NUM_NEIGHBOURS: ClassVar[int] = 40
    CLOSE: ClassVar[float] = 0.3
    PRIOR: ClassVar[float] = 5.0

    def __post_init__(self) -> None:
        points = self.points.astype(np.float32)
        squares = np.einsum("ij,ij->i", points, points)
        mean = self.value.astype(np.float64).mean(axis=0)
        object.__setattr__(
            self, "ready", (points, squares, self.components.astype(np.float64), mean)
        )

    def __call__(self, row: FloatArray, topics: FloatArray) -> FloatArray:
        points, squares, components, mean = self.ready
        z = self.position(row, topics, self.mean, self.scale) - self.center
        query = (z @ components).astype(np.float32)
        distance = squares - 2.0 * (points @ query)
        count = min(self.NUM_NEIGHBOURS, len(distance))
        near = np.argpartition(distance, count - 1)[:count]
        weight = 1.0 / (self.CLOSE + np.maximum(distance[near] + query @ query, 0.0))
        weight = weight.astype(np.float64)
        total = weight @ self.value.take(near, axis=0)
        return np.asarray((total + self.PRIOR * mean) / (weight.sum() + self.PRIOR))

    @staticmethod
    def position(
        row: FloatArray, topics: FloatArray, mean: FloatArray, scale: FloatArray
    ) -> FloatArray:
        """Where a prompt lies before the projection."""
        z = np.minimum(np.maximum((row - mean) / scale, -3.0), 3.0) / len(row) ** 0.5
        length = float(np.sqrt(topics @ topics))
        return np.concatenate((topics / length if length > 1e-9 else topics, z))

    def arrays(self) -> Arrays:
        return {
            "mean": self.mean,
            "scale": self.scale,
            "center": self.center,
            "components": self.components,
            "points": self.points,
            "value": self.value,
        }

    @classmethod
    def build(
        cls, arrays: Arrays, num_features: int, num_topics: int, num_outputs: int
    ) -> Neighbours:
        scale = need(arrays, "scale", np.float64, (num_features,))
        if (scale <= 0).any():
            raise ArtifactError("a feature has no spread: damaged")
        width = num_topics + num_features
        components = need(arrays, "components", np.float16, (width, None))
        points = need(arrays, "points", np.float16, (None, components.shape[1]))
        if len(points) == 0:
            raise ArtifactError("its neighbours are none: damaged")
        return cls(
            need(arrays, "mean", np.float64, (num_features,)),
            scale,
            need(arrays, "center", np.float64, (width,)),
            components,
            points,
            need(arrays, "value", np.float32, (len(points), num_outputs)),
        )


@dataclass(frozen=True, slots=True)
class Monotone:
    """A non-decreasing piecewise linear map, constant outside its knots."""

    x: tuple[float, ...]  # ascending
    y: tuple[float, ...]  # non-decreasing

    def __call__(self, value: float) -> float:
        # np.interp on one number costs five times as much
        right = bisect_right(self.x, value)
        if right == 0:
            return self.y[0]
        if right == len(self.x):
            return self.y[-1]
        x, y = self.x[right - 1], self.y[right - 1]
        return y + (self.y[right] - y) * (value - x) / (self.x[right] - x)

    @classmethod
    def build(cls, x: FloatArray, y: FloatArray) -> Monotone:
        if len(x) == 0 or len(x) != len(y) or (np.diff(x) < 0).any() or (np.diff(y) < 0).any():
            raise ArtifactError("a calibration curve is not monotone: damaged")
        return cls(tuple(x.tolist()), tuple(y.tolist()))


def join_trees(forests: Sequence[Trees]) -> Trees:
    """All forests as one that is walked once; the outputs of each follow the previous one's."""
    starts = np.cumsum([0] + [len(forest.feature) for forest in forests])
    widths = np.cumsum([0] + [forest.value.shape[1] for forest in forests])
    value = np.zeros((starts[-1], widths[-1]), dtype=np.float32)
    for forest, start, end, left, right in zip(
        forests, starts, starts[1:], widths, widths[1:], strict=False
    ):
        value[start:end, left:right] = forest.value
    moved = list(zip(forests, starts, strict=False))
    return Trees(
        np.concatenate([forest.root + start for forest, start in moved]).astype(np.int32),
        np.concatenate([forest.feature for forest in forests]),
        np.concatenate([forest.threshold for forest in forests]),
        np.concatenate([forest.child + start for forest, start in moved]).astype(np.int32),
        value,
        np.concatenate([forest.base for forest in forests]),
        max(forest.depth for forest in forests),
    )


def combine(heads: FloatArray, utility: FloatArray) -> FloatArray:
    """Qualities that keep the heads' level and differ by exactly the utilities, within 0..1.

    The level of a prompt (how good the tiers are on average) comes from the calibrated heads, the
    difference between tiers from what was learned for the difference. Tiers are the last axis.
    """
    level = heads.mean(axis=-1, keepdims=True)
    moved = level + utility - utility.mean(axis=-1, keepdims=True)
    return np.asarray(np.minimum(np.maximum(moved, 0.0), 1.0))


def add_steps(steps: FloatArray) -> FloatArray:
    """Utilities ``(num_rows, num_tiers)``, summing to zero, from the gains of tier after tier."""
    start = np.zeros((len(steps), 1))
    utility = np.concatenate((start, np.cumsum(steps, axis=1)), axis=1)
    return np.asarray(utility - utility.mean(axis=1, keepdims=True))


def round_topics(values: FloatArray) -> FloatArray:
    """Topic weights on a grid of 2^-12: sums in another order still land in the same tree leaf."""
    return np.asarray(np.round(values * 4096.0) / 4096.0)


def need(arrays: Arrays, name: str, dtype: Any, shape: tuple[int | None, ...]) -> npt.NDArray[Any]:
    """The tensor `name`, which must have this type and shape (None: any size)."""
    array = arrays.get(name)
    if array is None:
        raise ArtifactError(f"the tensor {name!r} is missing: damaged, or not from `tandem train`")
    fits = len(array.shape) == len(shape) and all(
        want is None or have == want for have, want in zip(array.shape, shape, strict=True)
    )
    if array.dtype != dtype or not fits:
        raise ArtifactError(
            f"the tensor {name!r} is {array.dtype}{array.shape}, expected "
            f"{np.dtype(dtype)}{tuple('any' if n is None else n for n in shape)}: damaged"
        )
    return array


def scoped(arrays: Arrays, prefix: str) -> Arrays:
    """The tensors under `prefix`, without it."""
    return {name[len(prefix) :]: array for name, array in arrays.items() if name.startswith(prefix)}
