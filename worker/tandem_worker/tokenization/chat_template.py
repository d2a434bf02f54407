"""Renders a model's chat template in a process that may be lost.

A template is a program that came with the weights: it may loop for hours or build a string of two
gigabytes, at compile time already, and no sandbox of jinja's bounds that. So it runs beside the
worker, in a process with little memory that is killed when it takes too long; the request that
asked is refused, the worker serves on. Started with the first chat request.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from jinja2 import Environment, Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tandem_worker.errors import RequestError, WorkerError

TIMEOUT_S = 5.0
START_S = 60.0
"""For the interpreter, on a machine that does much else."""
MEMORY_BYTES = 512 * 2**20
MAX_PROMPT_BYTES = 32 * 2**20


class TemplateLostError(WorkerError):
    """The process died or was killed; the message says why."""


class ChatTemplate:
    """One template and the process that renders it; one rendering at a time.

    Args:
        source: Jinja, as in tokenizer_config.json or chat_template.jinja.
        timeout_s: A rendering that takes longer is given up.
    """

    def __init__(self, source: str, *, timeout_s: float = TIMEOUT_S) -> None:
        self._source = source
        self._timeout_s = timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def render(self, variables: Mapping[str, Any]) -> str:
        """The prompt.

        Raises:
            RequestError: the template is broken, refuses the messages, or runs too long.
        """
        try:
            with self._lock:
                answer = self._ask(json.dumps(dict(variables)).encode() + b"\n")
        except TemplateLostError as error:
            raise RequestError(
                f"the model's chat template {error}; use /v1/completions, or correct the template",
                param="messages",
                code="chat_template_failed",
            ) from error
        if "text" in answer:
            return str(answer["text"])
        code = "chat_template_failed" if answer.get("broken") else None
        raise RequestError(str(answer.get("error")), param="messages", code=code)

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):  # what was not sent yet
                        pipe.close()

    def __del__(self) -> None:
        self.close()

    def _ask(self, question: bytes) -> dict[str, Any]:
        try:
            if self._process is None or self._process.poll() is not None:
                self.close()
                self._process = _start()
                _exchange(self._process, b"", time.monotonic() + START_S)
                question = json.dumps(self._source).encode() + b"\n" + question
            answer = _exchange(self._process, question, time.monotonic() + self._timeout_s)
            result: dict[str, Any] = json.loads(answer)
            return result
        except (OSError, ValueError) as error:
            self.close()
            raise TemplateLostError(f"cannot be run ({error})") from error
        except BaseException:
            self.close()
            raise


def _start() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "tandem_worker.tokenization.chat_template"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={k: v for k, v in os.environ.items() if k in ("PATH", "PYTHONPATH", "LANG", "TZ")},
        bufsize=0,
    )


def _exchange(process: subprocess.Popen[bytes], question: bytes, deadline: float) -> bytes:
    """Send a line and read one, both until the deadline."""
    assert process.stdin is not None
    assert process.stdout is not None
    write, read = process.stdin.fileno(), process.stdout.fileno()
    os.set_blocking(write, False)
    unsent, answer = memoryview(question), bytearray()
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TemplateLostError("runs too long")
        can_read, can_write, _ = select.select([read], [write] if len(unsent) else [], [], left)
        if can_write:
            with contextlib.suppress(BlockingIOError):
                unsent = unsent[os.write(write, unsent) :]
        if can_read:
            chunk = os.read(read, 1 << 20)
            if not chunk:
                raise TemplateLostError("needs too much memory or crashes")
            answer += chunk
            if len(answer) > MAX_PROMPT_BYTES:
                raise TemplateLostError(f"makes more than {MAX_PROMPT_BYTES >> 20} MiB")
            if chunk.endswith(b"\n"):
                return bytes(answer)


# -- in the process --------------------------------------------------------------------------------


class _Generation(Extension):
    """`{% generation %}` marks the assistant's part, for training; here it is its content."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def environment() -> Environment:
    """What transformers gives a chat template."""
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return env


def compiled(source: str) -> Template | dict[str, Any]:
    """The template, or what to answer where it cannot be compiled."""
    try:
        return environment().from_string(source)
    except (TemplateError, SyntaxError, RecursionError, ValueError) as error:
        return {"error": f"the model's chat template cannot be read: {error}", "broken": True}


def answer(template: Template, variables: Mapping[str, Any]) -> dict[str, Any]:
    """What one rendering gives: ``text`` or ``error``."""
    try:
        return {"text": template.render(**variables)}
    except TemplateError as error:
        return {"error": f"the chat template refuses the messages: {error}"}
    except (ArithmeticError, AttributeError, LookupError, RecursionError) as error:
        return {"error": _failed(error)}
    except (TypeError, ValueError) as error:
        return {"error": _failed(error)}


def _failed(error: Exception) -> str:
    return f"the chat template fails on the messages: {type(error).__name__}: {error}"


def main() -> None:
    """Read a template, then variables line by line; answer each."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.stdout.buffer.write(b"ready\n")
    sys.stdout.buffer.flush()
    template = compiled(json.loads(sys.stdin.buffer.readline()))
    for line in sys.stdin.buffer:
        known = template if isinstance(template, dict) else answer(template, json.loads(line))
        text = json.dumps(known)
        sys.stdout.buffer.write(text.encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt, MemoryError, BrokenPipeError):
        main()
