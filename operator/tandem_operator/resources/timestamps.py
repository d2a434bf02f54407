"""Times as Kubernetes writes them: RFC 3339, UTC, whole seconds."""

from __future__ import annotations

import time
from datetime import UTC, datetime

_FORM = "%Y-%m-%dT%H:%M:%SZ"


def timestamp(at_s: float | None = None) -> str:
    """A time in seconds since the epoch, or now."""
    return datetime.fromtimestamp(time.time() if at_s is None else at_s, UTC).strftime(_FORM)


def seconds_since_epoch(text: str) -> float:
    """The other way. Raises ValueError for text that is no such time."""
    return datetime.strptime(text, _FORM).replace(tzinfo=UTC).timestamp()
