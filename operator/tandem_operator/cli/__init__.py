"""The `tandem` command. Each subcommand is imported only when it is used."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence

# Subcommands that other parts bring: their module's register(subparsers) adds them.
_PLUGINS = {
    ("train", "evaluate", "score"): "tandem_router.predictor.cli",
    ("grade", "verify"): "tandem_router.grading.cli",
    ("serve",): "tandem_worker.cli.serve",
    ("exact-answers",): "tandem_worker.cli.exact_answers",
    ("demo",): "tandem_operator.demo.run",
    ("keys",): "tandem_operator.cli.keys",
    ("labels",): "tandem_operator.cli.labels",
    ("simulate",): "tandem_operator.cli.simulate",
    ("profile",): "tandem_operator.cli.profile",
    ("init",): "tandem_operator.cli.init",
    ("plan",): "tandem_operator.cli.plan",
    ("explain",): "tandem_operator.cli.explain",
    ("completion",): "tandem_operator.cli.completion",
}


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser; for a known command only the modules that it needs are imported."""
    from tandem_operator.cli import commands

    parser = argparse.ArgumentParser(
        prog="tandem",
        description="Serve a small and a large language model behind one endpoint.",
        epilog="`tandem COMMAND --help` explains a command, `tandem explain router.spec.budget` a "
        "field, `tandem explain Degraded` a word of a status or an error.",
    )
    parser.add_argument("--version", action="version", version=f"tandem {version()}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.register(subparsers)
    core = set(subparsers.choices)
    for names, module in _PLUGINS.items():
        if command in core or (command is not None and command not in names and _brought(command)):
            continue
        if _exists(module):
            importlib.import_module(module).register(subparsers)
    return parser


def version() -> str:
    """The version of the installed distribution."""
    from importlib import metadata

    try:
        return metadata.version("tandem")
    except metadata.PackageNotFoundError:
        return "(not installed: run from a source tree)"


def _names_only() -> argparse.ArgumentParser:
    """A parser that knows the commands by name only, for completing the first word."""
    from tandem_operator.cli import commands

    parser = argparse.ArgumentParser(prog="tandem")
    parser.add_argument("--version", action="store_true")
    subparsers = parser.add_subparsers()
    commands.register(subparsers)
    for names, module in _PLUGINS.items():
        for name in names if _exists(module) else ():
            subparsers.add_parser(name)
    return parser


def _brought(command: str) -> bool:
    return any(command in names for names in _PLUGINS)


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status: 0 done, 1 failed with a sentence, 2 wrong usage."""
    from tandem_operator.cli.errors import CommandError

    if "_ARGCOMPLETE" in os.environ and argv is None:
        from tandem_operator.cli import completion

        typed = completion.typed_command(os.environ.get("COMP_LINE", ""))
        completion.complete(build_parser(typed) if typed else _names_only())
    args = list(sys.argv[1:] if argv is None else argv)
    command = next((a for a in args if not a.startswith("-")), None)
    parser = build_parser(command)
    parsed = parser.parse_args(args)
    if parsed.command is None:
        parser.print_help()
        return 2
    try:
        return int(parsed.run(parsed) or 0)
    except CommandError as error:
        sys.stderr.write(f"tandem {parsed.command}: {error}\n")
        return 1
    except KeyboardInterrupt:
        return 130
    except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError) as error:
        # A file that the user named and that can only be told when it is written.
        sys.stderr.write(f"tandem {parsed.command}: {error.filename}: {error.strerror}\n")
        return 1
    except BrokenPipeError:
        # The reader, such as `head`, has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    raise SystemExit(main())
