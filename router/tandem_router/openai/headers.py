"""The client headers that have an effect; anything else never reaches a worker."""

from __future__ import annotations

import math

from msgspec import Struct

from tandem_router.config import LimitsConfig
from tandem_router.errors import ApiError, bad_request
from tandem_router.policy import NO_OVERRIDES, Overrides


class RequestHeaders(Struct, frozen=True):
    """The only client headers that have an effect."""

    overrides: Overrides
    priority: int | None
    no_cache: bool
    api_key: str | None


NO_HEADERS = RequestHeaders(NO_OVERRIDES, None, False, None)
_READ = frozenset(
    {
        b"authorization",
        b"x-api-key",
        b"cache-control",
        b"x-tandem-quality",
        b"x-tandem-max-cost-usd",
        b"x-tandem-ttft-slo-ms",
        b"x-tandem-priority",
    }
)


def parse_headers(headers: list[tuple[bytes, bytes]], limits: LimitsConfig) -> RequestHeaders:
    """Raises ApiError (400, 431). Anything not read here never reaches a worker."""
    names = dict(headers)
    if len(names) == len(headers):
        num_bytes = sum(map(len, names)) + sum(map(len, names.values()))
    else:
        num_bytes = sum(len(name) + len(value) for name, value in headers)
    if num_bytes + 4 * len(headers) > limits.max_header_bytes:
        raise ApiError(431, f"request headers are larger than {limits.max_header_bytes} bytes")
    if _READ.isdisjoint(names):
        return NO_HEADERS
    quality = cost = ttft = priority = api_key = None
    no_cache = False
    for name, value in headers:
        if name not in _READ:
            continue
        if name == b"authorization":
            scheme, _, key = value.decode("latin-1").partition(" ")
            if scheme.lower() == "bearer":
                api_key = key.strip()
        elif name == b"x-api-key":
            api_key = api_key or value.decode("latin-1").strip()
        elif name == b"cache-control":
            no_cache = b"no-cache" in value or b"no-store" in value
        elif name == b"x-tandem-quality":
            quality = _number(name, value, 0.0, 1.0)
        elif name == b"x-tandem-max-cost-usd":
            cost = _number(name, value, 0.0, 1e9)
        elif name == b"x-tandem-ttft-slo-ms":
            ttft = _number(name, value, 0.001, 1e9) / 1000.0
        elif name == b"x-tandem-priority":
            priority = int(_number(name, value, -100, 100, whole=True))
    overrides = NO_OVERRIDES
    if quality is not None or cost is not None or ttft is not None:
        overrides = Overrides(quality=quality, max_cost_usd=cost, ttft_slo_s=ttft)
    return RequestHeaders(overrides, priority, no_cache, api_key)


def _number(name: bytes, value: bytes, low: float, high: float, whole: bool = False) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not low <= number <= high or (whole and not number.is_integer()):
        kind = "a whole number" if whole else "a number"
        raise bad_request(
            f"header {name.decode()}: {value[:40].decode('latin-1')!r} is not {kind} "
            f"from {low:g} to {high:g}",
            name.decode(),
        )
    return number
