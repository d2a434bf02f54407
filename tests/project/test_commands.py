"""Every `tandem` command tells a program what it tells a person, or says why it need not."""

from __future__ import annotations

import argparse
import ast
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from reference import commands  # noqa: E402

from tandem_operator.cli import main  # noqa: E402

#: Without --json, and why.
NOTHING_TO_PARSE = {
    "up": "runs until Ctrl-C; `tandem get --json` says how things stand, --once its end",
    "logs": "prints what a process wrote, as it is (spec.logFormat: json makes that JSON)",
    "apply": "a line KIND/NAME and a word for each object, as kubectl prints it",
    "delete": "the same",
    "scale": "the same",
    "score": "writes JSON lines always",
    "labels export": "the same",
    "profile": "-o writes the profile, which is JSON",
    "init": "writes YAML",
    "completion": "writes a script",
    "serve": "a server",
    "exact-answers": "-o writes the answers, which are JSON",
}
#: What commands call the options they were given.
ARGUMENTS = {"args", "arguments"}
#: Read by a name that is put together: a tier's, a limit's.
READ_BY_NAME = {"small", "small_price", "large", "large_price"} | {
    "max_concurrency",
    "requests_per_minute",
    "tokens_per_minute",
}


@cache
def leaves() -> dict[str, argparse.ArgumentParser]:
    """Every command that does something, by what is typed after `tandem`."""
    found = [p for p in commands.parsers() if p.prog.startswith("tandem ")]
    return {p.prog.removeprefix("tandem "): p for p in found if not commands.children(p)}


def test_whatever_a_person_would_parse_is_there_as_json() -> None:
    with_json = {n for n, p in leaves().items() if "--json" in p._option_string_actions}

    assert len(leaves()) > 25
    assert leaves().keys() - with_json == NOTHING_TO_PARSE.keys()


def test_a_command_says_what_it_is_for_and_an_option_which_form_its_value_has() -> None:
    wrong = []
    for name, parser in leaves().items():
        said = " ".join((parser.description or "").split())
        if not (said[:1].isupper() or said.startswith("`tandem")) or not said.endswith("."):
            wrong.append(f"tandem {name} is described as {said!r}")
        for action in parser._actions:
            takes = action.option_strings and action.nargs != 0 and action.choices is None
            if takes and not action.metavar:
                wrong.append(f"tandem {name} {action.option_strings[-1]} has no metavar")

    assert wrong == []


@pytest.mark.parametrize(
    "line",
    ["init --small hf://a/b --large hf://c/d -o {nowhere}/chat.yaml", "apply {nowhere}/x.yaml"],
)
def test_a_file_that_cannot_be_written_or_read_is_a_sentence(
    line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = line.format(nowhere=tmp_path / "nowhere").split()

    assert main(words) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"tandem {words[0]}: ")
    assert "nowhere" in said
    assert "Traceback" not in said


def _read_attributes() -> set[str]:
    """Every `something.name` that the three programs and their commands read."""
    return {
        node.attr
        for package in ("operator", "router", "worker")
        for path in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Load)
        and isinstance(node.value, ast.Name)
        and node.value.id in ARGUMENTS
    }


def _unread(parsers: list[argparse.ArgumentParser], read: set[str]) -> list[str]:
    return [
        f"{parser.prog} {action.dest}"
        for parser in parsers
        for action in parser._actions
        if action.dest not in {*read, "help", "version", "==SUPPRESS=="}
        and not isinstance(action.choices, dict)  # one that names commands
    ]


def test_every_option_of_every_program_is_read() -> None:
    """An option that nobody reads would be taken, shown by --help, and do nothing."""
    assert _unread(list(commands.parsers()), _read_attributes() | READ_BY_NAME) == []


def test_an_option_that_nobody_reads_is_found() -> None:
    planted = argparse.ArgumentParser(prog="planted")
    planted.add_argument("--wired-to-nothing")

    assert _unread([planted], _read_attributes()) == ["planted wired_to_nothing"]
