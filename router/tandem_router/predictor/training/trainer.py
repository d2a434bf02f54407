"""Training: views by grouped cross-fitting, a stack chosen by what it predicts out of fold.

Nobody knows beforehand which view of a prompt a pair of models rewards, so every view (the
content-blind length among them) is fitted on each training part, judged on the part left out, and
weighed by a non-negative regression on those honest predictions. Calibration, intervals and the
out-of-distribution limits come from the same predictions. The final views are then fitted on all
rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from tandem_router.predictor import artifact
from tandem_router.predictor.artifact import Arrays
from tandem_router.predictor.errors import ArtifactError, DataError
from tandem_router.predictor.evaluation import baselines, drift, verdict
from tandem_router.predictor.evaluation.costs import Prices
from tandem_router.predictor.evaluation.predictions import Predictions
from tandem_router.predictor.evaluation.report import make_report
from tandem_router.predictor.linear_algebra import FloatArray
from tandem_router.predictor.reading import hand_features, ngrams
from tandem_router.predictor.records.dataset import Dataset
from tandem_router.predictor.training import answer_verifier, lengths, stacking
from tandem_router.predictor.training.corpus import Corpus
from tandem_router.predictor.training.filling import filled
from tandem_router.predictor.training.labels import targets_of
from tandem_router.predictor.training.options import LABEL_FORMS, OPTION_BOUNDS, Options
from tandem_router.predictor.training.views import (
    View,
    core_views,
    cross_fit,
    default_views,
    export_view,
)

Progress = Callable[[str], None]

MIN_ROWS = 20


@dataclass(frozen=True, slots=True)
class Trained:
    """The artifact's content, and the out-of-fold predictions it was judged by."""

    meta: dict[str, Any]
    arrays: Arrays
    predictions: Predictions

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


#: Below this limit the verifier of answers (half a megabyte) is left out.
CASCADE_MIN_BYTES = 2_000_000


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
    dataset: Dataset,
    options: Options | None = None,
    progress: Progress = lambda _: None,
    prices: Prices | None = None,
) -> Trained:
    """Fits a predictor; the same data, seed and options give the same bytes."""
    options = options or Options()
    check(dataset, options)
    with threadpool_limits(limits=1):  # a sum's order, and so its last bit, depends on threads
        return _train(dataset, options, progress, prices)


def check(dataset: Dataset, options: Options) -> None:
    """Refuses data nothing can be learned from, with the way out."""
    if options.label_form not in LABEL_FORMS:
        raise DataError(f"label_form={options.label_form!r} is not one of {', '.join(LABEL_FORMS)}")
    for name, (least, most) in OPTION_BOUNDS.items():
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


def _train(
    dataset: Dataset, options: Options, progress: Progress, prices: Prices | None
) -> Trained:
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
    learned = filled(corpus, targets)
    arrays: Arrays = {}
    described: list[dict[str, Any]] = []
    for index, (name, view) in enumerate(views.items()):
        description, parts = export_view(name, view.fit(corpus, learned))
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
    heads = lengths.train(
        corpus,
        dataset.tiers,
        dataset.output_tokens(),
        dataset.cost_usd(),
        folds,
        options.seed,
        progress,
        # a size limit is for the views; 3 * 24 * 63 nodes fit into its reserve
        **({} if options.max_bytes is None else {"num_trees": 24, "max_leaf_nodes": 32}),
    )
    arrays |= heads.arrays
    cascade: dict[str, Any] | None = None
    if options.max_bytes is None or options.max_bytes >= CASCADE_MIN_BYTES:
        cascade, answer_arrays = answer_verifier.train(
            dataset, folds, options.seed, progress, honest.quality
        )
        arrays |= answer_arrays
    meta: dict[str, Any] = {
        "format_version": artifact.FORMAT_VERSION,
        "kind": "predictor",
        "tiers": list(dataset.tiers),
        "outputs": list(layout.outputs),
        "views": described,
        "features": list(hand_features.NAMES),
        "excerpt": list(ngrams.EXCERPT),
        "embedding": options.embedding
        and {
            "name": options.embedding.name,
            "digest": options.embedding.digest,
            "width": options.embedding.width,
        },
        "length_tiers": heads.length_tiers,
        "cost_tiers": heads.cost_tiers,
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
        "lengths": heads.report,
        "intervals": _intervals(honest.quality, labels, dataset.tiers),
        "notes": notes(dataset),
        **baselines.training_facts(dataset),
    }
    progress("judging the out-of-fold predictions")
    if any(len(_graded(labels, pair)) >= verdict.MIN_ROWS for pair in layout.pairs):
        found = make_report(
            dataset, honest, repeats=100, seed=options.seed, curves=False, prices=prices
        )
        # Prompts stay out of artifacts; rounding keeps the last bits of a sum out of its digest.
        meta["evaluation"] = _rounded(
            {key: found[key] for key in ("pairs", "heads", "in_usd", "not_judged")}
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
    if words_alone := any(row.captured is not None for row in dataset.rows):
        if options.embedding is not None:
            raise DataError(
                "rows that hold features instead of prompts have no text for an embedding; train "
                "without --embedding, or leave those rows out"
            )
        progress("note: some rows hold features instead of prompts; no view of characters is made")
    corpus = Corpus.of_rows([row.captured or row.prompt for row in dataset.rows], options.embedding)
    pairs = list(itertools.combinations(range(len(dataset.tiers)), 2))
    targets, names = targets_of(dataset, dataset.quality(), pairs, options.label_form)
    views = default_views(options, len(dataset.tiers), len(targets))
    if words_alone:
        del views["chars"]
    core = core_views(len(dataset.rows))
    layout = stacking.Layout(dataset.tiers, tuple(views), core, tuple(pairs), tuple(names))
    outputs, unknown = cross_fit(corpus, targets, folds, views, progress)
    progress("weighing the views")
    return _Crossed(corpus, targets, folds, views, layout, outputs, unknown)


def _predictions(dataset: Dataset, crossed: _Crossed) -> Predictions:
    quality, utility = stacking.out_of_fold(
        crossed.outputs, dataset.quality(), crossed.folds, crossed.layout
    )
    said = crossed.outputs[:, :, : len(dataset.tiers)]
    names = crossed.layout.views
    return Predictions(
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
) -> Predictions:
    """Each row predicted by views and a stack of the other folds, without an artifact.

    A fifth of the work of :func:`.crossval.cross_validate`, which also
    repeats the inner cross-fitting and the export per fold.
    """
    check(dataset, options)
    with threadpool_limits(limits=1):
        return _predictions(dataset, _cross(dataset, options, folds, progress))


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
