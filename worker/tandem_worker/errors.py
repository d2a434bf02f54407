"""The worker's exceptions: what a caller can tell apart, each with a sentence for people."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

DOC_URL = "/errors/"


@cache
def explanations() -> dict[str, str]:
    """What is said of each code that a worker can answer; `make reference` writes it."""
    said: dict[str, str] = json.loads(Path(__file__).with_name("error_codes.json").read_text())
    return said


class WorkerError(Exception):
    """Base of everything this package raises on purpose."""


class ConfigError(WorkerError):
    """The configuration file or the command line breaks a rule."""


class ModelError(WorkerError):
    """A model directory is incomplete, inconsistent or of an unknown family."""


class UnqualifiedError(WorkerError):
    """Lossy settings change the model's answers by more than the stated loss."""


class RequestError(WorkerError):
    """A request cannot be served; rendered as an OpenAI error object.

    Attributes:
        status: HTTP status code.
        type: OpenAI's error type, such as ``invalid_request_error``.
        param: The request field at fault, or None.
        code: Machine-readable reason, or None.
        headers: Extra reply headers, such as Retry-After.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.type = type
        self.param = param
        self.code = code
        self.headers = headers or {}

    def body(self) -> dict[str, object]:
        """The OpenAI error object; `doc_url` is where worker and router explain the code."""
        error: dict[str, object] = {
            "message": str(self),
            "type": self.type,
            "param": self.param,
            "code": self.code,
        }
        if self.code in explanations():
            error["doc_url"] = f"{DOC_URL}{self.code}"
        return {"error": error}


class InvariantError(WorkerError):
    """The worker found its own bookkeeping wrong: a bug, never the caller's fault."""


class PeerError(WorkerError):
    """A peer worker could not be reached or did not answer as agreed."""
