"""The provider on loopback, and the commands run as a user runs them."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from fake_provider import Command, Provider, Ran, Reply
from tandem_operator.cli import main


@pytest.fixture
def provider() -> Iterator[Provider]:
    """In a thread of its own, because the commands run their own event loop."""
    found = Provider()
    found.respond = lambda body: Reply("4")
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    asyncio.run_coroutine_threadsafe(found.start(), loop).result(5)
    yield found
    asyncio.run_coroutine_threadsafe(found.stop(), loop).result(5)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(5)
    loop.close()


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Waits between attempts take no time; the list holds how long they would have been."""
    from tandem_router.grading import asking

    waited: list[float] = []
    plain = asking.Asker.__init__

    async def sleep(seconds: float) -> None:
        waited.append(seconds)
        clock.now += seconds
        await asyncio.sleep(0)

    class Clock:
        now = 0.0

        def __call__(self) -> float:
            return self.now

    clock = Clock()

    def init(self: asking.Asker, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **{**kwargs, "sleep": sleep, "clock": clock})

    monkeypatch.setattr(asking.Asker, "__init__", init)
    return waited


@pytest.fixture
def tandem(capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a `tandem` command line in this process."""

    def run(*words: object) -> Ran:
        try:
            status = main([str(word) for word in words])
        except SystemExit as error:  # argparse refuses
            status = int(error.code or 0)
        captured = capsys.readouterr()
        return Ran(status, captured.out, captured.err)

    return run


@pytest.fixture
def two_tiers(provider: Provider) -> list[str]:
    """Options that name a small and a large tier of the provider, with prices."""
    return [
        *("--tier", f"small={provider.api}#s", "--tier", f"large={provider.api}#l"),
        *("--price", "small=1/2", "--price", "large=10/20"),
    ]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """A file of JSON lines."""

    def to(rows: Sequence[Any], name: str = "prompts.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return to
