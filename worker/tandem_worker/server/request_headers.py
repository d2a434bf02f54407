"""What a router says of a request in its headers; the body is forwarded as the client sent it."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from urllib.parse import urlsplit

from tandem_worker.errors import RequestError
from tandem_worker.openai.context import RequestContext

MAX_TENANT_CHARS = 64


def context_of(
    headers: Mapping[str, str], served: str, *, model: str | None, seed: int | None
) -> RequestContext:
    """served: the model's name here; model, seed: as the body has them. Raises RequestError."""
    if seed is None:
        seed = _header_int(headers, "x-tandem-seed")
    if seed is None:
        seed = int.from_bytes(os.urandom(8), "little")
    created = _header_int(headers, "x-tandem-created")
    request_id = headers.get("x-request-id", "")
    if not request_id or len(request_id) > 128 or not request_id.isprintable():
        request_id = os.urandom(12).hex()
    # A router forwards the body unchanged, with its own names in it, and says here which model
    # was chosen; without it the body's name has to be ours.
    routed = headers.get("x-tandem-model")
    if routed is None and model not in (None, served):
        raise RequestError(
            f"the model {model!r} is not served here; this worker serves {served!r}",
            status=404,
            param="model",
            code="model_not_found",
        )
    prefill = headers.get("x-tandem-prefill") or None
    if prefill is not None and urlsplit(prefill).scheme != "http":
        raise RequestError(f"x-tandem-prefill={prefill!r} must look like http://HOST:PORT")
    return RequestContext(
        request_id=request_id,
        created=int(time.time()) if created is None else created,
        model=routed or served,
        seed=seed,
        prefill_url=prefill,
        deadline_ms=_header_int(headers, "x-tandem-deadline-ms"),
        priority=_header_int(headers, "x-tandem-priority", signed=True) or 0,
        expected_tokens=_header_int(headers, "x-tandem-expected-tokens"),
        tenant=tenant_of(headers),
        send_token_ids=headers.get("x-tandem-token-ids") == "1",
        send_usage=headers.get("x-tandem-usage") == "1",
        send_token_statistics=headers.get("x-tandem-token-statistics") == "1",
    )


def _header_int(headers: Mapping[str, str], name: str, *, signed: bool = False) -> int | None:
    value = headers.get(name)
    if value is None or value == "":
        return None
    digits = value[1:] if signed and value.startswith("-") else value
    if not digits.isascii() or not digits.isdigit() or len(digits) > 20:
        raise RequestError(f"header {name}={value[:40]!r} must be an integer")
    return int(value)


def tenant_of(headers: Mapping[str, str]) -> str:
    """Whose request it is, as the router says; empty where nobody says it."""
    value = headers.get("x-tandem-tenant", "")
    if len(value) > MAX_TENANT_CHARS or not value.isascii() or not value.isprintable():
        raise RequestError(
            f"header x-tandem-tenant={value[:40]!r} must have at most {MAX_TENANT_CHARS} printable "
            "characters"
        )
    return value
