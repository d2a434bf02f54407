"""The user's own grader: what it is given, what counts as a grade, and what stops it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tandem_router.grading.graders.command import Command, NoGrade


def python(code: str, **limits: float) -> Command:
    return Command(
        (sys.executable, "-c", code),
        timeout_s=limits.get("timeout_s", 20.0),
        memory_bytes=int(limits.get("memory_bytes", 1024**3)),
    )


@pytest.mark.parametrize(
    ("code", "grade"),
    [
        ("print(0.25)", 0.25),
        ("print('thinking'); print(1)", 1.0),
        ("print('thinking\\n' * 1000); print(1)", 1.0),
        ("", 1.0),
        ("raise SystemExit(1)", 0.0),
        ("import sys; print(float(sys.stdin.read() == 'äh'))", 1.0),
        ("import os; print(float(os.listdir('.') == []))", 1.0),
        ("import os; print(float('SECRET' not in os.environ))", 1.0),
        ("import os; print(float(os.environ['TANDEM_REFERENCE'] == '4'))", 1.0),
    ],
)
def test_a_number_or_the_exit_status_is_the_grade(
    code: str, grade: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "x")

    assert python(code).grade("äh", {"TANDEM_REFERENCE": 4}) == grade


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("print(2)", "printed 2, which is outside 0..1"),
        ("print('good')", r"gave no grade \(exit status 0: good\)"),
        ("raise ValueError('no such case')", r"exit status 1: ValueError: no such case"),
        ("print('x\\n' * 5000); raise ValueError('y' * 99)", r"exit status 1: ValueError: yyy"),
        ("print('1' * 5000)", "gave no grade"),
        ("raise SystemExit(3)", r"exit status 3"),
        ("import os; os.kill(os.getpid(), 9)", r"signal 9"),
        ("b = bytearray(4 * 1024**3)", "MemoryError"),
        ("print('x' * 10)\nprint(10 ** 9)", "outside 0..1"),
    ],
)
def test_anything_else_is_no_grade_and_says_what_it_was(code: str, reason: str) -> None:
    with pytest.raises(NoGrade, match=reason):
        python(code).grade("x", {})


def test_time_is_limited_for_it_and_for_what_it_starts(tmp_path: Path) -> None:
    late = tmp_path / "late"
    code = (
        "import subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-c', \"import time; time.sleep(1); open({str(late)!r}"
        ", 'w')\"])\n"
        "time.sleep(60)"
    )

    with pytest.raises(NoGrade, match=r"it ran longer than 0.5 s"):
        python(code, timeout_s=0.5).grade("x", {})

    assert not late.exists()


def test_a_reference_too_long_for_a_variable_is_no_grade() -> None:
    with pytest.raises(NoGrade, match="TANDEM_REFERENCE cannot be a variable"):
        python("").grade("x", {"TANDEM_REFERENCE": "y" * 200_000})
