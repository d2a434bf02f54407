"""Waits until a router has seen what the operator calls ready."""

from __future__ import annotations

import asyncio
import contextlib

import httpx

PERIOD_S = 0.05


async def reach_every_tier(url: str) -> None:
    """Return when the router at url has a usable worker of every tier.

    A worker is ready a moment before the router has read so; until then the router sends to one
    tier what needs another.
    """
    async with httpx.AsyncClient(trust_env=False) as client:
        while True:
            # Nothing listens yet, or what does is not ready to say anything.
            with contextlib.suppress(httpx.TransportError, ValueError):
                usable = (await client.get(f"{url}/ready")).json().get("usable_workers")
                if usable and 0 not in usable.values():
                    return
            await asyncio.sleep(PERIOD_S)
