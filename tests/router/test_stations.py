"""One request is handed on from file to file; docs/architecture.md lists them in order."""

from __future__ import annotations

from typing import Any

import pytest

from journey import Journey
from tandem_router.api.inference import Asked, Reading
from tandem_router.api.origin import header, is_foreign
from tandem_router.config import LimitsConfig
from tandem_router.openai.headers import RequestHeaders, parse_headers
from tandem_router.policy import Overrides
from tandem_router.proxy.arrival import Arrival
from tandem_router.testing.two_tiers import both

HEADERS = {"x-tandem-max-cost-usd": "0.5", "x-tandem-priority": "1"}
# How often one comes back to a file at most: the aim, and what the code has.
MOST_RETURNS = 3


def _says_headers(value: Any) -> bool:
    """The headers of a request, as they came, read, or as part of what arrived."""
    if isinstance(value, RequestHeaders | Overrides | Asked | Reading | Arrival):
        return True
    if isinstance(value, dict):
        return "headers" in value and value.get("type") == "http"
    return isinstance(value, list) and (b"x-tandem-priority", b"1") in value


@pytest.mark.parametrize("is_known", [False, True], ids=["new head", "known head"])
async def test_following_a_requests_headers_one_returns_to_few_files(
    run_router: Any, make_worker: Any, is_known: bool
) -> None:
    async with run_router(await both(make_worker)) as (client, _):
        for _ in range(4 if is_known else 0):
            await client.chat(headers=HEADERS)
        with Journey("router/tandem_router", _says_headers).followed() as journey:
            reply = await client.chat(headers=HEADERS)

    assert reply.status == 200
    assert any("DataPath.answer" in name for _, name in journey.calls) == is_known
    assert "proxy/upstream_request.py" in journey.stations
    assert len(journey.returns) <= MOST_RETURNS, journey.calls


def test_a_value_that_wanders_is_found() -> None:
    """The bound is worth something only if the count rises where a value goes to and fro."""
    sent = [(b"x", b"1")]
    journey = Journey("router/tandem_router", lambda value: value is sent)
    with journey.followed():
        header(sent, b"x")
        parse_headers(sent, LimitsConfig())
        is_foreign(sent, ())

    assert journey.stations == ["api/origin.py", "openai/headers.py", "api/origin.py"]
    assert journey.returns == ["api/origin.py"]
