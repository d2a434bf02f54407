"""Data as people have it: tables of any delimiter, and the rows of other tools, read or refused."""

from __future__ import annotations

import contextlib
import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem_router.predictor import DataError
from tandem_router.predictor.records import conversation, shapes
from tandem_router.predictor.records.dataset import Dataset, parse, read_dataset, read_prompts

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2 + 2?"},
]


def read(tmp_path: Path, name: str, content: str) -> Dataset:
    path = tmp_path / name
    path.write_text(content)
    return read_dataset([path])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.CSV", "prompt,quality.small,quality.large\np,1,0.5\n"),
        ("rows.tsv", "prompt\tquality.small\tquality.large\np\t1\t0.5\n"),
        ("rows.TSV", "Prompt\tquality.small\tquality.large\np\tTrue\t0.5\n"),
        ("rows.csv", "prompt;quality.small;quality.large\np;1;0,5\n"),
        ("rows.csv", '"Prompt", Quality.small ,quality.large\np,TRUE,0.5\n'),
        ("rows.csv", "\ufeffPROMPT;quality.small;quality.large\np;True;0.5\n"),
        ("rows.json", '[{"prompt": "p", "quality": {"small": true, "large": 0.5}}]'),
        ("rows.json", '{"prompt": "p", "quality": {"small": 1, "large": 0.5}}\n'),
        ("rows.jsonl", '{"Prompt": "p", "quality": {"small": 1, "large": 0.5}}\n'),
    ],
)
def test_a_table_is_read_whatever_its_name_case_delimiter_and_truth(
    tmp_path: Path, name: str, content: str
) -> None:
    found = read(tmp_path, name, content)

    assert [(row.prompt, row.quality) for row in found.rows] == [
        ("p", {"small": 1.0, "large": 0.5})
    ]


@given(
    st.lists(st.tuples(st.text(), st.sampled_from([0.0, 0.25, 1.0])), min_size=1, max_size=5),
    st.sampled_from([(",", "csv"), (";", "csv"), ("\t", "tsv")]),
)
def test_what_a_table_holds_comes_back(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[tuple[str, float]],
    kind: tuple[str, str],
) -> None:
    rows = [(text.replace("\x00", " ").replace("\r", "\n"), grade) for text, grade in rows]
    text = io.StringIO()
    writer = csv.writer(text, delimiter=kind[0], lineterminator="\n")
    writer.writerows([("prompt", "quality.small"), *rows])
    path = tmp_path_factory.mktemp("table") / f"rows.{kind[1]}"
    path.write_bytes(text.getvalue().encode("utf-8", "replace"))

    found = read_dataset([path])

    wanted = [text.encode("utf-8", "replace").decode() for text, _ in rows]
    assert [row.prompt for row in found.rows] == wanted
    assert [row.quality["small"] for row in found.rows] == [grade for _, grade in rows]


def test_routerbench_rows_are_read_with_answers_and_dollars(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        "routerbench.csv",
        "sample_id,prompt,eval_name,gpt-4,mixtral,gpt-4|model_response,mixtral|model_response,"
        "gpt-4|total_cost,mixtral|total_cost,oracle_model_to_route_to\n"
        "a.1,\"['Is it so?']\",mmlu,1.0,0.0,Yes,No,0.002,0.0001,gpt-4\n",
    )

    (row,) = found.rows
    assert row.prompt == "Is it so?"
    assert row.quality == {"gpt-4": 1.0, "mixtral": 0.0}
    assert row.responses == {"gpt-4": "Yes", "mixtral": "No"}
    assert row.cost_usd == {"gpt-4": 0.002, "mixtral": 0.0001}
    assert row.task == "mmlu"


@pytest.mark.parametrize(
    ("winner", "quality"),
    [
        ("model_a", {"x": 1.0, "y": 0.0}),
        ("model_b", {"x": 0.0, "y": 1.0}),
        ("tie", {"x": 1.0, "y": 1.0}),
        ("tie (bothbad)", {"x": 0.0, "y": 0.0}),
    ],
)
def test_an_arena_vote_grades_both_models(
    tmp_path: Path, winner: str, quality: dict[str, float]
) -> None:
    talks = {
        f"conversation_{side}": [*CHAT, {"role": "assistant", "content": answer}]
        for side, answer in (("a", "4"), ("b", "5"))
    }
    vote = {"model_a": "x", "model_b": "y", "winner": winner, **talks}

    (row,) = read(tmp_path, "votes.jsonl", json.dumps(vote)).rows

    assert row.quality == quality
    assert row.prompt == "Be brief.\n\nWhat is 2 + 2?"
    assert row.messages == tuple(CHAT)
    assert row.responses == {"x": "4", "y": "5"}


def test_a_table_of_arena_votes_is_read_with_its_three_columns_of_winners(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        "train.csv",
        "id,model_a,model_b,prompt,response_a,response_b,winner_model_a,winner_model_b,winner_tie\n"
        '1,x,y,"[""Is it?""]","[""yes""]","[""no""]",0,1,0\n',
    )

    (row,) = found.rows
    assert (row.prompt, row.quality) == ("Is it?", {"x": 0.0, "y": 1.0})


def test_rows_of_one_model_each_are_joined_by_their_prompt(tmp_path: Path) -> None:
    log = {"messages": CHAT, "response": {"choices": [{"message": {"content": "4"}}]}}
    rows = [
        {**log, "model": "small", "score": 0, "response_cost": 0.1, "completion_tokens": 3},
        {**log, "model": "large", "score": 1, "response_cost": 0.9, "completion_tokens": 5},
        {**log, "model": "small", "score": 1, "response_cost": 0.1, "completion_tokens": 3},
    ]

    (row,) = read(tmp_path, "log.jsonl", "\n".join(map(json.dumps, rows))).rows

    assert row.quality == {"small": 0.5, "large": 1.0}
    assert row.samples == {"small": (0.0, 1.0)}
    assert row.output_tokens == {"small": 3.0, "large": 5.0}
    assert row.cost_usd == {"small": 0.1, "large": 0.9}
    assert row.responses == {"small": "4", "large": "4"}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": CHAT},
        {"messages": [*CHAT, {"role": "assistant", "content": "4"}]},
        {"conversations": [{"from": "human", "value": "What is 2 + 2?"}]},
        {
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": "What is 2 + 2?"},
                {"from": "gpt", "value": "4"},
            ]
        },
    ],
)
def test_a_conversation_is_scored_as_the_router_scores_it(
    tmp_path: Path, row: dict[str, Any]
) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({**row, "quality": {"small": 1}}))

    (found,) = read_dataset([path]).rows

    assert found.prompt.endswith("What is 2 + 2?")
    assert found.prompt == conversation.scored_text(found.messages)
    assert found.messages[-1]["role"] == "user"
    assert list(read_prompts(str(path))) == [found.prompt]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"question": "p", "quality": {"small": 1}},
            r"its columns are question, quality: rename `question` to `prompt`",
        ),
        ({"promt": "p", "quality": {"small": 1}}, r"is `promt` the prompt\? rename it"),
        ({"a": 1, "b": 2}, r'its columns are a, b; the nearest right form is \{"prompt"'),
        ({"prompt": "p", "quality_small": 1}, r"rename the column `quality_small` to `quality.sma"),
        (
            {"model": "gpt-4", "messages": CHAT, "response": "4", "spend": 0.1},
            "a logged answer of gpt-4, not a grade; `tandem grade`",
        ),
        ({"model_a": "x", "model_b": "y", "winner": "z"}, "`winner` is 'z'; a vote names"),
        ({"model_a": "x", "model_b": "x", "winner": "tie"}, "a vote between x and itself"),
        ({"messages": "hello", "quality": {"s": 1}}, "`messages` is text, not a list"),
        ({"messages": [], "quality": {"s": 1}}, "`messages` is not a list of messages"),
        ({"messages": [7], "quality": {"s": 1}}, r"`messages\[0\]` is not an object"),
        ({"conversations": [{"from": "cat", "value": "x"}]}, "from 'cat'; known are human and gpt"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "holds answers only"),
        ({"prompt": "p", "quality": {"s": 1}, "cost_usd": {"s": -1}}, r"cost_usd.s=-1 is not betw"),
    ],
)
def test_what_cannot_be_read_names_its_columns_and_the_nearest_right_form(
    tmp_path: Path, row: dict[str, Any], reason: str
) -> None:
    with pytest.raises(DataError, match=reason):
        read(tmp_path, "rows.jsonl", json.dumps(row))


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


@given(
    st.dictionaries(
        st.sampled_from(
            "prompt messages conversations quality body model model_a model_b winner conversation_a"
            " conversation_b response_a response_b response score x|total_cost custom_id".split()
        ),
        JSON,
    )
)
def test_any_values_under_known_names_are_a_row_or_one_sentence(record: dict[str, Any]) -> None:
    with contextlib.suppress(DataError):
        parse(shapes.ours(record))


@given(st.lists(st.sampled_from(["system", "user", "assistant", "tool"]), max_size=6))
def test_what_is_asked_never_ends_with_an_answer(roles: list[str]) -> None:
    messages = [{"role": role, "content": str(index)} for index, role in enumerate(roles)]

    asked = conversation.asked(messages)

    assert not asked or asked[-1]["role"] != "assistant"
    assert list(asked) == messages[: len(asked)]
