"""Every header that `docs/router.md` lists for requests has its effect, and no other has one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tandem_router.testing.two_tiers import Scores, both

PAGE = Path(__file__).resolve().parents[2] / "docs" / "router.md"
PAIRS: dict[str, tuple[str, str]] = {
    "x-tandem-quality": ("0.5", "0.99"),
    "x-tandem-max-cost-usd": ("1", "0.0001"),
    "x-tandem-ttft-slo-ms": ("10000", "20000"),
    "x-tandem-priority": ("1", "2"),
    "cache-control": ("max-age=60", "no-cache"),
}
OF_A_REQUEST = {"x-request-id", "x-tandem-seed", "x-tandem-created", "date", "content-length"}


def listed(page: str) -> set[str]:
    """The names in the page's table of request headers."""
    rows = re.search(r"^\| request header \|.*\n\|---.*\n((?:\|.*\n)+)", page, re.MULTILINE)
    assert rows is not None
    first = [row.split("|")[1] for row in rows[1].splitlines()]
    return {name.partition(":")[0] for cell in first for name in re.findall(r"`([^`]+)`", cell)}


async def seen(client: Any, workers: list[Any], headers: dict[str, str]) -> Any:
    """What a client gets and what a worker is told, without what every request has of its own."""
    before = [len(worker.inference) for worker in workers]
    reply = await client.chat(max_tokens=100, temperature=0, headers=headers)
    told = [
        {k: v for k, v in request.headers.items() if k not in OF_A_REQUEST}
        for worker, count in zip(workers, before, strict=True)
        for request in worker.inference[count:]
    ]
    for request in told:  # what is left of a target depends on the moment
        if "x-tandem-deadline-ms" in request:
            request["x-tandem-deadline-ms"] = str(round(int(request["x-tandem-deadline-ms"]), -4))
    known = {k: v for k, v in reply.headers.items() if k.startswith("x-tandem")}
    return reply.status, known, told


async def alike(run_router: Any, make_worker: Any, name: str, a: str, b: str) -> bool:
    """Whether nothing tells two requests apart that differ in this header alone."""
    table = await both(make_worker)
    workers = [*table["small"]["unified"], *table["large"]["decode"]]
    async with run_router(
        table,
        predictor=Scores(0.8, 0.85),
        threshold=0.1,
        cache={"enabled": name == "cache-control"},
    ) as (client, _):
        # The first fills the cache, where there is one.
        found = [await seen(client, workers, {name: value}) for value in (a, a, b)]
    return bool(found[1] == found[2])


async def test_two_requests_that_differ_in_a_listed_header_can_be_told_apart(
    run_router: Any, make_worker: Any
) -> None:
    assert listed(PAGE.read_text(encoding="utf-8")) == PAIRS.keys()
    for name, (a, b) in PAIRS.items():
        assert not await alike(run_router, make_worker, name, a, b), name


async def test_a_header_that_is_wired_to_nothing_is_found(
    run_router: Any, make_worker: Any
) -> None:
    page = PAGE.read_text(encoding="utf-8")
    planted = page.replace(
        "|\n|---|---|\n| `x-tandem-quality", "|\n|---|---|\n| `x-new` | |\n| `x-tandem-quality"
    )

    assert listed(planted) - PAIRS.keys() == {"x-new"}
    assert await alike(run_router, make_worker, "x-new", "1", "2")
    assert await alike(run_router, make_worker, "x-tandem-tier", "small", "large")
