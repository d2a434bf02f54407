"""A router in this process, with the workers a test wants behind it."""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from tandem_router.api.app import RouterApp
from tandem_router.config import RouterConfig, parse_config
from tandem_router.testing.asgi_client import Client
from tandem_router.testing.fake_vllm import FakeVLLM
from tandem_router.testing.fake_worker import FakeWorker, token_text
from tandem_router.testing.two_tiers import CONFIG

OPTIONS = (
    "clock",
    "predictor",
    "peer_token",
    "key_secret",
    "metrics_token",
    "store_file",
    "store_url",
)


@pytest.fixture
def make_config() -> Callable[..., RouterConfig]:
    """The standard two tiers, with some fields replaced."""

    def make(**changes: Any) -> RouterConfig:
        return parse_config(json.dumps({**CONFIG, **changes}))

    return make


@pytest.fixture
async def make_worker() -> AsyncIterator[Callable[..., Any]]:
    """Start fake workers; all are stopped at the end."""
    workers: list[FakeWorker] = []

    async def make(**options: Any) -> FakeWorker:
        worker = await FakeWorker(**options).start()
        workers.append(worker)
        return worker

    yield make
    for worker in workers:
        await worker.stop()


@pytest.fixture
async def make_vllm() -> AsyncIterator[Callable[..., Any]]:
    """Start fake vLLM servers of the large tier's model; all are stopped at the end."""
    servers: list[FakeVLLM] = []

    async def make(*adapters: str, **options: Any) -> FakeVLLM:
        server = FakeVLLM(served_model="large-model", adapters=adapters, **options)
        servers.append(await server.start())
        return server

    yield make
    for server in servers:
        await server.stop()


@pytest.fixture
def run_router(make_config: Callable[..., RouterConfig], tmp_path: Any) -> Callable[..., Any]:
    """`async with run_router({"large": {"decode": [worker]}}) as (client, app)`."""

    @asynccontextmanager
    async def run(
        table: dict[str, dict[str, list[FakeWorker]]],
        *,
        background: bool = True,
        **changes: Any,
    ) -> AsyncIterator[tuple[Client, RouterApp]]:
        # A predictor as a section is configuration, as an object the thing itself.
        given = [name for name in OPTIONS if not isinstance(changes.get(name, {}), dict)]
        options = {name: changes.pop(name) for name in given}
        app = RouterApp(
            make_config(**changes),
            endpoints_path=tmp_path / "endpoints.json",
            rng=random.Random(7),
            **options,
        )
        urls = {
            tier: {role: tuple(worker.url for worker in workers) for role, workers in roles.items()}
            for tier, roles in table.items()
        }
        # A tier that a test leaves out sleeps; one that is not named would be gone.
        app.set_table({**{tier.name: {} for tier in app.config.tiers}, **urls})
        if background:
            async with app.running():
                yield Client(app), app
        else:
            yield Client(app), app
            app.services.client.close()

    return run


@pytest.fixture
def reported() -> Callable[[RouterApp], Any]:
    """Waits until every worker has said what it can."""

    async def wait(app: RouterApp) -> None:
        while any(worker.load is None for worker in app.picker.workers):
            app.services.workers_changed.clear()
            await app.services.workers_changed.wait()

    return wait


@pytest.fixture
def token_text_of() -> Callable[[int], str]:
    return token_text
