"""The user's own grader: a command that reads the answer and prints a grade, within limits.

It runs only where it was named. The answer comes on standard input; the folder it starts in is
new and empty; TANDEM_PROMPT, TANDEM_REFERENCE, TANDEM_TASK and TANDEM_ID hold the rest. It prints
a number from 0 to 1, or nothing and exits with 0 (right) or 1 (wrong). Time, memory and the size
of what it writes are limited; the network and the disk are the user's own to guard.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem_router.grading.errors import GradingError

#: Linux refuses a longer variable.
MAX_VARIABLE_BYTES = 120_000
MAX_OUTPUT_BYTES = 64 * 1024 * 1024
#: How much of its end is looked at.
MAX_SHOWN_BYTES = 4096
_KEPT = ("PATH", "LANG", "LC_ALL", "HOME", "TMPDIR", "VIRTUAL_ENV", "PYTHONPATH")
# Limits are set by a small interpreter that then becomes the command: no code of ours runs
# between fork and exec of a process with threads.
_LIMITED = (
    "import os, resource, sys\n"
    "s, m, w = map(int, sys.argv[1:4])\n"
    "resource.setrlimit(resource.RLIMIT_CPU, (s, s + 1))\n"
    "resource.setrlimit(resource.RLIMIT_AS, (m, m))\n"
    "resource.setrlimit(resource.RLIMIT_FSIZE, (w, w))\n"
    "resource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n"
    "os.execvp(sys.argv[4], sys.argv[4:])\n"
)
_GRADE = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d{1,3})?")


class NoGrade(Exception):
    """The command gave no grade; the text says what it did instead."""


@dataclass(frozen=True, slots=True)
class Command:
    """A command line with its limits."""

    argv: tuple[str, ...]
    timeout_s: float = 10.0
    memory_bytes: int = 1024**3

    @classmethod
    def parse(cls, text: str, timeout_s: float, memory_bytes: int) -> Command:
        """Raises GradingError where it is no command line or names no program."""
        try:
            argv = shlex.split(text)
        except ValueError as error:
            raise GradingError(f"--grade-command {text!r} is no command line: {error}") from error
        if not argv:
            raise GradingError("--grade-command is empty; name a program")
        program = shutil.which(argv[0])
        if program is None:
            raise GradingError(f"--grade-command: there is no program {argv[0]!r}; check its path")
        # The command starts in an empty folder: a relative path would lead nowhere there.
        rest = [str(Path(each).resolve()) if _is_file(each) else each for each in argv[1:]]
        return cls(
            (str(Path(program).resolve() if "/" in argv[0] else program), *rest),
            timeout_s,
            memory_bytes,
        )

    def grade(self, answer: str, variables: Mapping[str, Any]) -> float:
        """The grade from 0 to 1 that the command gives to an answer. Raises NoGrade."""
        environment = {name: os.environ[name] for name in _KEPT if name in os.environ}
        for name, value in variables.items():
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            if len(text.encode("utf-8", "replace")) > MAX_VARIABLE_BYTES or "\0" in text:
                raise NoGrade(f"{name} cannot be a variable: too long, or with a zero byte")
            environment[name] = text.encode("utf-8", "replace").decode()
        with tempfile.TemporaryDirectory(prefix="tandem-grade-") as folder:
            status, output, complaint = self._run(answer, environment, folder)
        return _grade(status, output, complaint)

    def _run(self, answer: str, environment: dict[str, str], folder: str) -> tuple[int, str, str]:
        limits = [str(int(self.timeout_s) + 1), str(self.memory_bytes), str(MAX_OUTPUT_BYTES)]
        with (
            tempfile.TemporaryFile() as out,
            tempfile.TemporaryFile() as err,
            subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _LIMITED, *limits, *self.argv],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=err,
                cwd=folder,
                env=environment,
                start_new_session=True,
            ) as process,
        ):
            try:
                process.communicate(answer.encode("utf-8", "replace"), timeout=self.timeout_s)
            except subprocess.TimeoutExpired as error:
                raise NoGrade(f"it ran longer than {self.timeout_s:g} s") from error
            finally:
                _end(process)
            return process.returncode, _last_of(out), _last_of(err)


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except OSError:
        return False


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the command and what it started: they share its session."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass


def _last_of(stream: Any) -> str:
    """The whole lines at the end of what was written: the grade comes last, and so do errors."""
    before = max(0, stream.seek(0, os.SEEK_END) - MAX_SHOWN_BYTES)
    stream.seek(before)
    text = str(stream.read().decode("utf-8", "replace"))
    whole = (text.partition("\n")[2] if before else text).strip()
    return whole or ("..." + text.strip() if before else "")


def _grade(status: int, output: str, complaint: str) -> float:
    last = output.splitlines()[-1].strip() if output else ""
    if status == 0 and _GRADE.fullmatch(last):
        value = float(last)
        if 0.0 <= value <= 1.0:
            return value
        raise NoGrade(f"it printed {last}, which is outside 0..1")
    if not last and status in (0, 1) and not complaint:
        return 1.0 - status
    said = (complaint.splitlines() or [last])[-1][:120]
    ended = f"exit status {status}" if status >= 0 else f"signal {-status}"
    raise NoGrade(f"it gave no grade ({ended}{': ' + said if said else ''})")
