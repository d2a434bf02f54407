"""Training: views by grouped cross-fitting, a stack chosen by what it predicts out of fold.

Nobody knows beforehand which view of a prompt a pair of models rewards, so every view (the
content-blind length among them) is fitted on each training part, judged on the part left out, and
weighed by a non-negative regression on those honest predictions. Calibration, intervals and the
out-of-distribution limits come from the same predictions. The final views are then fitted on all
rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from tandem_router.predictor import (
    answers,
    artifact,
    baselines,
    drift,
    evaluation,
    hand,
    lengths,
    stacking,
    text,
    verdict,
)
from tandem_router.predictor.artifact import Arrays
from tandem_router.predictor.data import Dataset
from tandem_router.predictor.embedding import StaticEmbedding
from tandem_router.predictor.errors import ArtifactError, DataError
from tandem_router.predictor.estimators import (
    TOPIC_FEATURES,
    Corpus,
    DenseView,
    HandView,
    TextView,
    TreeView,
    label_groups,
)
from tandem_router.predictor.model import FloatArray

Progress = Callable[[str], None]
View = TextView | HandView | TreeView | DenseView

#: Least and most of each option; seeds are what numpy's and scikit-learn's generators take.
OPTION_BOUNDS = (
    ("seed", 0, 2**32 - 2),
    ("max_features", 1, 10_000_000),
    ("max_bytes", 1, 2**40),
    ("num_trees", 1, 10_000),
    ("num_folds", 2, 1000),
)
LABEL_FORMS = ("gain", "deterministic", "probabilistic", "transformed")
MIN_ROWS = 20


@dataclass(frozen=True, slots=True)
class Options:
    """How to train; the defaults are the study's choice (docs/studies/routing.md).

    label_form: what the ranker learns: `gain` the difference of qualities, or one of Hybrid LLM's
    forms (Ding et al. 2024): P(first at least as good as second), from one answer each, from
    several samples, or with the margin t* that spreads the labels most.
    max_features: n-grams kept per text view.
    max_bytes: size the artifact may take, shared out between the views; a ConfigMap holds 1 MiB.
    num_trees: trees of the forest.
    num_folds: folds of the cross-fitting.
    embedding: token vectors of a local model directory as a further view.
    """

    seed: int = 0
    label_form: str = "gain"
    max_features: int = 60_000
    max_bytes: int | None = None
    num_trees: int = 100
    num_folds: int = 5
    embedding: StaticEmbedding | None = None


@dataclass(frozen=True, slots=True)
class Trained:
    """The artifact's content, and the out-of-fold predictions it was judged by."""

    meta: dict[str, Any]
    arrays: Arrays
    predictions: evaluation.Predictions

    def dumps(self) -> bytes:
        """The artifact's bytes; :class:`ArtifactError` where they exceed `Options.max_bytes`."""
        content = artifact.dumps(self.meta, self.arrays)
        most = self.meta["options"]["max_bytes"]
        if most is not None and len(content) > most:
            raise ArtifactError(
                f"the artifact takes {len(content):,} bytes, more than the {most:,} of "
                f"--max-bytes; its views are as small as they get: allow {len(content):,}, or "
                "train on fewer tiers"
            )
        return content


#: How much heavier than a text view a forest is in the average, and the rows at which it is twice
#: that: sparse words learn least from few labels. On 77 cases (five pairs, parts of them, 300 to
#: 4,500 labels) the weights lower the distance to the best baseline; MMLU pays 0.001 for them.
FOREST_WEIGHT = 1.5
FOREST_ROWS = 600.0
NUM_TOPICS = 40
#: Header, evaluation, calibration and length heads under a size limit.
RESERVED_BYTES = 120_000
#: Nodes a tree should have at least, where many forests share out a size limit.
LEAST_NODES = 60
#: Below this limit the verifier of answers (half a megabyte) is left out.
CASCADE_MIN_BYTES = 2_000_000


def core_views(num_rows: int) -> dict[str, float]:
    """Views whose average is the ranking to beat, with their weights."""
    forest = FOREST_WEIGHT * (1.0 + FOREST_ROWS / num_rows)
    return {"words": 1.0, "chars": 1.0, "trees": forest, "topics": forest, "embedding": 1.25}


def default_views(
    options: Options, num_tiers: int = 2, targets: FloatArray | None = None
) -> dict[str, View]:
    """The views by name; what each is worth stands in docs/studies/routing.md.

    Under a size limit a fifth goes to each text view, a fifth to the topics' words, and what is
    left, less a reserve for the rest, to the two forests. Without one, `targets` tell whether the
    views would outgrow what an artifact may take: each set of rows with other tiers labelled has
    forests of its own.
    """
    features, topic_features, leaves = options.max_features, TOPIC_FEATURES, None
    num_trees, seed = options.num_trees, options.seed
    outputs = num_tiers + (0 if options.label_form == "gain" else num_tiers**2 // 2)
    forests, nodes = 1, 0.0
    if targets is not None:
        forests = sum(1 for _ in label_groups(targets))
        nodes = 2.0 * len(targets) / TreeView().min_samples_leaf
    limit, per_node = options.max_bytes, 9 + 4 * outputs
    size = 2 * features * (8 + 4 * outputs) + 2 * num_trees * forests * nodes * per_node
    if limit is None and size > 0.8 * artifact.MAX_BYTES:
        limit = int(0.8 * artifact.MAX_BYTES)  # the rest is for an evaluation of many pairs
    if limit is not None:
        part = max(limit - RESERVED_BYTES, 0) / 5.0
        features = min(features, max(int(part / (8 + 4 * outputs)), 100))
        topic_features = min(topic_features, max(int(part / (8 + 2 * NUM_TOPICS)), 50))
        if forests > 1:  # rather fewer trees than trees of a few leaves
            num_trees = min(num_trees, max(int(part / forests / per_node / LEAST_NODES), 2))
        leaves = max(int(part / num_trees / forests / per_node / 2), 4)
    views: dict[str, View] = {
        "words": TextView("word", "logistic", 1.0, 2, features),
        "chars": TextView("char", "squared", 6.0, 3, features),
        "trees": TreeView(0, num_trees=num_trees, max_leaf_nodes=leaves, random_state=seed),
        "topics": TreeView(
            NUM_TOPICS,
            topic_features,
            num_trees=num_trees,
            max_leaf_nodes=leaves,
            random_state=seed,
        ),
        "hand": HandView(alpha=30.0),
        "length": HandView(alpha=1.0, columns=("log_chars",)),
    }
    if options.embedding is not None:
        views["embedding"] = DenseView()  # the last: without its directory, the rest goes on
    return views


def fold_of(groups: npt.NDArray[Any], num_folds: int, seed: int) -> npt.NDArray[np.int64]:
    """A fold number per row; groups stay whole, the largest are placed first, ties by seed."""
    names, inverse, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    shuffled = np.random.default_rng(seed).permutation(len(names))
    order = shuffled[np.argsort(-sizes[shuffled], kind="stable")]
    load = np.zeros(num_folds)
    fold = np.zeros(len(names), dtype=np.int64)
    for name in order:
        fold[name] = int(np.argmin(load))
        load[fold[name]] += sizes[name]
    return fold[inverse]


def train(
    dataset: Dataset, options: Options | None = None, progress: Progress = lambda _: None
) -> Trained:
    """Fits a predictor; the same data, seed and options give the same bytes."""
    options = options or Options()
    check(dataset, options)
    with threadpool_limits(limits=1):  # a sum's order, and so its last bit, depends on threads
        return _train(dataset, options, progress)


def check(dataset: Dataset, options: Options) -> None:
    """Refuses data nothing can be learned from, with the way out."""
    if options.label_form not in LABEL_FORMS:
        raise DataError(f"label_form={options.label_form!r} is not one of {', '.join(LABEL_FORMS)}")
    for name, least, most in OPTION_BOUNDS:
        value = getattr(options, name)
        if value is not None and not least <= value <= most:
            raise DataError(f"{name}={value} is not between {least} and {most:,}")
    if len(dataset.tiers) < 2:
        raise DataError(
            f"the data grades {len(dataset.tiers)} tier(s) ({', '.join(dataset.tiers) or 'none'}); "
            "a choice needs at least two: add the other tier's grades under `quality`"
        )
    groups = dataset.groups()
    num_groups = len(np.unique(groups))
    num_prompts = len({row.prompt for row in dataset.rows})
    if num_groups < MIN_ROWS <= num_prompts:
        raise DataError(
            f"{num_prompts} different prompts are in {num_groups} group(s), which are never split; "
            f"at least {MIN_ROWS} are needed to train and check on: give `group` only to rows "
            "that belong together"
        )
    if num_groups < MIN_ROWS:
        raise DataError(
            f"{len(dataset.rows)} rows with {num_prompts} different prompts are too few to train "
            f"and check on; grade at least {MIN_ROWS}, better 500"
        )
    labels = dataset.quality()
    for index, tier in enumerate(dataset.tiers):
        known = labels[~np.isnan(labels[:, index]), index]
        if len(known) < MIN_ROWS:
            raise DataError(
                f"tier {tier!r} is graded on {len(known)} rows; grade at least {MIN_ROWS}, or "
                "remove it from the data"
            )
        apart = len(np.unique(groups[~np.isnan(labels[:, index])]))
        if apart < MIN_ROWS:
            raise DataError(
                f"tier {tier!r} is graded on {len(known)} rows of only {apart} different prompts "
                f"or groups; grade at least {MIN_ROWS} different ones, or remove it from the data"
            )
    if options.label_form == "probabilistic" and not any(row.samples for row in dataset.rows):
        raise DataError(
            "label form `probabilistic` needs several graded answers per prompt, such as "
            '"quality": {"small": [1, 0, 1]}; the data has one each: use `deterministic`'
        )


def notes(dataset: Dataset) -> list[str]:
    """Sentences about labels that can be learned from but deserve a look."""
    found: list[str] = []
    labels = dataset.quality()
    for index, tier in enumerate(dataset.tiers):
        known = labels[~np.isnan(labels[:, index]), index]
        if len(known) and np.ptp(known) == 0.0:
            found.append(
                f"every graded answer of tier {tier!r} has quality {known[0]:g}: its head is a "
                "constant; grade harder prompts to learn where it differs"
            )
        if len(known) < len(labels):
            found.append(f"tier {tier!r} is graded on {len(known)} of {len(labels)} rows")
    prompts: dict[str, tuple[float, ...]] = {}
    conflicts = 0
    for row in dataset.rows:
        graded = tuple(row.quality.get(tier, -1.0) for tier in dataset.tiers)
        conflicts += prompts.setdefault(row.prompt, graded) != graded
    if conflicts:
        found.append(
            f"{conflicts} {'row repeats' if conflicts == 1 else 'rows repeat'} a prompt with other "
            "labels; they count as several samples and stay in one fold"
        )
    found += verdict.graded_apart(labels, dataset.tiers)
    return found


def _train(dataset: Dataset, options: Options, progress: Progress) -> Trained:
    for note in notes(dataset):
        progress(f"note: {note}")
    groups = dataset.groups()
    num_folds = min(options.num_folds, len(np.unique(groups)))
    crossed = _cross(dataset, options, fold_of(groups, num_folds, options.seed), progress)
    corpus, targets, folds = crossed.corpus, crossed.targets, crossed.folds
    labels, views, layout = dataset.quality(), crossed.views, crossed.layout
    stack = stacking.fit(crossed.outputs, labels, folds, layout)
    honest = _predictions(dataset, crossed)

    progress("fitting the views on all rows")
    arrays: Arrays = {}
    described: list[dict[str, Any]] = []
    for index, (name, view) in enumerate(views.items()):
        description, parts = _export(name, view.fit(corpus, targets))
        described.append(description)
        arrays |= {f"view/{index}/{key}": value for key, value in parts.items()}
    arrays |= stack.arrays()
    if options.embedding is not None:
        rest = replace(layout, views=layout.views[:-1])
        alone = stacking.fit(crossed.outputs[:, :-1], labels, folds, rest)
        parts = alone.without_last_view(layout).arrays()
        arrays |= {f"without embedding/{key}": value for key, value in parts.items()}
    arrays |= _ood_arrays(corpus, crossed.unknown)
    arrays["reference/edges"], arrays["reference/shares"] = drift.reference(corpus.hand)
    # Deciles: with them a quality floor has a threshold before any traffic was seen.
    arrays["reference/utility"] = np.quantile(honest.utility, np.linspace(0.0, 1.0, 11), axis=0)
    length_tiers, length_arrays, length_report = lengths.train(
        corpus,
        dataset,
        folds,
        options.seed,
        progress,
        # a size limit is for the views; 2 * 24 * 63 nodes fit into its reserve
        **({} if options.max_bytes is None else {"num_trees": 24, "max_leaf_nodes": 32}),
    )
    arrays |= length_arrays
    cascade: dict[str, Any] | None = None
    if options.max_bytes is None or options.max_bytes >= CASCADE_MIN_BYTES:
        cascade, answer_arrays = answers.train(dataset, folds, options.seed, progress)
        arrays |= answer_arrays
    meta: dict[str, Any] = {
        "format_version": artifact.FORMAT_VERSION,
        "kind": "predictor",
        "tiers": list(dataset.tiers),
        "outputs": list(layout.outputs),
        "views": described,
        "features": list(hand.NAMES),
        "excerpt": list(text.EXCERPT),
        "embedding": options.embedding
        and {
            "name": options.embedding.name,
            "digest": options.embedding.digest,
            "width": options.embedding.width,
        },
        "length_tiers": length_tiers,
        "cascade": cascade,
        "data": {
            "digest": dataset.digest,
            "num_rows": len(dataset.rows),
            "num_groups": len(np.unique(groups)),
            "num_rejected": len(dataset.rejected),
            "tasks": sorted({row.task for row in dataset.rows if row.task})[:200],
        },
        "options": {
            "seed": options.seed,
            "label_form": options.label_form,
            "max_features": options.max_features,
            "max_bytes": options.max_bytes,
            "num_trees": options.num_trees,
            "num_folds": num_folds,
        },
        "weights": stack.report,
        "lengths": length_report,
        "intervals": _intervals(honest.quality, labels, dataset.tiers),
        "notes": notes(dataset),
        **baselines.training_facts(dataset),
    }
    progress("judging the out-of-fold predictions")
    if any(len(_graded(labels, pair)) >= verdict.MIN_ROWS for pair in layout.pairs):
        found = evaluation.report(dataset, honest, repeats=100, seed=options.seed, curves=False)
        # Prompts stay out of artifacts; rounding keeps the last bits of a sum out of its digest.
        meta["evaluation"] = _rounded(
            {key: value for key, value in found.items() if key in ("pairs", "heads")}
        )
    return Trained(meta, arrays, honest)


def _graded(labels: FloatArray, pair: tuple[int, int]) -> npt.NDArray[np.int64]:
    return np.flatnonzero(~np.isnan(labels[:, pair[0]]) & ~np.isnan(labels[:, pair[1]]))


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value


@dataclass(frozen=True, slots=True)
class _Crossed:
    """What cross-fitting the views gives, with what it was given."""

    corpus: Corpus
    targets: FloatArray
    folds: npt.NDArray[np.int64]
    views: dict[str, View]
    layout: stacking.Layout
    outputs: FloatArray  # (num_rows, num_views, num_outputs), out of fold
    unknown: FloatArray  # (num_rows,), share of words the view had not seen


def _cross(
    dataset: Dataset, options: Options, folds: npt.NDArray[np.int64], progress: Progress
) -> _Crossed:
    progress(f"reading {len(dataset.rows):,} prompts")
    corpus = Corpus.of([row.prompt for row in dataset.rows], options.embedding)
    pairs = list(itertools.combinations(range(len(dataset.tiers)), 2))
    targets, names = _targets(dataset, dataset.quality(), pairs, options.label_form)
    views = default_views(options, len(dataset.tiers), targets)
    core = core_views(len(dataset.rows))
    layout = stacking.Layout(dataset.tiers, tuple(views), core, tuple(pairs), tuple(names))
    outputs, unknown = cross_fit(corpus, targets, folds, views, progress)
    progress("weighing the views")
    return _Crossed(corpus, targets, folds, views, layout, outputs, unknown)


def _predictions(dataset: Dataset, crossed: _Crossed) -> evaluation.Predictions:
    quality, utility = stacking.out_of_fold(
        crossed.outputs, dataset.quality(), crossed.folds, crossed.layout
    )
    said = crossed.outputs[:, :, : len(dataset.tiers)]
    names = crossed.layout.views
    return evaluation.Predictions(
        dataset.tiers,
        quality,
        utility,
        _baselines(dataset, said, names, crossed.folds),
        {},
        np.zeros(len(quality), dtype=bool),
        crossed.folds,
        {name: said[:, index] for index, name in enumerate(names)},
    )


def _baselines(
    dataset: Dataset, said: FloatArray, names: tuple[str, ...], folds: npt.NDArray[np.int64]
) -> dict[str, FloatArray]:
    """The baselines of each row, learned from the rows of other folds."""
    found: dict[str, FloatArray] = {}
    for fold in np.unique(folds):
        inside, outside = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
        facts = baselines.training_facts(dataset.take(inside))
        part = baselines.baselines(
            dataset.take(outside), dataset.tiers, said[outside], names, facts
        )
        for name, values in part.items():
            whole = found.setdefault(name, np.zeros((len(folds), len(dataset.tiers))))
            whole[outside] = values
    return found


def out_of_fold(
    dataset: Dataset,
    options: Options,
    folds: npt.NDArray[np.int64],
    progress: Progress = lambda _: None,
) -> evaluation.Predictions:
    """Each row predicted by views and a stack of the other folds, without an artifact.

    A fifth of the work of :func:`tandem_router.predictor.crossval.predict`, which also repeats the
    inner cross-fitting and the export per fold.
    """
    check(dataset, options)
    with threadpool_limits(limits=1):
        return _predictions(dataset, _cross(dataset, options, folds, progress))


def cross_fit(
    corpus: Corpus,
    targets: FloatArray,
    folds: npt.NDArray[np.int64],
    views: Mapping[str, View],
    progress: Progress = lambda _: None,
) -> tuple[FloatArray, FloatArray]:
    """Out-of-fold view outputs ``(num_rows, num_views, num_outputs)`` and unknown-word shares."""
    out = np.zeros((len(corpus), len(views), targets.shape[1]))
    unknown = np.zeros(len(corpus))
    for fold in range(int(folds.max()) + 1):
        progress(f"cross-fitting, part {fold + 1} of {int(folds.max()) + 1}")
        inside, outside = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
        known_part, held_out = corpus.take(inside), corpus.take(outside)
        for index, view in enumerate(views.values()):
            fitted = view.fit(known_part, targets[inside])
            out[outside, index] = fitted.predict(held_out)
            if isinstance(fitted, TextView) and fitted.kind == "word":
                unknown[outside] = _unknown_share(fitted, held_out)
    return out, unknown


def _unknown_share(view: TextView, corpus: Corpus) -> FloatArray:
    matrix = corpus.words.matrix
    known = np.isin(corpus.words.keys, view.tfidf_.keys_)
    distinct = np.maximum(np.diff(matrix.indptr), 1)
    seen = np.add.reduceat(
        np.append(known[matrix.indices], 0.0), np.minimum(matrix.indptr[:-1], matrix.nnz)
    )
    seen[np.diff(matrix.indptr) == 0] = 0
    share: FloatArray = 1.0 - seen / distinct
    share[np.diff(matrix.indptr) == 0] = 0.0
    return share


def _targets(
    dataset: Dataset, labels: FloatArray, pairs: list[tuple[int, int]], form: str
) -> tuple[FloatArray, list[str]]:
    """Columns to learn: every tier's quality, and per pair its label where it is not the gain."""
    outputs = list(dataset.tiers)
    if form == "gain":
        return labels, outputs
    columns = [labels]
    for first, second in pairs:
        names = dataset.tiers[first], dataset.tiers[second]
        outputs.append(f"{names[0]} -> {names[1]}")
        columns.append(hybrid_labels(dataset, names, form)[:, None])
    return np.concatenate(columns, axis=1), outputs


def hybrid_labels(dataset: Dataset, pair: tuple[str, str], form: str) -> FloatArray:
    """1 - P(quality of the first >= quality of the second - t): Hybrid LLM's labels, turned.

    `deterministic` compares the means with t = 0; `probabilistic` all pairs of samples with
    t = 0; `transformed` all pairs with the t* that maximises the mean absolute difference between
    two rows' labels (Ding et al. 2024, section 3.3), so that a large gap does not make every
    label the same.
    """
    first, second = pair
    gaps: list[FloatArray | None] = []
    for row in dataset.rows:
        if first not in row.quality or second not in row.quality:
            gaps.append(None)
            continue
        a = np.array(row.samples.get(first, (row.quality[first],)))
        b = np.array(row.samples.get(second, (row.quality[second],)))
        if form == "deterministic":
            a, b = a.mean(keepdims=True), b.mean(keepdims=True)
        gaps.append(np.subtract.outer(b, a).ravel())

    def labels(margin: float) -> FloatArray:
        return np.array(
            [np.nan if gap is None else float(np.mean(gap > margin + 1e-9)) for gap in gaps]
        )

    if form != "transformed":
        return labels(0.0)
    best = max(np.linspace(0.0, 0.9, 19), key=lambda margin: _spread(labels(float(margin))))
    return labels(float(best))


def _spread(labels: FloatArray) -> float:
    known = np.sort(labels[~np.isnan(labels)])
    count = len(known)
    if count < 2:
        return 0.0
    return float(np.sum((2 * np.arange(count) - count + 1) * known) / (count * count))


def _export(name: str, view: View) -> tuple[dict[str, Any], Arrays]:
    """A fitted view as metadata and arrays."""
    if isinstance(view, TextView):
        text_part = view.export()
        return {"name": name, "type": "text", **text_part.describe()}, text_part.arrays()
    if isinstance(view, HandView):
        return {"name": name, "type": "hand"}, view.export().arrays()
    if isinstance(view, DenseView):
        return {"name": name, "type": "embedding"}, view.export().arrays()
    topics, trees = view.export()
    described: dict[str, Any] = {"name": name, "type": "trees"}
    arrays = trees.arrays()
    if topics is not None:
        described |= {"topics": {**topics.describe(), "width": topics.coef.shape[1]}}
        arrays |= {f"topics/{key}": value for key, value in topics.arrays().items()}
    return described, arrays


def _ood_arrays(corpus: Corpus, unknown: FloatArray) -> Arrays:
    """Limits that 0.5 % of the training prompts exceed, on either measure."""
    center = np.median(corpus.hand, axis=0)
    scale = np.maximum(np.mean(np.abs(corpus.hand - center), axis=0), 0.05)
    distance = np.mean(np.minimum(np.abs(corpus.hand - center) / scale, 8.0), axis=1)
    limits = np.array(
        [
            max(min(float(np.quantile(unknown, 0.995)) + 0.02, 0.98), 0.2),
            max(float(np.quantile(distance, 0.995)) * 1.05, 1e-3),
        ]
    )
    return {"ood/center": center, "ood/scale": scale, "ood/limits": limits}


def _intervals(
    quality: FloatArray, labels: FloatArray, tiers: tuple[str, ...], level: float = 0.9
) -> dict[str, float]:
    """Split-conformal half-widths: |label - prediction| stays below with probability `level`."""
    found: dict[str, float] = {}
    for index, tier in enumerate(tiers):
        known = ~np.isnan(labels[:, index])
        error = np.abs(labels[known, index] - quality[known, index])
        rank = min(int(np.ceil((len(error) + 1) * level)), len(error))
        found[tier] = float(np.sort(error)[rank - 1])
    return found
