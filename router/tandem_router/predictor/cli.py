"""The commands ``train``, ``evaluate`` and ``score``; what is heavy is imported when one runs."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tandem_router.predictor.errors import PredictorError
from tandem_router.predictor.training.options import LABEL_FORMS, OPTION_BOUNDS, Options

#: What fits into a ConfigMap beside its own metadata.
MAX_CONFIGMAP_BYTES = 1_000_000


def main(argv: Sequence[str]) -> int:
    """Run one of the commands without the rest of `tandem`; the exit status."""
    parser = argparse.ArgumentParser(prog="tandem")
    register(parser.add_subparsers(dest="command", metavar="COMMAND", required=True))
    arguments = parser.parse_args(argv)
    return int(arguments.run(arguments))


def register(subparsers: Any) -> None:
    """Adds the predictor's commands to a parser made with ``add_subparsers``."""
    train = subparsers.add_parser(
        "train",
        help="learn from graded answers which tier a prompt needs",
        description="Learn from graded answers (JSON lines, gzipped or not, or CSV) which tier a "
        "prompt needs, and write a predictor artifact.",
    )
    train.add_argument("data", nargs="+", type=Path, metavar="DATA", help="graded answers")
    train.add_argument(
        "-o", "--output", type=Path, required=True, metavar="ARTIFACT", help="where to write"
    )
    train.add_argument(
        "--seed",
        type=_whole(*OPTION_BOUNDS["seed"]),
        default=0,
        metavar="N",
        help="same seed, same bytes (default 0)",
    )
    train.add_argument(
        "--labels",
        choices=LABEL_FORMS,
        default="gain",
        help="what the ranking learns: the gain, or a label form of Hybrid LLM",
    )
    train.add_argument(
        "--max-features",
        type=_whole(*OPTION_BOUNDS["max_features"]),
        default=60_000,
        metavar="N",
        help="n-grams kept per text view; lower it for a smaller artifact (default 60000)",
    )
    train.add_argument(
        "--max-bytes",
        type=_whole(*OPTION_BOUNDS["max_bytes"]),
        metavar="N",
        help="size the artifact may take, such as 900000 for a ConfigMap (default: no limit "
        "below 20 MB)",
    )
    train.add_argument(
        "--embedding",
        type=Path,
        metavar="DIR",
        help="a local model directory (tokenizer.json, *.safetensors) whose token vectors become "
        "a further view; the router then needs the same directory (default: none)",
    )
    train.add_argument(
        "--cross-validate",
        type=_whole(2),
        metavar="K",
        help="also train K times on K-1 parts of the data and report on the part left out",
    )
    _add_prices(train)
    train.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="the verdict as JSON; with --cross-validate its whole report",
    )
    train.add_argument(
        "--html",
        type=Path,
        metavar="FILE",
        help="the report of --cross-validate as a page; needs --cross-validate K",
    )
    train.add_argument("--quiet", action="store_true", help="no progress on standard error")
    train.set_defaults(run=_guarded(_train))
    evaluate = subparsers.add_parser(
        "evaluate",
        help="judge an artifact on graded answers, beside every simpler method",
        description="Judge an artifact on graded answers it was not trained on, beside random, "
        "prompt length, a task table, a TF-IDF pair of heads, P(small wrong) and the oracle.",
    )
    evaluate.add_argument("artifact", type=Path, metavar="ARTIFACT", help="what train wrote")
    evaluate.add_argument("data", nargs="+", type=Path, metavar="DATA", help="graded answers")
    _add_prices(evaluate)
    evaluate.add_argument("--json", type=Path, metavar="FILE", help="the report as JSON")
    evaluate.add_argument("--html", type=Path, metavar="FILE", help="the report as a page")
    evaluate.add_argument(
        "--bootstrap",
        type=_whole(0),
        default=200,
        metavar="N",
        help="samples for the 95 %% intervals, 0 for none (default 200)",
    )
    evaluate.add_argument(
        "--embedding", type=Path, metavar="DIR", help="the model directory it was trained with"
    )
    evaluate.set_defaults(run=_guarded(_evaluate))
    score = subparsers.add_parser(
        "score",
        help="score prompts with an artifact",
        description="Write one JSON line per prompt, in order. FILE holds JSON lines with a "
        "`prompt`, JSON strings, or plain text, one prompt a line, gzipped or not, or is a CSV "
        "file with a column `prompt`; - reads standard input.",
    )
    score.add_argument("artifact", type=Path, metavar="ARTIFACT", help="what train wrote")
    score.add_argument("file", metavar="FILE", help="prompts; - for standard input")
    score.add_argument(
        "--embedding", type=Path, metavar="DIR", help="the model directory it was trained with"
    )
    score.set_defaults(run=_guarded(_score))


def _add_prices(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--price",
        type=_price,
        action="append",
        default=[],
        metavar="TIER=IN/OUT",
        help="US dollars per million input and output tokens of a tier, such as small=0.1/0.4; "
        "with `output_tokens` in the data it takes the place of `cost_usd` (repeatable)",
    )


def _price(text: str) -> tuple[str, tuple[float, float]]:
    """An argument's type: a tier and its two prices."""
    tier, _, prices = text.rpartition("=")
    parts = prices.split("/")
    try:
        numbers = [float(part) for part in parts]
    except ValueError:
        numbers = []
    if not tier or len(numbers) != 2 or not all(0.0 <= number < 1e6 for number in numbers):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not TIER=IN/OUT in US dollars per million tokens, such as small=0.1/0.4"
        )
    return tier, (numbers[0], numbers[1])


def _whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """An argument's type: whole numbers from `least` to `most`."""

    def parse(text: str) -> int:
        number = int(text) if text.lstrip("+-").isdecimal() and len(text) < 20 else None
        if number is None or number < least or (most is not None and number > most):
            upper = f" to {most}" if most is not None else ""
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least}{upper}")
        return number

    return parse


def _guarded(command: Any) -> Any:
    def run(arguments: argparse.Namespace) -> int:
        try:
            return int(command(arguments) or 0)
        except PredictorError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        except BrokenPipeError:  # the reader (head, less) has seen enough
            sys.stderr.close()
            return 0

    return run


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _train(arguments: argparse.Namespace) -> int:
    from tandem_router.predictor import artifact
    from tandem_router.predictor.errors import DataError
    from tandem_router.predictor.evaluation import terminal
    from tandem_router.predictor.evaluation.report import make_report
    from tandem_router.predictor.training import crossval, trainer

    if arguments.html and not arguments.cross_validate:
        raise DataError("--html writes the report of --cross-validate K; name K, say 5")
    _check_outputs(arguments.output, arguments.json, arguments.html)
    dataset = _read(arguments.data)
    prices = _prices(arguments, dataset.tiers)
    options = Options(
        seed=arguments.seed,
        label_form=arguments.labels,
        max_features=arguments.max_features,
        max_bytes=arguments.max_bytes,
        embedding=_embedding(arguments),
    )
    say = _quiet if arguments.quiet else _say
    if arguments.cross_validate:
        crossval.check(dataset, options, arguments.cross_validate)
    trained = trainer.train(dataset, options, say, prices)
    content = trained.dumps()
    artifact.save(arguments.output, content)
    print(f"wrote {arguments.output} ({len(content):,} bytes)")
    if arguments.cross_validate:
        predictions = crossval.cross_validate(dataset, options, arguments.cross_validate, say)
        found = make_report(dataset, predictions, seed=arguments.seed, prices=prices)
        _write(found, arguments, f"cross-validation in {arguments.cross_validate} parts")
    else:
        found = trained.meta.get("evaluation", {"pairs": {}})
        for line in terminal.sentences(found):
            print(line)
        if arguments.json:
            artifact.save(arguments.json, (json.dumps(found, indent=1) + "\n").encode())
    for line in _to_plug_in(arguments.output, len(content)):
        print(line)
    return 0


def _to_plug_in(path: Path, size: int) -> list[str]:
    """What to write where, to use an artifact."""
    here = path.resolve()
    name = "".join(c if c.isalnum() else "-" for c in path.stem.lower()).strip("-") or "predictor"
    local = f"locally:      predictor: {{type: Learned, artifact: file://{here}}}"
    if size > MAX_CONFIGMAP_BYTES:
        return [
            local,
            "on a cluster: copy it to a volume, then predictor: {type: Learned, artifact: "
            f"pvc://CLAIM/{path.name}}}; --max-bytes 900000 makes one for a ConfigMap",
        ]
    return [
        local,
        f"on a cluster: kubectl create configmap {name} --from-file=artifact={path}; then "
        f"predictor: {{type: Learned, artifact: configmap://{name}/artifact}}",
    ]


def _prices(arguments: argparse.Namespace, tiers: Sequence[str]) -> Any:
    from tandem_router.predictor.errors import DataError
    from tandem_router.predictor.evaluation.costs import Price

    found = {}
    for tier, (input_usd, output_usd) in arguments.price:
        if tier not in tiers:
            raise DataError(
                f"--price names the tier {tier!r}; the data grades {', '.join(tiers) or 'none'}"
            )
        found[tier] = Price(input_usd, output_usd)
    return found


def _evaluate(arguments: argparse.Namespace) -> int:
    from tandem_router.predictor.evaluation import drift
    from tandem_router.predictor.evaluation.predictions import predict_rows
    from tandem_router.predictor.evaluation.report import make_report

    _check_outputs(arguments.json, arguments.html)
    predictor = _load(arguments)
    dataset = _read(arguments.data)
    unknown = [tier for tier in dataset.tiers if tier not in predictor.tiers]
    if unknown:
        _say(f"note: the predictor does not know {', '.join(unknown)}; those grades are not used")
    _say(f"scoring {len(dataset.rows):,} prompts")
    predictions = predict_rows(predictor, dataset)
    _say("judging the predictor beside every simpler method")
    prices = _prices(arguments, dataset.tiers)
    found = make_report(dataset, predictions, repeats=arguments.bootstrap, prices=prices)
    found["artifact"] = {"version": predictor.version, "data": predictor.meta.get("data")}
    if dataset.digest == (predictor.meta.get("data") or {}).get("digest"):
        _say(
            "note: this is the data the predictor was trained on; its numbers here are too good, "
            "so the verdict is the one of its training, on rows left out"
        )
        found["trained_on_this_data"] = True
        _take_verdicts(found, predictor.meta.get("evaluation") or {})
    moved = drift.compare(predictor, [row.prompt for row in dataset.rows if row.captured is None])
    if moved is not None:
        found["drift"] = moved.index
        if moved.shifted:
            _say(f"note: {moved.sentence()}")
    _write(found, arguments, f"predictor {predictor.version}")
    return 0


def _take_verdicts(found: dict[str, Any], trained: dict[str, Any]) -> None:
    """Verdicts of rows left out in place of those of rows learned by heart."""
    for name, pair in found["pairs"].items():
        honest = (trained.get("pairs") or {}).get(name, {})
        for key in ("decision", "routable", "sentence", "evidence", "floors", "beside"):
            pair.pop(key, None)
            if key in honest:
                pair[key] = honest[key]


def _embedding(arguments: argparse.Namespace) -> Any:
    from tandem_router.predictor.reading.embedding import StaticEmbedding

    return StaticEmbedding(arguments.embedding) if arguments.embedding else None


def _load(arguments: argparse.Namespace) -> Any:
    from tandem_router.predictor.runtime import load

    predictor = load(arguments.artifact, _embedding(arguments))
    if predictor.embedding_problem:
        _say(f"note: {predictor.embedding_problem}")
    return predictor


def _check_outputs(*paths: Path | None) -> None:
    """Refuses what could not be written, before minutes of work are lost on it."""
    from tandem_router.predictor.errors import DataError

    for path in paths:
        if path is None:
            continue
        if path.is_dir():
            raise DataError(f"cannot write {path}: it is a directory; name a file in it")
        if not path.parent.is_dir():
            raise DataError(f"the folder {path.parent} does not exist; make it first")
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise DataError(f"cannot write {path}: no permission in {path.parent}; name another")


def _read(paths: list[Path]) -> Any:
    from tandem_router.predictor.records.dataset import read_dataset

    dataset = read_dataset(paths)
    for item in dataset.rejected:
        _say(f"left out {item.line}: {item.reason}")
    return dataset


def _write(found: dict[str, Any], arguments: argparse.Namespace, title: str) -> None:
    from tandem_router.predictor import artifact
    from tandem_router.predictor.evaluation import html_report, terminal

    for line in terminal.lines(found):
        print(line)
    if arguments.json:
        artifact.save(arguments.json, (json.dumps(found, indent=1) + "\n").encode())
    if arguments.html:
        artifact.save(arguments.html, html_report.render(found, title).encode("utf-8", "replace"))


def _quiet(message: str) -> None:
    del message


def _score(arguments: argparse.Namespace) -> int:
    from tandem_router.predictor.records.dataset import read_prompts

    predictor = _load(arguments)
    pairs = [(a, b) for i, a in enumerate(predictor.tiers) for b in predictor.tiers[i + 1 :]]
    for prompt in read_prompts(arguments.file, _say):
        score = predictor.score(prompt)
        line = {
            "quality": {tier: round(value, 6) for tier, value in score.quality.items()},
            "gain": {f"{a} -> {b}": round(score.gain((a, b)), 6) for a, b in pairs},
            "output_tokens": score.output_tokens,
            "mean_tokens": score.mean_tokens,
            "cost_usd": score.cost_usd,
            "out_of_distribution": score.out_of_distribution,
            "version": score.version,
        }
        print(json.dumps(line))
    return 0
