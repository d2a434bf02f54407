"""The commands ``train``, ``evaluate`` and ``score``; everything heavy is imported when one runs."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from tandem_router.predictor.errors import PredictorError


def register(subparsers: Any) -> None:
    """Adds the predictor's commands to a parser made with ``add_subparsers``."""
    train = subparsers.add_parser(
        "train",
        help="learn from graded answers which tier a prompt needs",
        description="Learn from graded answers (JSON lines, gzipped or not, or CSV) which tier a "
        "prompt needs, and write a predictor artifact.",
    )
    train.add_argument("data", nargs="+", type=Path, metavar="DATA", help="graded answers")
    train.add_argument("-o", "--output", type=Path, required=True, metavar="ARTIFACT")
    train.add_argument("--seed", type=int, default=0, help="same seed, same bytes (default 0)")
    train.add_argument(
        "--labels",
        choices=("gain", "deterministic", "probabilistic", "transformed"),
        default="gain",
        help="what the ranking learns: the gain, or a label form of Hybrid LLM",
    )
    train.add_argument(
        "--max-features",
        type=int,
        default=60_000,
        metavar="N",
        help="n-grams kept per text view; lower it for a smaller artifact (default 60000)",
    )
    train.add_argument("--quiet", action="store_true", help="no progress on standard error")
    train.set_defaults(run=_guarded(_train))
    score = subparsers.add_parser(
        "score",
        help="score prompts with an artifact",
        description="Write one JSON line per prompt, in order. FILE holds JSON lines with a "
        "`prompt`, JSON strings, or plain text, one prompt a line; - reads standard input.",
    )
    score.add_argument("artifact", type=Path, metavar="ARTIFACT")
    score.add_argument("file", metavar="FILE")
    score.set_defaults(run=_guarded(_score))


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
    from tandem_router.predictor import artifact, data, training

    dataset = data.read(arguments.data)
    for item in dataset.rejected:
        _say(f"left out {item.line}: {item.reason}")
    options = training.Options(
        seed=arguments.seed, label_form=arguments.labels, max_features=arguments.max_features
    )
    trained = training.train(
        dataset, options, (lambda _: None) if arguments.quiet else _say
    )
    content = trained.dumps()
    artifact.save(arguments.output, content)
    print(f"wrote {arguments.output} ({len(content):,} bytes)")
    return 0


def _score(arguments: argparse.Namespace) -> int:
    from tandem_router.predictor.runtime import load

    predictor = load(arguments.artifact)
    pairs = [(a, b) for i, a in enumerate(predictor.tiers) for b in predictor.tiers[i + 1 :]]
    for prompt in _prompts(arguments.file):
        score = predictor.score(prompt)
        line = {
            "quality": {tier: round(value, 6) for tier, value in score.quality.items()},
            "gain": {f"{a} -> {b}": round(score.gain((a, b)), 6) for a, b in pairs},
            "output_tokens": score.output_tokens,
            "out_of_distribution": score.out_of_distribution,
            "version": score.version,
        }
        print(json.dumps(line))
    return 0


def _prompts(name: str) -> Any:
    from tandem_router.predictor.errors import DataError

    try:
        stream = sys.stdin.buffer if name == "-" else Path(name).open("rb")
    except OSError as error:
        raise DataError(f"cannot read {name}: {error.strerror}") from error
    with stream:
        for raw in stream:
            line = raw.decode("utf-8", "replace").rstrip("\r\n")
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                value = line
            prompt = value.get("prompt") if isinstance(value, dict) else value
            yield prompt if isinstance(prompt, str) else line
