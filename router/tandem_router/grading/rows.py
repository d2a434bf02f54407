"""How answers become graded rows, as `tandem train` reads them, and what could not be graded."""

from __future__ import annotations

import gzip
import io
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tandem_router.grading.errors import GradingError
from tandem_router.grading.graders import judge as judging
from tandem_router.grading.graders import reference as references
from tandem_router.grading.graders.agreement import Compared
from tandem_router.grading.journal import Journal, verdict_key
from tandem_router.grading.prompts import Question
from tandem_router.grading.runner import ORDERS

#: Grades of the user's command: (question, tier, sample) -> grade, or the reason for none.
CommandGrades = Mapping[tuple[str, str, int], float | str]


@dataclass(slots=True)
class Graded:
    """Rows, by what they were graded, and what was left out and why."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    by: Counter[str] = field(default_factory=Counter)
    ungraded: Counter[str] = field(default_factory=Counter)
    cut_off: Counter[str] = field(default_factory=Counter)
    empty: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    without_usage: Counter[str] = field(default_factory=Counter)
    without_cost: Counter[str] = field(default_factory=Counter)
    #: Answers graded wrong that hold their reference where the grader does not look.
    holding: Counter[str] = field(default_factory=Counter)
    compared: list[Compared] = field(default_factory=list)
    garbled: int = 0
    contradicted: int = 0
    num_judged_pairs: int = 0


class Grader:
    """Grades what the journal holds; a function of it, the questions and the command's grades."""

    def __init__(
        self,
        tiers: Sequence[str],
        samples: int,
        journal: Journal,
        kind: references.Kind | None,
        command_grades: CommandGrades | None,
        judged: frozenset[str],
        judge: str = "",
    ) -> None:
        self._tiers = tiers
        self._samples = samples
        self._journal = journal
        self._kind = kind
        self._command_grades = command_grades
        self._judged = judged
        self._judge = judge
        self._found = Graded()

    def grade(self, questions: Sequence[Question]) -> Graded:
        for question in questions:
            self._row(question)
        return self._found

    def _answers(self, question: Question, tier: str) -> dict[int, dict[str, Any]]:
        found = {}
        for sample in range(self._samples):
            entry = self._journal.get((question.key, tier, sample, 0))
            if entry is not None:
                found[sample] = entry
        return found

    def _row(self, question: Question) -> None:
        answers = {tier: self._answers(question, tier) for tier in self._tiers}
        for tier, entries in answers.items():
            self._tally(tier, entries)
        verdicts = self._verdicts(question, answers)
        if not any(answers.values()):
            return
        by, grades = self._grades(question, answers, verdicts)
        if not any(grades.values()):
            self._found.ungraded[by] += 1
            return
        self._found.by[by] += 1
        row: dict[str, Any] = {}
        if question.id not in (None, ""):
            row["id"] = question.id
        if question.prompt is not None:
            row["prompt"] = question.prompt
        else:
            row["messages"] = list(question.messages)
        row["quality"] = {
            tier: _alone(list(values.values())) for tier, values in grades.items() if values
        }
        for name in ("output_tokens", "cost_usd"):
            means = {tier: _mean(entries, name) for tier, entries in answers.items()}
            known = {tier: mean for tier, mean in means.items() if mean is not None}
            if known:
                row[name] = known
        row["responses"] = {
            tier: _alone([entry["text"] for entry in entries.values()])
            for tier, entries in answers.items()
            if entries
        }
        sure = {tier: _only(entries, "token_statistics") for tier, entries in answers.items()}
        if known_sure := {tier: said for tier, said in sure.items() if said is not None}:
            row["token_statistics"] = known_sure
        for name in ("group", "task", "reference", "grader"):
            value = getattr(question, name)
            if value is not None:
                row[name] = value
        if by in references.KINDS:
            row["grader"] = by
        row["graded_by"] = by
        self._found.rows.append(row)

    def _tally(self, tier: str, entries: Mapping[int, Mapping[str, Any]]) -> None:
        found = self._found
        found.answers[tier] += len(entries)
        for entry in entries.values():
            found.cut_off[tier] += bool(entry.get("cut_off"))
            found.empty[tier] += not entry["text"].strip()
            found.without_usage[tier] += entry.get("output_tokens") is None
            found.without_cost[tier] += entry.get("cost_usd") is None

    def _grades(
        self,
        question: Question,
        answers: Mapping[str, Mapping[int, Mapping[str, Any]]],
        verdicts: Mapping[tuple[str, int], list[judging.Verdict]],
    ) -> tuple[str, dict[str, dict[int, float]]]:
        if self._command_grades is not None:
            return "command", self._by_command(question, answers, self._command_grades)
        if question.reference is not None:
            kind = self.kind_of(question)
            found = {
                tier: {
                    sample: references.grade(entry["text"], question.reference, kind)
                    for sample, entry in entries.items()
                }
                for tier, entries in answers.items()
            }
            if kind in ("exact", "normalised", "ends"):
                for tier, grades in found.items():
                    self._found.holding[tier] += sum(
                        grade
                        < references.grade(
                            answers[tier][sample]["text"], question.reference, "includes"
                        )
                        for sample, grade in grades.items()
                    )
            return kind, found
        if question.key not in self._judged:
            return "no reference", {}
        return "judge", self._by_judge(verdicts)

    def kind_of(self, question: Question) -> references.Kind:
        return question.grader or self._kind or references.kind_of(question.reference)

    def _by_command(
        self,
        question: Question,
        answers: Mapping[str, Mapping[int, Mapping[str, Any]]],
        given: CommandGrades,
    ) -> dict[str, dict[int, float]]:
        found: dict[str, dict[int, float]] = {}
        for tier, entries in answers.items():
            for sample in entries:
                grade = given.get((question.key, tier, sample))
                if isinstance(grade, float):
                    found.setdefault(tier, {})[sample] = grade
        return found

    def _by_judge(
        self, verdicts: Mapping[tuple[str, int], list[judging.Verdict]]
    ) -> dict[str, dict[int, float]]:
        """Every tier against the last; the last one's grade is the mean over the others."""
        found: dict[str, dict[int, float]] = {}
        last: dict[int, list[float]] = {}
        for (tier, sample), given in verdicts.items():
            own, of_last = judging.scores(given)
            found.setdefault(tier, {})[sample] = own
            last.setdefault(sample, []).append(of_last)
        if last:
            found[self._tiers[-1]] = {
                sample: sum(values) / len(values) for sample, values in last.items()
            }
        return {tier: found[tier] for tier in self._tiers if tier in found}

    def _verdicts(
        self, question: Question, answers: Mapping[str, Mapping[int, Mapping[str, Any]]]
    ) -> dict[tuple[str, int], list[judging.Verdict]]:
        """Both orders' verdicts of each pair that has both; a garbled one leaves its pair out."""
        found: dict[tuple[str, int], list[judging.Verdict]] = {}
        if question.key not in self._judged:
            return found
        last = self._tiers[-1]
        for tier in self._tiers[:-1]:
            for sample, entry in answers[tier].items():
                other = answers[last].get(sample)
                if other is None:
                    continue
                if entry["text"].strip() == other["text"].strip():
                    found[tier, sample] = ["tie"]
                    continue
                said = [
                    self._journal.get(verdict_key(question.key, self._judge, tier, sample, order))
                    for order in ORDERS
                ]
                self._found.garbled += sum(
                    each is not None and each.get("verdict") is None for each in said
                )
                verdicts = [e["verdict"] for e in said if e is not None and e.get("verdict")]
                if len(verdicts) < len(ORDERS):
                    continue
                found[tier, sample] = verdicts
                self._found.num_judged_pairs += 1
                self._found.contradicted += set(verdicts) == {"first", "second"}
                if question.reference is not None:
                    kind = self.kind_of(question)
                    own, of_last = (
                        references.grade(text, question.reference, kind)
                        for text in (entry["text"], other["text"])
                    )
                    self._found.compared.append(Compared(own, of_last, tuple(verdicts)))
        return found


def _alone(values: list[Any]) -> Any:
    return values[0] if len(values) == 1 else values


def _only(entries: Mapping[int, Mapping[str, Any]], name: str) -> Any:
    """Of the one answer; None of several, of which only texts and grades are kept."""
    return next(iter(entries.values())).get(name) if len(entries) == 1 else None


def _mean(entries: Mapping[int, Mapping[str, Any]], name: str) -> float | None:
    known = [entry[name] for entry in entries.values() if entry.get(name) is not None]
    return sum(known) / len(known) if known else None


def check_references(questions: Sequence[Question], kind: references.Kind | None) -> None:
    """Raises GradingError for references that no answer could be compared with, before money is
    spent."""
    wrong = []
    for question in questions:
        if question.reference is None:
            continue
        try:
            references.grade("", question.reference, question.grader or kind)
        except references.BadReference as error:
            wrong.append(f"  {question.place}: {error}")
    if wrong:
        shown = "\n".join(wrong[:5])
        raise GradingError(
            f"{len(wrong)} references cannot be used; correct them or name another grader, the "
            f"first are\n{shown}"
        )


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """The rows as JSON lines, gzipped by name, whole or not at all. Raises GradingError."""
    text = "".join(json.dumps(row, ensure_ascii=True) + "\n" for row in rows).encode()
    if path.name.endswith(".gz"):
        packed = io.BytesIO()
        with gzip.GzipFile(filename="", fileobj=packed, mode="wb", mtime=0) as stream:
            stream.write(text)
        text = packed.getvalue()
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(text)
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise GradingError(f"cannot write {path}: {error.strerror}") from error
