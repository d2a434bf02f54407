"""A router on a real port before fakes: what unchanged clients are pointed at."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tandem_router.api.app import RouterApp
from tandem_router.config import parse_config
from tandem_router.testing.fake_agent import FakeAgent
from tandem_router.testing.fake_worker import FakeWorker
from tandem_router.testing.live_router import LiveRouter, live_router


async def make_app() -> RouterApp:
    """Two tiers that call tools, one that embeds, and one of a worker."""
    small, large, vectors = [await FakeAgent().start() for _ in range(3)]
    tiers = [
        {
            "name": name,
            "served_model": f"{name}-model",
            "kind": "external",
            "url": f"{server.url}/v1",
            "usd_per_1m_output_tokens": price,
        }
        for name, server, price in (("small", small, 1.0), ("large", large, 9.0))
    ]
    embedder = {
        **tiers[0],
        "name": "vectors",
        "served_model": "vectors-model",
        "url": f"{vectors.url}/v1",
        "capabilities": {"embeddings": True, "generation": False},
    }
    worker = await FakeWorker(context_length=20_000).start()
    pool = {"name": "pool", "served_model": "pool-model", "usd_per_1m_output_tokens": 20.0}
    config = {"name": "chat", "tiers": [*tiers, embedder, pool], "fallback_tier": "large"}
    endpoints = Path(tempfile.mkdtemp()) / "endpoints.json"
    endpoints.write_text(json.dumps({"tiers": {"pool": {"unified": [worker.url]}}}))
    return RouterApp(parse_config(json.dumps(config)), endpoints_path=endpoints)


@pytest.fixture(scope="session")
def router() -> Iterator[LiveRouter]:
    with live_router(make_app) as running:
        yield running
