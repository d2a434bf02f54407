"""The views of a prompt as scikit-learn estimators, and how each is exported to plain arrays.

A view maps a :class:`.corpus.Corpus` to one number per output column: a tier's expected quality, or
a pair's label. Targets may hold NaN where a row has no label; every column is then learned from the
rows that have it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
from sklearn.base import BaseEstimator, RegressorMixin, TransformerMixin
from sklearn.decomposition import TruncatedSVD
from sklearn.ensemble import ExtraTreesRegressor
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.utils.validation import check_is_fitted

from tandem_router.predictor.linear_algebra import (
    DenseLinear,
    FloatArray,
    HandLinear,
    Neighbours,
    TextLinear,
    Trees,
    round_topics,
)
from tandem_router.predictor.reading import hand_features
from tandem_router.predictor.training.corpus import (
    CHAR_NGRAMS,
    WORD_NGRAMS,
    Corpus,
    Counts,
    IntArray,
)

#: Words and word pairs the topics are found in.
TOPIC_FEATURES = 8_000
#: A level costs about 5 microseconds per prompt; deeper trees ranked no better.
MAX_DEPTH = 16


def label_groups(targets: FloatArray) -> Iterator[tuple[IntArray, IntArray]]:
    """Columns that share the same labelled rows, with those rows."""
    known = ~np.isnan(targets)
    columns: dict[bytes, list[int]] = {}
    for column in range(targets.shape[1]):
        columns.setdefault(known[:, column].tobytes(), []).append(column)
    for group in columns.values():
        rows = np.flatnonzero(known[:, group[0]])
        if len(rows):
            yield np.array(group), rows


class Tfidf(TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """Unit-length TF-IDF rows over the n-grams worth keeping.

    Parameters
    ----------
    kind : "word" or "char"
    min_df : n-grams in fewer training prompts are left out: they cannot be estimated.
    max_features : the most frequent n-grams kept; bounds the artifact.
    """

    def __init__(self, kind: str = "word", min_df: int = 2, max_features: int = 60_000) -> None:
        self.kind = kind
        self.min_df = min_df
        self.max_features = max_features

    def _counts(self, corpus: Corpus) -> Counts:
        return corpus.words if self.kind == "word" else corpus.chars

    def fit(self, X: Corpus, y: object = None) -> Tfidf:
        counts = self._counts(X)
        frequency = np.bincount(counts.matrix.indices, minlength=len(counts.keys))
        keep = np.flatnonzero(frequency >= min(self.min_df, max(1, len(X) // 2)))
        if len(keep) > self.max_features:
            order = np.argsort(-frequency[keep], kind="stable")[: self.max_features]
            keep = np.sort(keep[order])
        self.keys_ = counts.keys[keep]
        # float32 like the artifact, so that estimator and artifact weigh alike
        self.idf_ = (np.log((1.0 + len(X)) / (1.0 + frequency[keep])) + 1.0).astype(np.float32)
        return self

    def transform(self, X: Corpus) -> sp.csr_matrix:
        check_is_fitted(self)
        counts = self._counts(X)
        if len(self.keys_) == 0:
            return sp.csr_matrix((len(X), 0))
        place = np.minimum(np.searchsorted(self.keys_, counts.keys), len(self.keys_) - 1)
        known = self.keys_[place] == counts.keys
        matrix = counts.matrix[:, np.flatnonzero(known)].tocsr()
        columns = place[known][matrix.indices]
        data = (1.0 + np.log(matrix.data)) * self.idf_[columns]
        weighed = sp.csr_matrix((data, columns, matrix.indptr), shape=(len(X), len(self.keys_)))
        norm = np.sqrt(np.asarray(weighed.multiply(weighed).sum(axis=1)).ravel())
        norm[norm == 0.0] = 1.0
        weighed.data /= np.repeat(norm, np.diff(weighed.indptr))
        return weighed

    def export(self, coef: npt.NDArray[Any], intercept: FloatArray, logistic: bool) -> TextLinear:
        low, high = WORD_NGRAMS if self.kind == "word" else CHAR_NGRAMS
        return TextLinear(self.kind, low, high, logistic, self.keys_, self.idf_, coef, intercept)


class TextView(RegressorMixin, BaseEstimator):  # type: ignore[misc]
    """Logistic or ridge regression on the TF-IDF weights of hashed word or character n-grams.

    Parameters
    ----------
    kind : "word" or "char"
    loss : "logistic" (qualities between 0 and 1 count as soft labels) or "squared".
    penalty : ridge penalty, the inverse of logistic regression's C; the rows have unit length.
    """

    def __init__(
        self,
        kind: str = "word",
        loss: str = "logistic",
        penalty: float = 1.0,
        min_df: int = 2,
        max_features: int = 60_000,
    ) -> None:
        self.kind = kind
        self.loss = loss
        self.penalty = penalty
        self.min_df = min_df
        self.max_features = max_features

    def fit(self, X: Corpus, y: FloatArray) -> TextView:
        self.tfidf_ = Tfidf(self.kind, self.min_df, self.max_features).fit(X)
        features = self.tfidf_.transform(X)
        self.coef_ = np.zeros((features.shape[1], y.shape[1]))
        self.intercept_ = np.zeros(y.shape[1])
        for columns, rows in label_groups(y):
            if features.shape[1] == 0:
                self.intercept_[columns] = self._inverse_link(y[rows][:, columns].mean(axis=0))
            elif self.loss == "squared":
                ridge = Ridge(alpha=self.penalty, solver="sparse_cg", tol=1e-4, max_iter=300)
                ridge.fit(features[rows], y[rows][:, columns])
                self.coef_[:, columns] = np.atleast_2d(ridge.coef_).T
                self.intercept_[columns] = ridge.intercept_
            else:
                for column in columns:
                    self._fit_logistic(features[rows], y[rows, column], column)
        return self

    def _fit_logistic(self, features: sp.csr_matrix, label: FloatArray, column: int) -> None:
        positive, negative = np.flatnonzero(label > 0), np.flatnonzero(label < 1)
        if len(positive) == 0 or len(negative) == 0:
            self.intercept_[column] = self._inverse_link(label.mean(keepdims=True))[0]
            return
        rows = np.concatenate((positive, negative))
        classes = np.repeat([1, 0], [len(positive), len(negative)])
        weight = np.concatenate((label[positive], 1.0 - label[negative]))
        # 1e-3 stops where the ranking no longer moves; 1e-4 takes twice as long
        model = LogisticRegression(C=1.0 / self.penalty, tol=1e-3, max_iter=200)
        model.fit(features[rows], classes, sample_weight=weight)
        self.coef_[:, column] = model.coef_[0]
        self.intercept_[column] = model.intercept_[0]

    def _inverse_link(self, mean: FloatArray) -> FloatArray:
        if self.loss == "squared":
            return mean
        clipped = np.clip(mean, 1e-3, 1.0 - 1e-3)
        return np.asarray(np.log(clipped / (1.0 - clipped)))

    def predict(self, X: Corpus) -> FloatArray:
        check_is_fitted(self)
        linear = np.asarray(self.tfidf_.transform(X) @ self.coef_) + self.intercept_
        if self.loss == "squared":
            return linear
        return np.asarray(1.0 / (1.0 + np.exp(-np.clip(linear, -30.0, 30.0))))

    def unknown_share(self, X: Corpus) -> FloatArray:
        """Share of each prompt's distinct words that the training prompts did not have."""
        matrix = X.words.matrix
        known = np.isin(X.words.keys, self.tfidf_.keys_)
        distinct = np.maximum(np.diff(matrix.indptr), 1)
        seen = np.add.reduceat(
            np.append(known[matrix.indices], 0.0), np.minimum(matrix.indptr[:-1], matrix.nnz)
        )
        seen[np.diff(matrix.indptr) == 0] = 0
        share: FloatArray = 1.0 - seen / distinct
        share[np.diff(matrix.indptr) == 0] = 0.0
        return share

    def export(self) -> TextLinear:
        return self.tfidf_.export(
            self.coef_.astype(np.float32), self.intercept_, self.loss == "logistic"
        )

    def export_logit(self) -> TextLinear:
        """A logistic view as the log odds, before the link."""
        return self.tfidf_.export(self.coef_.astype(np.float32), self.intercept_, False)


class HandView(RegressorMixin, BaseEstimator):  # type: ignore[misc]
    """Ridge regression on standardised hand features and their squares.

    `columns` restricts it to some features by name: ``("log_chars",)`` is the prompt-length
    baseline with a curve, fitted like everything else.
    """

    def __init__(self, alpha: float = 30.0, columns: tuple[str, ...] | None = None) -> None:
        self.alpha = alpha
        self.columns = columns

    def fit(self, X: Corpus, y: FloatArray) -> HandView:
        self.mean_ = X.hand.mean(axis=0)
        spread = X.hand.std(axis=0)
        self.scale_ = np.where(spread > 1e-9, spread, 1.0)
        wide = self._expand(X)
        use = np.ones(wide.shape[1], dtype=bool)
        if self.columns is not None:
            chosen = np.array([name in self.columns for name in hand_features.NAMES])
            use = np.concatenate((chosen, chosen))
        self.coef_ = np.zeros((wide.shape[1], y.shape[1]))
        self.intercept_ = np.zeros(y.shape[1])
        for columns, rows in label_groups(y):
            ridge = Ridge(alpha=self.alpha, solver="cholesky")
            ridge.fit(wide[rows][:, use], y[rows][:, columns])
            self.coef_[np.ix_(use, columns)] = np.atleast_2d(ridge.coef_).T
            self.intercept_[columns] = ridge.intercept_
        return self

    def _expand(self, corpus: Corpus) -> FloatArray:
        z = np.clip((corpus.hand - self.mean_) / self.scale_, -4.0, 4.0)
        return np.concatenate((z, z * z), axis=1)

    def predict(self, X: Corpus) -> FloatArray:
        check_is_fitted(self)
        return self._expand(X) @ self.coef_ + self.intercept_

    def export(self) -> HandLinear:
        return HandLinear(self.mean_, self.scale_, self.coef_, self.intercept_)


class DenseView(RegressorMixin, BaseEstimator):  # type: ignore[misc]
    """Ridge regression on the pooled token vectors of a local model, centred, of one scale.

    Parameters
    ----------
    alpha : ridge penalty in rows, for columns whose mean variance is one.
    """

    def __init__(self, alpha: float = 1000.0) -> None:
        self.alpha = alpha

    def fit(self, X: Corpus, y: FloatArray) -> DenseView:
        if X.dense is None:
            raise ValueError("the corpus has no embedding; make it with Corpus.of(..., embedding)")
        self.mean_ = X.dense.mean(axis=0)
        moved = X.dense - self.mean_
        scale = float(np.sqrt(np.mean(moved * moved))) or 1.0
        self.coef_ = np.zeros((moved.shape[1], y.shape[1]))
        self.intercept_ = np.zeros(y.shape[1])
        for columns, rows in label_groups(y):
            ridge = Ridge(alpha=self.alpha, solver="cholesky")
            ridge.fit(moved[rows] / scale, y[rows][:, columns])
            self.coef_[:, columns] = np.atleast_2d(ridge.coef_).T / scale
            self.intercept_[columns] = ridge.intercept_
        self.intercept_ = self.intercept_ - self.mean_ @ self.coef_
        return self

    def predict(self, X: Corpus) -> FloatArray:
        check_is_fitted(self)
        assert X.dense is not None
        return np.asarray(X.dense @ self.coef_ + self.intercept_)

    def export(self) -> DenseLinear:
        return DenseLinear(self.coef_, self.intercept_)


@dataclass(frozen=True, slots=True)
class TopicSpace:
    """Latent semantic directions of the words: truncated SVD of the TF-IDF rows."""

    tfidf: Tfidf
    components: npt.NDArray[np.float16]  # (num_features, num_topics)

    @classmethod
    def of(cls, corpus: Corpus, num_topics: int, max_features: int, seed: int) -> TopicSpace:
        """Fitted once per corpus: the views that share it share the work, and the artifact."""
        key = (num_topics, max_features, seed)
        if key not in corpus.spaces:
            tfidf = Tfidf("word", min_df=3, max_features=max_features).fit(corpus)
            width, components = 0, np.zeros((len(tfidf.keys_), 0), dtype=np.float16)
            if num_topics:
                rows = tfidf.transform(corpus)
                width = min(num_topics, max(min(rows.shape) - 1, 0))
            if width:
                svd = TruncatedSVD(width, n_iter=3, random_state=seed).fit(rows)
                # float16 here and in the artifact: half the bytes and still the same numbers
                components = svd.components_.T.astype(np.float16)
            corpus.spaces[key] = cls(tfidf, components)
        space: TopicSpace = corpus.spaces[key]
        return space

    def transform(self, corpus: Corpus) -> FloatArray:
        """Topics of every prompt, ``(num_rows, num_topics)``, on the grid of serving."""
        if not self.components.shape[1]:
            return np.empty((len(corpus), 0))
        exact = self.tfidf.transform(corpus) @ self.components.astype(np.float64)
        return round_topics(np.asarray(exact))

    def export(self) -> TextLinear | None:
        width = self.components.shape[1]
        return self.tfidf.export(self.components, np.zeros(width), False) if width else None


class NeighbourView(RegressorMixin, BaseEstimator):  # type: ignore[misc]
    """Mean outcome of the most similar training prompts, by topics and hand features.

    Parameters
    ----------
    num_topics, topic_features, random_state : the topic space, shared with the forest on it.
    num_dims : principal directions kept of topics and hand features together.
    max_points : training prompts kept, drawn at random where there are more.
    """

    def __init__(
        self,
        num_topics: int = 40,
        topic_features: int = TOPIC_FEATURES,
        num_dims: int = 24,
        max_points: int = 4096,
        random_state: int = 0,
    ) -> None:
        self.num_topics = num_topics
        self.topic_features = topic_features
        self.num_dims = num_dims
        self.max_points = max_points
        self.random_state = random_state

    def fit(self, X: Corpus, y: FloatArray) -> NeighbourView:
        self.space_ = TopicSpace.of(X, self.num_topics, self.topic_features, self.random_state)
        topics = self.space_.transform(X)
        mean, spread = X.hand.mean(axis=0), X.hand.std(axis=0)
        scale = np.where(spread > 1e-6, spread, 1.0)
        z = np.array(
            [
                Neighbours.position(row, topic, mean, scale)
                for row, topic in zip(X.hand, topics, strict=True)
            ]
        )
        center = z.mean(axis=0)
        _, directions = np.linalg.eigh((z - center).T @ (z - center))
        components = directions[:, ::-1][:, : self.num_dims].astype(np.float16)
        keep = np.arange(len(z))
        if len(z) > self.max_points:
            draw = np.random.default_rng(self.random_state)
            keep = np.sort(draw.permutation(len(z))[: self.max_points])
        points = ((z[keep] - center) @ components.astype(np.float64)).astype(np.float16)
        value = np.where(np.isnan(y), np.nanmean(y, axis=0), y)[keep].astype(np.float32)
        self.neighbours_ = Neighbours(mean, scale, center, components, points, value)
        return self

    def predict(self, X: Corpus) -> FloatArray:
        check_is_fitted(self)
        topics = self.space_.transform(X)
        return np.array(
            [self.neighbours_(row, topic) for row, topic in zip(X.hand, topics, strict=True)]
        ).reshape(len(X), -1)

    def export(self) -> Neighbours:
        return self.neighbours_


class TreeView(RegressorMixin, BaseEstimator):  # type: ignore[misc]
    """Extremely randomised trees over the hand features, all columns in one forest.

    A shared forest splits where the columns differ, which is what a gain needs: on the 14-task
    data it ranks with APGR 0.83 where boosting each tier by itself reaches 0.77.

    Parameters
    ----------
    num_topics : 0, or the number of latent semantic directions of the words (truncated SVD of the
        TF-IDF rows) the trees may also split on: what a prompt is about, as a few numbers.
    topic_features : words and word pairs the topics are found in.
    num_trees, min_samples_leaf, max_leaf_nodes, max_features, random_state : as in scikit-learn.
    """

    def __init__(
        self,
        num_topics: int = 0,
        topic_features: int = TOPIC_FEATURES,
        num_trees: int = 100,
        min_samples_leaf: int = 15,
        max_leaf_nodes: int | None = None,
        max_features: float = 0.4,
        random_state: int = 0,
    ) -> None:
        self.num_topics = num_topics
        self.topic_features = topic_features
        self.num_trees = num_trees
        self.min_samples_leaf = min_samples_leaf
        self.max_leaf_nodes = max_leaf_nodes
        self.max_features = max_features
        self.random_state = random_state

    def fit(self, X: Corpus, y: FloatArray) -> TreeView:
        self.num_outputs_ = y.shape[1]
        self.space_ = TopicSpace.of(X, self.num_topics, self.topic_features, self.random_state)
        features = self._features(X)
        self.forests_: list[tuple[IntArray, Any]] = []
        for columns, rows in label_groups(y):
            forest = ExtraTreesRegressor(
                n_estimators=self.num_trees,
                min_samples_leaf=self.min_samples_leaf,
                max_leaf_nodes=self.max_leaf_nodes,
                max_depth=MAX_DEPTH,
                max_features=self.max_features,
                random_state=self.random_state,
                n_jobs=1,
            )
            target = y[rows][:, columns]
            forest.fit(features[rows], target if len(columns) > 1 else target.ravel())
            self.forests_.append((columns, forest))
        return self

    def _features(self, corpus: Corpus) -> npt.NDArray[np.float32]:
        topics = self.space_.transform(corpus)
        return np.concatenate((corpus.hand, topics), axis=1).astype(np.float32)

    def predict(self, X: Corpus) -> FloatArray:
        check_is_fitted(self)
        features = self._features(X)
        out = np.zeros((len(X), self.num_outputs_))
        for columns, forest in self.forests_:
            out[:, columns] = forest.predict(features).reshape(len(X), -1)
        return out

    def export(self) -> tuple[TextLinear | None, Trees]:
        trees = [
            (tree.tree_, columns, 1.0 / len(forest.estimators_))
            for columns, forest in self.forests_
            for tree in forest.estimators_
        ]
        return self.space_.export(), export_trees(trees, np.zeros(self.num_outputs_))


def export_trees(trees: Sequence[tuple[Any, IntArray, float]], base: FloatArray) -> Trees:
    """scikit-learn trees as one array forest; each with its output columns and its weight."""
    roots: list[int] = []
    parts: dict[str, list[npt.NDArray[Any]]] = {
        name: [] for name in ("feature", "threshold", "child", "value")
    }
    start = 0
    for tree, columns, weight in trees:
        count = tree.node_count
        leaf = tree.children_left < 0
        here = np.arange(count)
        roots.append(start)
        parts["feature"].append(np.where(leaf, 0, tree.feature).astype(np.uint8))
        parts["threshold"].append(np.where(leaf, 0.0, floor32(tree.threshold)))
        sides = np.stack((tree.children_left, tree.children_right), axis=1)
        parts["child"].append((start + np.where(leaf[:, None], here[:, None], sides)).ravel())
        value = np.zeros((count, len(base)))
        value[:, columns] = tree.value[:, :, 0] * weight
        parts["value"].append(value * leaf[:, None])
        start += count
    return Trees(
        np.array(roots, dtype=np.int32),
        np.concatenate(parts["feature"]),
        np.concatenate(parts["threshold"]).astype(np.float32),
        np.concatenate(parts["child"]).astype(np.int32),
        np.concatenate(parts["value"]).astype(np.float32),
        base,
        max(tree.max_depth for tree, _, _ in trees),
    )


def floor32(values: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """The largest float32 not above each value: `x <= t` stays the same for float32 x."""
    rounded = values.astype(np.float32)
    return np.where(
        rounded.astype(np.float64) > values, np.nextafter(rounded, np.float32(-np.inf)), rounded
    ).astype(np.float32)
