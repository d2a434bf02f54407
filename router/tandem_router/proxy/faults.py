"""Whose fault it is that an attempt gave no answer, and what a client is told of it.

Only what is wrong with the request itself (a 400, 413 or 422 about it) is the client's to read.
All else is the tier's or the operator's: another tier may answer, and where none may, the client
reads our words; a provider's text, which may quote our key, stays here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from tandem_router.errors import ApiError, TimedOutError, UnreachableError, UpstreamError


class FaultKind(StrEnum):
    """What went wrong, in the words of metrics and decisions."""

    UNREACHABLE = "unreachable"  # no connection: nobody has seen the request
    TIMED_OUT = "timed-out"
    BROKEN = "broken"  # the reply ended before it was complete
    BAD_ANSWER = "bad-answer"  # a 200 that is no answer
    FULL = "full"  # 429
    CLOSED = "closed"  # 503
    CREDENTIALS = "credentials"  # 401, 402, 403
    NOT_FOUND = "not-found"  # 404
    SERVER_ERROR = "server-error"  # 5xx
    REFUSED = "refused"  # every other status
    INCAPABLE = "incapable"  # a 400 that another tier may not give: too long, not supported


_TOLD = {
    FaultKind.UNREACHABLE: "cannot be reached",
    FaultKind.TIMED_OUT: "did not answer in time",
    FaultKind.BROKEN: "broke off its answer",
    FaultKind.BAD_ANSWER: "gave no valid answer",
    FaultKind.FULL: "takes no more requests now",
    FaultKind.CLOSED: "is not ready",
    FaultKind.CREDENTIALS: "does not accept this router's credentials",
    FaultKind.NOT_FOUND: "does not know the model that this router asks it for",
    FaultKind.SERVER_ERROR: "failed",
    FaultKind.REFUSED: "refused this router's request",
    FaultKind.INCAPABLE: "cannot do what this request asks",
}
# Where it is the operator who has to act, the client need not come again.
_LASTING = frozenset({FaultKind.CREDENTIALS, FaultKind.NOT_FOUND})
_OWN_STATUSES = frozenset({400, 413, 422})
_ELSEWHERE = frozenset({"context_length_exceeded", "unsupported_parameter", "unsupported_content"})
_NOT_OWN = frozenset(
    {"authentication_error", "permission_error", "insufficient_quota", "rate_limit_error"}
    | {"invalid_api_key", "billing_hard_limit_reached", "model_not_found", "not_found_error"}
)
_KEYLIKE = re.compile(r"\b(?:sk|pk|Bearer)[- ][\w*.-]{4,}|\*{3,}\S*", re.IGNORECASE)
_ABOUT_KEYS = re.compile(r"api[ _-]?key|credential|unauthori[sz]ed|permission", re.IGNORECASE)


class Fault(Exception):
    """An attempt that gave no answer, by the tier's or the operator's fault.

    status: as the tier answered, None where it did not. body: what the client may read, for
    INCAPABLE only. retry_after_s: as the tier asked. whole: it has generated all of an answer, also
    where a stream was asked for.
    """

    def __init__(
        self,
        kind: FaultKind,
        why: str,
        *,
        status: int | None = None,
        retry_after_s: float | None = None,
        draining: bool = False,
        body: bytes = b"",
        whole: bool = False,
    ) -> None:
        super().__init__(why)
        self.kind = kind
        self.status = status
        self.retry_after_s = retry_after_s
        self.draining = draining
        self.body = body
        self.whole = whole

    @property
    def reached(self) -> bool:
        """Whether the tier took the request up, and may have computed, and billed, an answer."""
        return self.status in (None, 200) and self.kind is not FaultKind.UNREACHABLE


class RequestRefused(Exception):
    """A refusal that is the request's own fault, to be handed to the client."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(f"refused with {status}")
        self.status = status
        self.body = body


@dataclass(frozen=True, slots=True)
class Refusal:
    """A reply that is not 200."""

    status: int
    headers: Mapping[bytes, bytes]
    body: bytes
    external: bool  # a provider's: its words are checked before anybody reads them


def of_transport(error: UpstreamError) -> Fault:
    """The fault of a connection that could not be made or did not last."""
    if isinstance(error, UnreachableError):
        return Fault(FaultKind.UNREACHABLE, str(error))
    if isinstance(error, TimedOutError):
        return Fault(FaultKind.TIMED_OUT, str(error))
    return Fault(FaultKind.BROKEN, str(error))


def of_refusal(refusal: Refusal) -> Fault | RequestRefused:
    """Whose fault a reply with another status than 200 is."""
    status, why = refusal.status, f"answered {refusal.status}"
    if status in _OWN_STATUSES:
        return of_error(_error_of(refusal.body), refusal.external, status)
    kind = FaultKind.SERVER_ERROR if status >= 500 else FaultKind.REFUSED
    if status in (401, 402, 403):
        kind = FaultKind.CREDENTIALS
    elif status == 404:
        kind = FaultKind.NOT_FOUND
    elif status == 429:
        kind = FaultKind.FULL
    elif status == 503:
        kind = FaultKind.CLOSED
    return Fault(
        kind,
        why,
        status=status,
        retry_after_s=_seconds(refusal.headers.get(b"retry-after")),
        draining=b"x-tandem-draining" in refusal.headers,
    )


def of_error(error: Any, external: bool, status: int = 400) -> Fault | RequestRefused:
    """Whose fault an OpenAI error object is that says the request is wrong."""
    fields = error if isinstance(error, dict) else {}
    message = fields.get("message")
    words = {str(fields.get(name)) for name in ("type", "code")}
    if words & _NOT_OWN or (external and _ABOUT_KEYS.search(str(message))):
        return Fault(FaultKind.CREDENTIALS, f"answered {status}", status=status)
    if not isinstance(message, str):
        message = f"the tier refused the request with status {status} and no reason"
    if external:
        message = _KEYLIKE.sub("[removed]", message)[:2000]
    code = fields.get("code")
    param = fields.get("param")
    told = ApiError(
        status,
        message,
        type="invalid_request_error",
        param=param if isinstance(param, str) else None,
        code=code if isinstance(code, str) else None,
    )
    body = told.body() if external or not fields else json.dumps({"error": error}).encode()
    if words & _ELSEWHERE:
        return Fault(FaultKind.INCAPABLE, f"answered {status}", status=status, body=body)
    return RequestRefused(status, body)


def refusal_of(faults: Mapping[str, Fault]) -> ApiError:
    """What the client is told when no tier is left: which tiers, and what of each, in our words.

    429 and 503 keep their status and say when to come again; all else is a 502.
    """
    told = "; ".join(f"tier {tier!r} {_TOLD[fault.kind]}" for tier, fault in faults.items())
    kinds = {fault.kind for fault in faults.values()}
    waits = [fault.retry_after_s or 1.0 for fault in faults.values() if fault.status in (429, 503)]
    if FaultKind.FULL in kinds:
        status, kind, code = 429, "rate_limit_error", "tier_full"
    elif FaultKind.CLOSED in kinds:
        status, kind, code = 503, "service_unavailable", "tier_not_ready"
    else:
        status, kind, code = 502, "server_error", "tier_failed"
    return ApiError(
        status,
        told,
        type=kind,
        code=code,
        retry=not kinds <= _LASTING,
        retry_after_s=min(waits, default=None),
    )


def _error_of(body: bytes) -> Any:
    try:
        payload = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(payload, dict):
        return None
    if payload.get("object") == "error":  # vLLM up to 0.9 says it without a frame
        return {name: value for name, value in payload.items() if name != "object"}
    return payload.get("error")


def _seconds(retry_after: bytes | None) -> float | None:
    """The header's seconds; a date, or nonsense, reads as absent."""
    try:
        seconds = float(retry_after or b"")
    except ValueError:
        return None
    return min(seconds, 3600.0) if seconds >= 0.0 else None
