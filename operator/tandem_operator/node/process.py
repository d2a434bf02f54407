"""One child process: its own session, bound to this process's life, killed as a group."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tandem_operator.node.reaper import Guardian

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform.startswith("linux") else None

MAX_LOG_BYTES = 16 * 2**20


def _die_with(parent: int) -> None:
    """Runs in the child between fork and exec: SIGKILL when the parent dies (Linux)."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # the parent died before prctl
            os._exit(1)


class Process:
    """A running child. Output goes to a file or to pipes; its process group ends with it."""

    def __init__(
        self, process: asyncio.subprocess.Process, log: Path | None, guardian: Guardian
    ) -> None:
        self._process = process
        self._log = log
        self._guardian = guardian
        self.pid = process.pid
        # Pipes, of a process without a log.
        self.stdin = process.stdin
        self.stdout = process.stdout
        self.stderr = process.stderr

    @classmethod
    async def start(
        cls,
        argv: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: Path,
        log: Path | None,
        guardian: Guardian,
    ) -> Process:
        """Start argv with output appended to log, or with three pipes where log is None.

        Raises OSError when the program cannot be executed.
        """
        parent = os.getpid()
        fd = asyncio.subprocess.PIPE
        if log is not None:
            fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            process = await asyncio.create_subprocess_exec(
                *argv,
                env=dict(env),
                cwd=cwd,
                stdin=asyncio.subprocess.PIPE if log is None else asyncio.subprocess.DEVNULL,
                stdout=fd,
                stderr=fd,
                start_new_session=True,
                preexec_fn=lambda: _die_with(parent),
            )
        finally:
            if log is not None:
                os.close(fd)
        guardian.watch(process.pid)
        return cls(process, log, guardian)

    @property
    def running(self) -> bool:
        """Whether the child itself has not ended."""
        return self._process.returncode is None

    async def ended(self) -> None:
        """Wait for the end, any number of callers."""
        await self._process.wait()

    async def wait(self) -> int:
        """Wait for the end; the exit code, negative for a signal. Ends the rest of the group."""
        code = await self._process.wait()
        self.kill_group()
        self._guardian.forget(self.pid)
        return code

    def terminate(self) -> None:
        """Ask the child to end, as a kubelet asks PID 1."""
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()

    def kill_group(self) -> None:
        """End the child and everything in its process group now."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    def rotate_log(self) -> bool:
        """Keep one old log; appends make truncation safe while the child writes.

        Whether the log was rotated.
        """
        if self._log is None:
            return False
        try:
            if self._log.stat().st_size <= MAX_LOG_BYTES:
                return False
            old = self._log.with_suffix(self._log.suffix + ".1")
            old.write_bytes(self._log.read_bytes())
            os.truncate(self._log, 0)
        except OSError:
            return False
        return True


def describe_exit(code: int) -> str:
    """An exit code in words: "exit code 1" or "killed by SIGKILL"."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


def tail(log: Path, num_lines: int, max_bytes: int = 16_384) -> str:
    """The last lines of a log file; empty when there is none."""
    try:
        with log.open("rb") as f:
            f.seek(0, os.SEEK_END)
            f.seek(max(0, f.tell() - max_bytes))
            text = f.read().decode("utf-8", "replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-num_lines:])
