"""Prompts are read from text, JSON lines, tables and chat logs; a question's key is its own."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem_router.grading import prompts
from tandem_router.grading.errors import GradingError

Write = Callable[..., Path]
ASKED = ({"role": "user", "content": "2 + 2?"},)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.txt", "2 + 2?\n"),
        ("p", "\ufeff2 + 2?\n\n"),
        ("p.txt", "\n2 + 2?"),
        ("p.jsonl", '"2 + 2?"\n'),
        ("p.jsonl", '{"prompt": "2 + 2?"}\n'),
        ("p.jsonl", '\ufeff{"Prompt": "2 + 2?"}\n'),
        ("p.json", '[{"prompt": "2 + 2?"}]'),
        ("p.csv", "Prompt;task\n2 + 2?;t\n"),
        ("p.TSV", "task\tprompt\nt\t2 + 2?\n"),
        ("p.jsonl", '{"messages": [{"role": "user", "content": "2 + 2?"}]}'),
        ("p.jsonl", '[{"role": "user", "content": "2 + 2?"}]'),
        (
            "p.jsonl",
            '{"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", '
            '"value": "4"}]}',
        ),
        (
            "p.jsonl",
            '{"custom_id": "r-1", "method": "POST", "url": "/v1/chat/completions", "body": '
            '{"model": "m", "messages": [{"role": "user", "content": "2 + 2?"}]}}',
        ),
        (
            "p.csv",
            'model_a,model_b,prompt,response_a,response_b,winner\nx,y,"[""2 + 2?""]",4,5,tie\n',
        ),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_prompts_are_read_from_what_people_have(
    tmp_path: Path, name: str, content: str, packed: bool
) -> None:
    path = tmp_path / (f"{name}.gz" if packed else name)
    path.write_bytes(gzip.compress(content.encode()) if packed else content.encode())

    (question,) = prompts.read(str(path)).items

    assert question.messages == ASKED
    assert question.text() == "2 + 2?"


@given(
    st.lists(
        st.text(alphabet=st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"])), min_size=1
    )
)
def test_every_line_of_text_is_a_prompt(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str]
) -> None:
    path = tmp_path_factory.mktemp("text") / "prompts.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    # White space that the file's format knows; other blanks of Unicode are a prompt's own.
    wanted = [line for line in lines if line.strip("\ufeff \t")]

    try:
        found = [q.prompt for q in prompts.read(str(path)).items]
    except GradingError as error:
        assert "holds no prompts" in str(error) and not wanted  # noqa: PT017, PT018
        return

    assert [text.removeprefix("\ufeff") for text in found if text] == [
        text.removeprefix("\ufeff") for text in wanted
    ]


@given(st.lists(st.dictionaries(st.sampled_from(["prompt", "id", "messages", "reference", "grader",
       "conversations", "body"]), st.none() | st.text(max_size=3) | st.integers() |
       st.lists(st.integers(), max_size=2)), max_size=4))  # fmt: skip
def test_any_rows_are_questions_with_keys_of_their_own_or_one_sentence(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]
) -> None:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    try:
        found = prompts.read(str(path)).items
    except GradingError:
        return

    assert len({question.key for question in found}) == len(found)
    assert all(question.messages for question in found)


def test_equal_prompts_without_ids_are_asked_each_and_keep_their_keys(write: Write) -> None:
    first = [q.key for q in prompts.read(str(write([{"prompt": "p"}, {"prompt": "p"}]))).items]
    later = [q.key for q in prompts.read(str(write([{"prompt": "q"}, {"prompt": "p"}] * 2))).items]

    assert len(set(first)) == 2
    assert set(first) < set(later)


def test_one_bad_row_in_many_is_left_out_by_line(write: Write) -> None:
    rows = [{"prompt": f"p{i}"} for i in range(150)]
    rows[70] = {"prompt": ""}

    found = prompts.read(str(write(rows)))

    assert len(found.items) == 149
    assert found.rejected == (("prompts.jsonl:71", "has an empty prompt"),)


def test_a_conversation_is_shown_to_a_judge_with_its_speakers(write: Write) -> None:
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "2 + 2?"}]},
    ]

    (question,) = prompts.read(str(write([{"messages": talk}]))).items

    assert question.text() == "system: Be brief.\n\nuser: 2 + 2?"


def test_a_column_of_any_name_can_be_the_reference(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text("prompt,gold\n2 + 2?,4\n3 + 3?,\n")

    found = prompts.read(str(path), reference="gold").items

    assert [question.reference for question in found] == ["4", None]
    assert [q.prompt for q in prompts.read(str(path), limit=1).items] == ["2 + 2?"]
