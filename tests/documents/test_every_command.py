"""No command and no YAML of getting started and the task pages is run by nobody, or unexplained.

A new page is walked as soon as it is there: what stands on it is run by test_tasks.py and by
tests/controlplane/test_documents.py, or this says what is missing.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from document_kit import (
    DOCS,
    EXAMPLES,
    GETTING_STARTED,
    NOT_RUN,
    ROOT,
    STARTED_ELSEWHERE,
    TASKS,
    blocks,
    commands,
    example_of,
    here,
    run_by,
)
from tandem_operator.cli import build_parser

PAGES = [GETTING_STARTED, *TASKS]
#: Blocks that show what is printed or sent: nothing to type.
SHOWN = {"text", "json"}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_every_line_that_is_typed_has_somebody_who_runs_it(page: Path) -> None:
    unknown = [line for line, who in run_by(page) if not who]

    assert unknown == [], "see run_by in document_kit.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_every_block_is_read(page: Path) -> None:
    """Indented or nameless ones would be passed over; a console block has something to type."""
    found = blocks(page)

    assert 2 * len(found) == len(re.findall(r"^ *```", page.read_text(), re.M))
    assert {b.language for b in found} <= {"console", "yaml", *SHOWN}
    assert [b.text for b in found if b.language == "console" and not b.commands()] == []


@pytest.mark.parametrize("page", TASKS, ids=lambda p: p.stem)
def test_the_yaml_of_a_task_page_is_a_whole_example(page: Path) -> None:
    shown = [b.text.strip() for b in blocks(page) if b.language == "yaml"]

    folder = example_of(page).parent
    assert f'--8<-- "{example_of(page).relative_to(ROOT)}"' in shown
    assert set(shown) <= {f'--8<-- "{p.relative_to(ROOT)}"' for p in folder.glob("*.yaml")}


def test_what_needs_a_cluster_has_no_lines_that_need_tandem_up() -> None:
    """test_tasks.py types a page's lines beside its example: where it starts none, nobody would."""
    others = [p for p in TASKS if example_of(p).parent.name in STARTED_ELSEWHERE]

    assert {p.name: here(p) for p in others if here(p)} == {}


def test_the_exceptions_are_few_and_each_is_needed() -> None:
    lines = [line for page in PAGES for line in commands(page)]

    assert len(NOT_RUN) <= 5
    for start, why in NOT_RUN.items():
        assert any(line.startswith(start) for line in lines), f"{start!r} is typed nowhere"
        assert why
    assert STARTED_ELSEWHERE.keys() <= {e.name for e in EXAMPLES}


def test_a_command_within_a_sentence_is_one_that_there_is() -> None:
    """In all pages: `tandem ...` in the text has a command's name and its options."""
    parser = build_parser()
    subcommands = next(a for a in parser._actions if a.dest == "command").choices
    wrong = []
    for page in [*DOCS.glob("*.md"), *TASKS, ROOT / "README.md"]:
        for text in re.findall(r"`(tandem [a-z][^`\n]*)`", page.read_text()):
            words = shlex.split(text.replace("'", ""), comments=True)[1:]
            known = subcommands.get(words[0])
            if known is None:
                wrong.append(f"{page.name}: {text}")
                continue
            inner = next((a.choices for a in known._actions if a.dest == "action"), None)
            if inner is not None and words[1:2] and words[1] in inner:
                known = inner[words[1]]
            options = {w.split("=")[0] for w in words if w.startswith("-") and w != "-"}
            wrong += [
                f"{page.name}: {text}: {option}"
                for option in sorted(options - set(known._option_string_actions))
            ]

    assert wrong == []
