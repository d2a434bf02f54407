"""How rows of other tools become ours: RouterBench, arena votes, litellm's log, ShareGPT, batches.

:func:`ours` returns a row with our names, or raises a DataError that lists the columns found and
the nearest right form. Nothing here guesses a grade: a vote and a score are grades, a logged
answer is none.
"""

from __future__ import annotations

import ast
import difflib
import json
from typing import Any

from tandem_router.predictor.errors import DataError
from tandem_router.predictor.records import conversation

Record = dict[str, Any]

#: What people call a prompt elsewhere: named in a refusal, never guessed.
_PROMPTS = ("question", "query", "instruction", "input", "text", "user", "content", "problem")
_SCORES = ("score", "rating", "grade", "correct", "is_correct", "label")
_TRUTH = {"true": 1.0, "false": 0.0}
#: Why a row that is nothing but a prompt cannot be learned from.
UNGRADED = 'has no label under `quality`, like {"small": 1, "large": 0.5}'
FORM = '{"prompt": "...", "quality": {"small": 1, "large": 0.5}}, or columns prompt, quality.small'


def ours(record: Record) -> Record:
    """The record with our names where it is a shape we know; else as it is."""
    if "prompt" not in record and "messages" not in record:
        record = _with_known_case(record)
    if any(key.endswith(("|model_response", "|total_cost")) for key in record):
        return _routerbench(record)
    if {"model_a", "model_b"} <= record.keys():
        return _arena(record)
    if isinstance(record.get("body"), dict):
        return _batch(record)
    if "conversations" in record:
        return _conversation(record, "conversations")
    if record.get("messages") is not None:
        return _conversation(record, "messages")
    return _one_model(record)


def refuse(record: Record) -> DataError:
    """Why a record without a prompt cannot be used: its columns, and the nearest right form."""
    if "prompt" in record:
        return DataError("has no text under `prompt`")
    names = [str(name) for name in record]
    shown = ", ".join(name[:40] for name in names[:12]) + (", ..." if len(names) > 12 else "")
    for name in names:
        if name.lower() in _PROMPTS:
            return DataError(
                f"has no text under `prompt`; its columns are {shown}: rename `{name}` to `prompt`"
            )
    close = difflib.get_close_matches("prompt", [name.lower() for name in names], n=1)
    if close:
        return DataError(
            f"has no text under `prompt`; its columns are {shown}: is `{close[0]}` the prompt? "
            "rename it"
        )
    found = f"its columns are {shown}; " if names else ""
    return DataError(f"has no text under `prompt`; {found}the nearest right form is {FORM}")


def no_grade(record: Record) -> DataError:
    """Why a record without a grade cannot be learned from, and what would make it one."""
    plain = UNGRADED
    if record.get("logged"):
        return DataError(
            f"{plain}: it is a logged answer of {record['logged']}, not a grade; `tandem grade` "
            "asks the tiers the same prompts and grades them"
        )
    flat = [
        name
        for name in record
        if isinstance(name, str)
        and name.lower() != "quality"
        and (name.lower().startswith(("quality", "score")) or name.lower().endswith("quality"))
    ]
    if flat:
        tier = flat[0].lower().replace("quality", "").replace("score", "").strip("_- .:") or "tier"
        return DataError(f"{plain}; rename the column `{flat[0]}` to `quality.{tier}`")
    return DataError(plain)


def _with_known_case(record: Record) -> Record:
    """`Prompt` and `MESSAGES` are ours too, in JSON as in a table."""
    known = ("prompt", "messages", "conversations")
    return {
        name.lower() if isinstance(name, str) and name.lower() in known else name: value
        for name, value in record.items()
    }


def _routerbench(record: Record) -> Record:
    """Columns `MODEL`, `MODEL|model_response`, `MODEL|total_cost` (withmartian/routerbench)."""
    models = dict.fromkeys(name.rpartition("|")[0] for name in record if "|" in str(name))
    row: Record = {"prompt": _first_text(record.get("prompt")), "quality": {}}
    for model in models:
        for name, column in (
            ("quality", model),
            ("responses", f"{model}|model_response"),
            ("cost_usd", f"{model}|total_cost"),
        ):
            value = record.get(column)
            if value not in (None, ""):
                text = name == "responses"
                row.setdefault(name, {})[model] = str(value) if text else _as_number(value)
    if record.get("eval_name"):
        row["task"] = record["eval_name"]
    return row


def _first_text(value: Any) -> Any:
    """RouterBench holds prompts as the text of a list with one or more texts."""
    if isinstance(value, str) and value[:2] in ("['", '["') and value.endswith("]"):
        try:
            parts = ast.literal_eval(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return value
        if isinstance(parts, list) and all(isinstance(part, str) for part in parts):
            return "\n".join(parts)
    return value


def _arena(record: Record) -> Record:
    """A vote between two models (LMSYS arena): the winner 1, the loser 0, a tie 1 and 1.

    Of a conversation with several turns only the last answer is taken as graded: the turns before
    it are what was asked.
    """
    first, second = str(record["model_a"]), str(record["model_b"])
    quality = _vote(record)
    if first == second:
        raise DataError(f"is a vote between {first} and itself")
    row: Record = {"quality": dict(zip((first, second), quality, strict=True))}
    if "conversation_a" in record:
        talks = [
            conversation.parse(record.get(name), name)
            for name in ("conversation_a", "conversation_b")
        ]
        row["messages"] = list(conversation.asked(talks[0]))
        answers = [conversation.answer(talk) for talk in talks]
    else:
        row["prompt"] = "\n".join(_texts(record.get("prompt")))
        answers = ["\n".join(_texts(record.get(name))) for name in ("response_a", "response_b")]
    row["responses"] = {
        model: text for model, text in zip((first, second), answers, strict=True) if text
    }
    if record.get("language"):
        row["task"] = record["language"]
    return row


def _vote(record: Record) -> tuple[float, float]:
    winner = record.get("winner")
    if winner is None:
        flags = [str(record.get(f"winner_{name}", "")).strip() for name in ("model_a", "model_b")]
        winner = next(
            (name for name, flag in zip(("model_a", "model_b"), flags, strict=True) if flag == "1"),
            "tie" if str(record.get("winner_tie", "")).strip() == "1" else None,
        )
    known = {"model_a": (1.0, 0.0), "model_b": (0.0, 1.0), "tie": (1.0, 1.0), "both": (1.0, 1.0)}
    bad = {"tie (bothbad)": (0.0, 0.0), "bothbad": (0.0, 0.0)}
    found = {**known, **bad}.get(str(winner).strip().lower())
    if found is None:
        raise DataError(
            f"`winner` is {str(winner)[:40]!r}; a vote names model_a, model_b, tie or tie (bothbad)"
        )
    return found


def _texts(value: Any) -> list[str]:
    """A text, or the texts of a JSON list of them (null: none)."""
    if isinstance(value, str) and value.startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return [str(value)]
    if isinstance(value, list):
        return [part for part in value if isinstance(part, str)]
    return [value] if isinstance(value, str) else []


def _batch(record: Record) -> Record:
    """A line of an OpenAI batch file: what is asked stands under `body`."""
    body = record["body"]
    row = {name: value for name, value in record.items() if name not in ("body", "method", "url")}
    if "custom_id" in row:
        row["id"] = row.pop("custom_id")
    if body.get("messages") is not None:
        return {**row, "messages": list(conversation.asked(conversation.parse(body["messages"])))}
    return {**row, "prompt": body.get("prompt", body.get("input"))}


def _conversation(record: Record, name: str) -> Record:
    """A chat log; the answers at its end are a logged model's, not part of the question."""
    messages = conversation.parse(record[name], name)
    asked = conversation.asked(messages)
    if not asked:
        raise DataError(f"`{name}` holds answers only; a question ends with the user's message")
    row = {key: value for key, value in record.items() if key != name}
    row["messages"] = list(asked)
    return _one_model(row)


def _one_model(record: Record) -> Record:
    """A row that speaks of one model: a score makes it a grade, a bare answer (a log) does not."""
    model = record.get("model")
    if not isinstance(model, str) or not model or isinstance(record.get("quality"), dict):
        return record
    name = "quality" if record.get("quality") is not None else None
    name = name or next((each for each in _SCORES if record.get(each) is not None), None)
    if name is None:
        answered = any(key in record for key in ("response", "choices", "response_cost", "spend"))
        return {**record, "logged": model} if answered else record
    row = {key: value for key, value in record.items() if key not in ("model", name)}
    row["quality"] = {model: _as_number(record[name])}
    row["one_of_several"] = True
    for ours_name, theirs in (
        ("output_tokens", ("completion_tokens", "output_tokens")),
        ("cost_usd", ("response_cost", "spend", "cost", "cost_usd")),
    ):
        value = next((record[each] for each in theirs if record.get(each) not in (None, "")), None)
        if value is not None and not isinstance(value, dict):
            row[ours_name] = {model: _as_number(value)}
    text = _answer_text(record.get("response"))
    if text:
        row["responses"] = {model: text}
    return row


def _answer_text(response: Any) -> str:
    if isinstance(response, str):
        return response
    try:
        return conversation.content_text(response["choices"][0]["message"]["content"])
    except (TypeError, KeyError, IndexError):
        return ""


def _as_number(value: Any) -> Any:
    """A cell's number where it is one; what is none is left to the check that names it."""
    if not isinstance(value, str):
        return value
    truth = _TRUTH.get(value.strip().lower())
    if truth is not None:
        return truth
    try:
        return float(value)
    except ValueError:
        return value
