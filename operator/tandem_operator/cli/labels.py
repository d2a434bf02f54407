"""`tandem labels`: what a running Router knows of the quality of its answers, for training.

`export` writes rows that `tandem train` reads; prompts are there where `learning.capture` is
Prompts. `gold` adds what somebody knows for certain, which corrects what judges say.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tandem_operator.cli.errors import CommandError
from tandem_operator.cli.keys import UNITS, action, add_router_options, call
from tandem_operator.resources.base import Object

#: Whose word counts where several judged one request; the last one most.
TRUST = ("feedback", "cascade", "judge", "shadow", "gold")
#: What says how good a tier is beside another, not how good it is.
RELATIVE = "explored"
PAGE = 1_000
GOLD_AT_ONCE = 500


def register(subparsers: Any) -> None:
    """Add the command to the parser."""
    text = "labels of quality of a running Router: export them for training, add gold ones"
    labels = subparsers.add_parser("labels", help=text, description=__doc__.split("\n\n")[0])
    actions = labels.add_subparsers(dest="action", metavar="ACTION", required=True)
    export = action(actions, "export", "write rows that `tandem train` reads")
    export.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="default: standard output"
    )
    export.add_argument(
        "--since", type=_ago, default=0.0, metavar="TIME", help="such as 30d or 12h"
    )
    export.add_argument(
        "--redact",
        metavar="COMMAND",
        help="gets each prompt on standard input, and prints it as it may be kept",
    )
    export.add_argument(
        "--all",
        action="store_true",
        help="every label as it is kept, also those without a prompt, which nothing is trained on",
    )
    gold = action(actions, "gold", "add labels that are known to be right")
    gold.add_argument(
        "file",
        type=Path,
        metavar="FILE",
        help='JSON lines {"request_id", "quality": {TIER: 0..1}, "probability"?}: with which the '
        "request was picked among those that are judged",
    )
    gold.add_argument("--json", action="store_true", help="print what was taken as JSON")
    for parser, run in ((export, _export), (gold, _gold)):
        add_router_options(parser)
        parser.set_defaults(run=run)


def _ago(text: str) -> float:
    try:
        seconds = float(text[:-1]) * UNITS[text[-1:]]
    except (KeyError, ValueError):
        seconds = 0.0
    if not 0 < seconds < 3.2e9:
        raise argparse.ArgumentTypeError(f"{text!r} is no time; use a number and s, m, h or d")
    return max(0.0, time.time() - seconds)


def _pages(args: argparse.Namespace) -> Iterator[Object]:
    since: float | None = args.since
    seen: set[tuple[str, str]] = set()
    while since is not None:
        page = call(args, "GET", f"/admin/labels?since={since!r}&limit={PAGE}")
        for label in page["labels"]:
            if (key := (label["request_id"], label["source"])) not in seen:
                seen.add(key)
                yield label
        since = page.get("next")


def _export(args: argparse.Namespace) -> int:
    labels = list(_pages(args))
    found = labels if args.all else rows(labels)
    if args.redact is not None:
        for row in found:
            if isinstance(row.get("prompt"), str):
                row["prompt"] = _redacted(args.redact, row["prompt"])
    text = "".join(json.dumps(row) + "\n" for row in found)
    if args.output is None:
        sys.stdout.write(text)
    else:
        try:
            args.output.write_text(text, encoding="utf-8")
        except OSError as error:
            raise CommandError(f"{args.output}: {error.strerror}") from error
    where = f" in {args.output}" if args.output is not None else ""
    sys.stderr.write(f"{len(found)} rows of {len(labels)} labels{where}\n")
    if labels and not found:
        sys.stderr.write(
            "none has its prompt or features, so nothing can be trained on them; set "
            "learning.capture: Prompts or Features, or use --all\n"
        )
    return 0


def rows(labels: list[Object]) -> list[Object]:
    """One row of `tandem train` for each request whose prompt is known."""
    by_request: dict[str, list[Object]] = {}
    for label in labels:
        if label["source"] == RELATIVE:
            continue
        by_request.setdefault(label["request_id"], []).append(label)
    found = []
    for request_id, group in by_request.items():
        held = next(
            (
                {name: each[name]}
                for name in ("prompt", "features")
                for each in group
                if each.get(name) is not None
            ),
            None,
        )
        if held is None:
            continue
        quality: dict[str, float] = {}
        for label in sorted(group, key=lambda each: TRUST.index(each["source"])):
            quality |= label["quality"]
        found.append({"id": request_id, **held, "quality": quality})
    return found


def _redacted(command: str, prompt: str) -> str:
    try:
        done = subprocess.run(
            shlex.split(command),
            input=prompt,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise CommandError(f"--redact {command}: {error}; nothing was written") from error
    return done.stdout


def _gold(args: argparse.Namespace) -> int:
    try:
        lines = args.file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"{args.file} cannot be read: {error}") from error
    labels = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            label = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise CommandError(f"{args.file}:{number} is not JSON: {error}") from error
        if not isinstance(label, dict):
            raise CommandError(f"{args.file}:{number} is no object with request_id and quality")
        labels.append(label)
    num_taken, unknown = 0, []
    for start in range(0, len(labels), GOLD_AT_ONCE):
        answer = call(
            args, "POST", "/admin/labels", {"labels": labels[start : start + GOLD_AT_ONCE]}
        )
        num_taken += answer["num_taken"]
        unknown += answer["unknown"]
    told = json.dumps({"num_taken": num_taken, "unknown": unknown})
    sys.stdout.write(f"{told if args.json else f'{num_taken} gold labels taken'}\n")
    if unknown:
        names = ", ".join(unknown[:3])
        sys.stderr.write(f"{len(unknown)} requests are not known here, such as {names}\n")
    return 0 if num_taken or not labels else 1
