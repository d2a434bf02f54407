"""A router on a real port before fakes: what unchanged clients are pointed at."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tandem_router.api.app import RouterApp
from tandem_router.config import parse_config
from tandem_router.testing.fake_agent import FakeAgent
from tandem_router.testing.live_router import LiveRouter, live_router


@pytest.fixture(scope="session")
def router(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveRouter]:
    """Two tiers that call tools, and one that embeds."""

    async def app() -> RouterApp:
        small, large, vectors = [await FakeAgent().start() for _ in range(3)]
        tiers = [
            {"name": name, "served_model": f"{name}-model", "kind": "external"}
            | {"url": f"{server.url}/v1", "usd_per_1m_output_tokens": price}
            for name, server, price in (("small", small, 1.0), ("large", large, 9.0))
        ]
        embedder = {**tiers[0], "name": "vectors", "served_model": "vectors-model"}
        embedder |= {"url": f"{vectors.url}/v1"}
        embedder["capabilities"] = {"embeddings": True, "generation": False}
        config = {"name": "chat", "tiers": [*tiers, embedder], "fallback_tier": "large"}
        access = {"cors_origins": ["https://app.example"]}
        return RouterApp(parse_config(json.dumps({**config, "access": access})))

    with live_router(app) as running:
        yield running


HERE = Path(__file__).parent
