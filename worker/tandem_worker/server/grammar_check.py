"""Decides within bounded work whether a grammar from outside can be used."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from asyncio.subprocess import PIPE, Process
from pathlib import Path

from tandem_worker.engine.constraints import MAX_GRAMMAR_CHARS, GrammarError

WORK_LIMIT_S = 0.1
"""CPU time that building one grammar may take."""
_WALL_LIMIT_S = 5.0
_POLL_S = 0.01
_LINE_LIMIT = 1 << 20


class GrammarCheck:
    """Tries grammars in a child process that is ended when one takes too long.

    Args:
        tokenizer_json: The model's tokenizer.
        vocab_size: The model's.
        eos_token_ids: Tokens that end an answer.
    """

    def __init__(self, tokenizer_json: str, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        self._first = {
            "tokenizer": tokenizer_json,
            "vocab_size": vocab_size,
            "eos": sorted(eos_token_ids),
        }
        self._process: Process | None = None
        self._lock = asyncio.Lock()

    async def check(self, grammar: str) -> None:
        """Return if it can be used.

        Raises:
            GrammarError: it is malformed, allows nothing, or takes too much work.
        """
        if len(grammar) > MAX_GRAMMAR_CHARS:
            raise GrammarError(
                f"it has {len(grammar)} characters; at most {MAX_GRAMMAR_CHARS} are read"
            )
        async with self._lock:
            try:
                problem = await self._try(grammar)
            except BaseException:
                # An answer that nobody reads would be taken for the next one's.
                await asyncio.shield(self.aclose())
                raise
        if problem is not None:
            raise GrammarError(problem)

    async def aclose(self) -> None:
        """End the child."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.returncode is None:
            process.kill()
        if process.stdin is not None:
            process.stdin.close()
        await process.wait()

    async def _try(self, grammar: str) -> str | None:
        process = await self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        before_s = _cpu_time_s(process.pid)
        process.stdin.write(json.dumps(grammar).encode() + b"\n")
        answer = asyncio.ensure_future(process.stdout.readline())
        deadline_s = asyncio.get_running_loop().time() + _WALL_LIMIT_S
        while not answer.done():
            await asyncio.wait([answer], timeout=_POLL_S)
            spent_s = _cpu_time_s(process.pid) - before_s
            late = asyncio.get_running_loop().time() > deadline_s
            if not answer.done() and (spent_s > WORK_LIMIT_S or late):
                answer.cancel()
                raise GrammarError(
                    f"it takes more than {WORK_LIMIT_S * 1e3:.0f} ms of work to build; use fewer "
                    "alternatives, shorter enumerations or simpler patterns"
                )
        line = answer.result()
        if not line:
            raise GrammarError("building it ended the process that tried")
        problem: str | None = json.loads(line)["problem"]
        return problem

    async def _running(self) -> Process:
        if self._process is None or self._process.returncode is not None:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-m", "tandem_worker.engine.grammar_trial"),
                stdin=PIPE,
                stdout=PIPE,
                limit=_LINE_LIMIT,
            )
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            self._process.stdin.write(json.dumps(self._first).encode() + b"\n")
            await self._process.stdout.readline()
        return self._process


def _cpu_time_s(pid: int) -> float:
    """CPU time of a process so far; 0 where the system does not tell, and the clock decides."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
