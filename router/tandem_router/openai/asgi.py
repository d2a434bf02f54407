"""The words of ASGI that answers are sent with."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
# Bodies are what their content type says, whatever they look like.
NOSNIFF = (b"x-content-type-options", b"nosniff")
