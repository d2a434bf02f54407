"""What the router says about one request in headers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RequestContext:
    """What the router says about a request in headers.

    Attributes:
        prefill_url: Prefill worker to ask, or None to prefill here.
        deadline_ms: From arrival, for deadline-aware orders.
        priority: Lower goes first.
        expected_tokens: Predicted length of the answer, or None.
        tenant: Whose request it is, as far as the router says; tenants share the worker in turns.
    """

    request_id: str
    created: int
    model: str
    seed: int
    prefill_url: str | None = None
    deadline_ms: int | None = None
    priority: int = 0
    expected_tokens: int | None = None
    tenant: str = ""
    send_token_ids: bool = False
    send_usage: bool = False
    send_token_statistics: bool = False
