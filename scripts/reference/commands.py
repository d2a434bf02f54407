"""The page of every command and option, read from the parsers themselves."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator

from reference.markdown import HEAD, cell, code, table


def page() -> str:
    """Every command, its arguments and options."""
    out = [
        HEAD + "# Commands\n",
        "`tandem COMMAND --help` prints the same. The exit status is 0 when done, 1 when it failed "
        "with a sentence, 2 for wrong usage, 130 after Ctrl-C.\n",
    ]
    for parser in parsers():
        out += list(_section(parser))
    return "\n".join(out)


def parsers() -> Iterator[argparse.ArgumentParser]:
    """Of every command of the three programs, in the order of the page."""
    from tandem_operator.cli import build_parser
    from tandem_operator.kube.operator import build_parser as operator_parser
    from tandem_router.__main__ import build_parser as router_parser
    from tandem_worker.cli import build_parser as worker_parser

    top = build_parser()
    yield top
    for _, sub in sorted(children(top)):
        yield sub
        for _, inner in sorted(children(sub)):
            yield inner
    yield router_parser()
    yield worker_parser()
    yield operator_parser()


def children(parser: argparse.ArgumentParser) -> list[tuple[str, argparse.ArgumentParser]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return list(action.choices.items())
    return []


def _section(parser: argparse.ArgumentParser) -> Iterator[str]:
    depth = "##" if len(parser.prog.split()) <= 2 else "###"
    yield f"{depth} {parser.prog}\n"
    if parser.description:
        text = " ".join(parser.description.split())
        yield cell(text[0].upper() + text[1:] + ("" if text.endswith(".") else ".")) + "\n"
    rows = [_row(action) for action in options(parser)]
    if rows:
        yield table(("option", "default", "meaning"), rows)


def options(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Arguments and options of a command; not --help, and not its own commands."""
    left_out = (argparse._HelpAction, argparse._SubParsersAction)
    return [action for action in parser._actions if not isinstance(action, left_out)]


def _row(action: argparse.Action) -> tuple[str, str, str]:
    value = action.metavar or action.dest.upper().replace("_", "-")
    if isinstance(value, tuple):
        value = " ".join(value)
    if action.choices is not None:
        value = ",".join(map(str, action.choices))
    if action.option_strings:
        takes = action.nargs != 0
        name = ", ".join(action.option_strings) + (f" {value}" if takes else "")
    else:
        name = str(action.metavar or action.dest)
        if action.nargs in ("?", "*"):
            name = f"[{name}]"
        if action.choices is not None:
            name += f": {value}"
    default = action.default
    if action.required and action.option_strings:
        shown = "required"
    elif default in (None, False, argparse.SUPPRESS, "", []) or action.nargs == 0:
        shown = ""
    else:
        shown = code(default)
    said = re.sub(r"\s*\(default[^)]*\)", "", _help(action)) if shown else _help(action)
    return code(name), shown, cell(said)


def _help(action: argparse.Action) -> str:
    text = action.help or ""
    values = {**vars(action), "prog": "tandem"}
    return (text % values) if "%" in text else text
