"""Ends process groups that a killed parent leaves behind, even after kill -9.

A child dies with its parent through PR_SET_PDEATHSIG, its own children do not, and other systems
have no such call. So one small process reads group ids from a pipe; when the pipe closes, because
the parent ended in whatever way, it kills what is still listed and removes the run folder.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path


class Guardian:
    """The parent's side: tells the guardian process which groups exist."""

    def __init__(self, remove_on_exit: Path | None = None) -> None:
        argv = [sys.executable, "-I", "-S", str(Path(__file__).resolve())]
        if remove_on_exit is not None:
            argv.append(str(remove_on_exit))
        self._process: subprocess.Popen[bytes] | None = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd="/",
        )

    def watch(self, pgid: int) -> None:
        """Kill this group when the parent ends."""
        self._tell(f"+{pgid}\n")

    def forget(self, pgid: int) -> None:
        """The group is gone; its id may be reused."""
        self._tell(f"-{pgid}\n")

    def close(self) -> None:
        """End the guardian: it kills what is still listed and removes the folder."""
        if self._process is None:
            return
        process, self._process = self._process, None
        if process.stdin is not None:
            with contextlib.suppress(OSError):
                process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=10)

    def _tell(self, line: str) -> None:
        if self._process is None or self._process.stdin is None:
            return
        with contextlib.suppress(OSError):
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()


def guard(lines: object, folder: str | None) -> None:
    """The guardian's side: read "+ID" and "-ID" lines until the end, then clean up."""
    groups: set[int] = set()
    for raw in lines:  # type: ignore[attr-defined]
        text = raw.strip()
        if text.startswith("+"):
            groups.add(int(text[1:]))
        elif text.startswith("-"):
            groups.discard(int(text[1:]))
    for group in groups:
        with contextlib.suppress(OSError):
            os.killpg(group, signal.SIGKILL)
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    for sig in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(sig, signal.SIG_IGN)
    guard(sys.stdin, sys.argv[1] if len(sys.argv) > 1 else None)
