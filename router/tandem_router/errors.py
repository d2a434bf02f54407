"""Every way a request can be refused, and how each looks on the wire.

Clients of the OpenAI API read `{"error": {"message", "type", "param", "code"}}`; nothing else
ever leaves the router, whatever went wrong. Beside a code stands `doc_url`, where this router says
what it means and what to do: a reference to resolve against its own address. `retry` says whether
the same request can succeed later: where it cannot, `x-should-retry: false` stops clients that
retry by status code alone.
"""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path

DOC_URL = "/errors/"


@cache
def explanations() -> dict[str, str]:
    """What is said of each code that routers and workers can answer; `make reference` writes it."""
    said: dict[str, str] = json.loads(Path(__file__).with_name("error_codes.json").read_text())
    return said


class RouterError(Exception):
    """Base of all errors the router raises on purpose."""


class ConfigError(RouterError):
    """The configuration cannot be used; the message names field, value and rule."""


class UpstreamError(RouterError):
    """A worker could not be reached, or its reply ended or broke before it was complete."""


class UnreachableError(UpstreamError):
    """No connection: the request has not been seen by any worker."""


class TimedOutError(UpstreamError):
    """No byte, or no beginning of an answer, within the time there was."""


class ApiError(RouterError):
    """A reply with an OpenAI error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry: bool = False,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type
        self.param = param
        self.code = code
        self.retry = retry
        self.retry_after_s = retry_after_s

    def body(self) -> bytes:
        error = {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.code,
        }
        if self.code in explanations():  # a provider's own codes are not ours to explain
            error["doc_url"] = f"{DOC_URL}{self.code}"
        # A half of a surrogate pair, quoted from a request, has no bytes of its own.
        return json.dumps({"error": error}, ensure_ascii=False).encode(errors="replace")

    def headers(self) -> list[tuple[bytes, bytes]]:
        headers = []
        if not self.retry:
            headers.append((b"x-should-retry", b"false"))
        if self.retry_after_s is not None:
            headers.append((b"retry-after", str(max(1, math.ceil(self.retry_after_s))).encode()))
        return headers


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def overloaded(message: str, *, code: str, retry_after_s: float, status: int = 429) -> ApiError:
    kind = "rate_limit_error" if status == 429 else "service_unavailable"
    return ApiError(status, message, type=kind, code=code, retry=True, retry_after_s=retry_after_s)
