"""The commands ``grade`` and ``verify``; what is heavy is imported when one runs."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from typing import Any

from tandem_router.grading.errors import GradingError
from tandem_router.grading.graders.reference import KINDS
from tandem_router.predictor.errors import PredictorError

GRADERS = ("auto", *KINDS)


def register(subparsers: Any) -> None:
    """Adds the commands to a parser made with ``add_subparsers``."""
    _register_grade(subparsers)
    _register_verify(subparsers)


def _register_grade(subparsers: Any) -> None:
    grade = subparsers.add_parser(
        "grade",
        help="ask every tier each prompt and grade the answers, as `tandem train` reads them",
        description="Ask every tier each prompt, grade the answers, and say what the pair is "
        "worth. PROMPTS is text (one prompt a line), JSON lines, a table (.csv, .tsv) or a chat "
        "log (messages, ShareGPT, OpenAI batch files); - reads standard input. Answers are kept in "
        "OUTPUT.journal as they come: the same command again asks only what is missing.",
    )
    grade.add_argument("prompts", metavar="PROMPTS", help="text, JSON lines, table or chat log")
    grade.add_argument("-o", "--output", required=True, metavar="FILE", help="graded.jsonl.gz")
    who = grade.add_argument_group("whom to ask")
    who.add_argument(
        "--router",
        metavar="FILE|URL",
        help="every tier of a running Router, or of the Router in a YAML file (external tiers at "
        "their own URL, the others through --url)",
    )
    who.add_argument(
        "--url",
        default="http://127.0.0.1:8000/v1",
        metavar="URL",
        help="with --router FILE: where that Router runs (default http://127.0.0.1:8000/v1)",
    )
    who.add_argument(
        "--tier",
        action="append",
        default=[],
        metavar="NAME=URL#MODEL",
        help="an OpenAI-compatible endpoint, the cheapest first and the best last; several",
    )
    who.add_argument(
        "--key",
        action="append",
        default=[],
        metavar="NAME=VARIABLE",
        help="the environment variable with a tier's key (default: OPENAI_API_KEY for "
        "api.openai.com, TANDEM_API_KEY for a Router)",
    )
    who.add_argument(
        "--price",
        action="append",
        default=[],
        metavar="NAME=IN/OUT",
        help="a tier's dollars per million prompt and output tokens, such as small=0.15/0.60",
    )
    how = grade.add_argument_group("how to grade")
    how.add_argument(
        "--grader",
        choices=GRADERS,
        default="auto",
        help="how answers are compared with references; auto decides by what a reference is "
        "(default)",
    )
    how.add_argument(
        "--reference",
        default="reference",
        metavar="COLUMN",
        help="the column with the right answer (default reference)",
    )
    how.add_argument(
        "--judge",
        metavar="URL#MODEL",
        help="a model that compares the answers, in both orders, where there is no reference",
    )
    how.add_argument("--judge-key", metavar="VARIABLE", help="the variable with the judge's key")
    how.add_argument("--judge-price", metavar="IN/OUT", help="dollars per million tokens")
    how.add_argument(
        "--judge-check",
        type=_whole(0),
        default=100,
        metavar="N",
        help="with --judge: rows with a reference that are judged too, to measure the judge "
        "(default 100)",
    )
    how.add_argument(
        "--grade-command",
        metavar="COMMAND",
        help="your own grader: reads the answer on standard input in an empty folder, prints 0 to "
        "1 or exits with 0 (right) or 1 (wrong); TANDEM_REFERENCE, TANDEM_PROMPT and others are "
        "set",
    )
    how.add_argument(
        "--command-timeout", type=_number(0.01), default=10.0, metavar="S", help="default 10"
    )
    how.add_argument(
        "--command-memory", type=_whole(16), default=1024, metavar="MIB", help="default 1024"
    )
    limits = grade.add_argument_group("how much")
    limits.add_argument("--samples", type=_whole(1, 100), default=1, metavar="N", help="per tier")
    limits.add_argument(
        "--max-tokens",
        type=_whole(1),
        metavar="N",
        help="of an answer (default: not sent, each tier's own limit)",
    )
    limits.add_argument(
        "--temperature",
        type=_number(0.0, 2.0),
        metavar="T",
        help="default: not sent, so that each tier answers as it does for users",
    )
    limits.add_argument(
        "--token-statistics",
        action="store_true",
        help="also ask how sure each tier was of its tokens (`logprobs`), for the cascade's "
        "verifier; a tier that tells none is asked without",
    )
    limits.add_argument(
        "--concurrency", type=_whole(1, 1000), default=8, metavar="N", help="questions at a time"
    )
    limits.add_argument(
        "--timeout", type=_number(0.01), default=120.0, metavar="S", help="of one request (120)"
    )
    limits.add_argument(
        "--max-usd",
        type=_number(0.0),
        metavar="USD",
        help="begin no question that could bring the answers and verdicts of all runs over this; "
        "without --max-tokens a longer answer than any before can",
    )
    limits.add_argument("--limit", type=_whole(1), metavar="N", help="only the first N prompts")
    limits.add_argument("--json", action="store_true", help="the summary as JSON")
    grade.set_defaults(run=_guarded("grade_command", "grade"))


def _register_verify(subparsers: Any) -> None:
    verify = subparsers.add_parser(
        "verify",
        help="ask a running Router graded questions and say what it delivered",
        description="Ask a running Router the questions of FILE (as `tandem grade` wrote it) and "
        "say what it delivered: quality, calls and dollars beside all-small and all-large, and "
        "whether the quality floor held. An answer is graded by its reference, or, where a row "
        "has none, as FILE grades the tier that answered.",
    )
    verify.add_argument("file", metavar="FILE", help="as grade wrote it")
    verify.add_argument("--url", required=True, metavar="ROUTER", help="such as http://host:8000")
    verify.add_argument(
        "--floor",
        type=_number(0.0, 1.0),
        metavar="F",
        help="of the best tier's quality (default: the Router's own)",
    )
    verify.add_argument("--key", metavar="VARIABLE", help="the variable with the Router's API key")
    verify.add_argument(
        "--max-tokens",
        type=_whole(1),
        metavar="N",
        help="of an answer (default: not sent, each tier's own limit)",
    )
    verify.add_argument(
        "--concurrency", type=_whole(1, 1000), default=8, metavar="N", help="questions at a time"
    )
    verify.add_argument(
        "--timeout", type=_number(0.01), default=120.0, metavar="S", help="of one request"
    )
    verify.add_argument("--limit", type=_whole(1), metavar="N", help="only the first N questions")
    verify.add_argument("--json", action="store_true", help="the result as JSON")
    verify.set_defaults(run=_guarded("verify_command", "verify"))


def _whole(least: int, most: int | None = None) -> Callable[[str], int]:
    def parse(text: str) -> int:
        number = int(text) if text.lstrip("+-").isdecimal() and len(text) < 12 else None
        if number is None or number < least or (most is not None and number > most):
            upper = f" to {most}" if most is not None else ""
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least}{upper}")
        return number

    return parse


def _number(least: float, most: float = 1e9) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from {least:g} to {most:g}")
        return number

    return parse


def _guarded(module: str, name: str) -> Callable[[argparse.Namespace], int]:
    def run(arguments: argparse.Namespace) -> int:
        import importlib

        command = getattr(importlib.import_module(f"tandem_router.grading.{module}"), name)
        try:
            return int(command(arguments))
        except (GradingError, PredictorError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1

    return run
