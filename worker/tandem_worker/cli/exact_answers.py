"""``tandem exact-answers``: what lossy versions of a model are held against before they serve."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tandem_worker.config import WorkerConfig
from tandem_worker.errors import WorkerError
from tandem_worker.models.exact_answers import MAX_ANSWERS


def register(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "exact-answers",
        help="write a model's exact answers, for lossy versions of it to be held against",
        description="Write what a model answers exactly to stored prompts. Beside the weights of a "
        "lossy version of it, the file is what a worker measures that version's loss on.",
    )
    parser.add_argument("weights", metavar="MODEL", help="model directory with the exact weights")
    parser.add_argument(
        *("-o", "--output"),
        metavar="FILE",
        default="exact_answers.json",
        help="file to write (default: exact_answers.json); put it beside the lossy weights",
    )
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help='JSON lines {"prompt": "..."} such as training data (default: twelve of our own)',
    )
    parser.add_argument(
        "--dtype", default="auto", metavar="TYPE", help="auto, float32, bfloat16 or float16"
    )
    parser.add_argument(
        "--max-tokens", type=int, default=32, metavar="N", help="longest answer, tokens"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Load, answer, write; the exit status."""
    logging.basicConfig(level="WARNING", format="%(levelname)s %(message)s", stream=sys.stderr)
    try:
        print(written(arguments))
    except WorkerError as error:
        print(f"tandem exact-answers: {error}", file=sys.stderr)
        return 1
    return 0


def written(arguments: argparse.Namespace) -> str:
    """Do it, and say what was done."""
    weights, output = Path(arguments.weights), Path(arguments.output)
    if not weights.is_dir():
        raise WorkerError(f"{weights} is not a directory; name a folder with the exact weights")
    if not output.parent.is_dir():
        raise WorkerError(f"{output} cannot be written: {output.parent} is not a directory")
    if not 1 <= arguments.max_tokens <= 4096:
        raise WorkerError(f"--max-tokens {arguments.max_tokens} must be from 1 to 4096")
    texts = None if arguments.prompts is None else read_prompts(Path(arguments.prompts))
    threads = arguments.threads or len(os.sched_getaffinity(0))
    config = WorkerConfig.parse(
        {"served_model": "m", "dtype": arguments.dtype, "num_threads": threads},
        source="tandem exact-answers",
    )
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    from tandem_worker.server.exact_answers import write

    return write(config, weights, output, texts, arguments.max_tokens)


def read_prompts(path: Path) -> Sequence[str]:
    """Texts of a file of JSON lines.

    Raises:
        WorkerError: unreadable, or a line has no prompt.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise WorkerError(f"--prompts {path} cannot be read: {error}") from error
    texts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError, RecursionError):
            prompt = None
        if not isinstance(prompt, str) or not prompt:
            raise WorkerError(f'{path}, line {number}: must be {{"prompt": "some text"}}')
        texts.append(prompt)
    if not 1 <= len(texts) <= MAX_ANSWERS:
        raise WorkerError(f"{path} holds {len(texts)} prompts; give 1 to {MAX_ANSWERS}")
    return texts
