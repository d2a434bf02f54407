"""A fake OpenAI-compatible provider on loopback, and the commands run as a user runs them."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tandem_operator.cli import main


@dataclass(frozen=True)
class Reply:
    """What the provider answers: a text as a chat completion, or any status and body."""

    text: str = ""
    status: int = 200
    body: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    tokens: tuple[int, int] | None = (10, 5)
    finish: str = "stop"


Respond = Callable[[dict[str, Any]], Reply]


def question(body: dict[str, Any]) -> str:
    """The text of the last message of a request."""
    return str(body["messages"][-1]["content"])


class Provider:
    """Listens on 127.0.0.1 in a thread of its own; `requests` are the bodies that it was sent.

    `respond` maps a request to a reply; it may be exchanged at any time. GET answers `state`.
    """

    def __init__(self) -> None:
        self.respond: Respond = lambda body: Reply("4")
        self.state: dict[str, Any] | None = None
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        self._started.wait(5)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}/v1"

    def asked(self, model: str) -> list[str]:
        return [question(body) for body in self.requests if body["model"] == model]

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()

    def _serve(self) -> None:
        async def start() -> None:
            server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
            self._port = server.sockets[0].getsockname()[1]
            self._started.set()

        self._loop.run_until_complete(start())
        self._loop.run_forever()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0))

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                lines = head.decode("latin-1").split("\r\n")
                headers = dict(line.lower().split(": ", 1) for line in lines[1:] if ": " in line)
                content = await reader.readexactly(int(headers.get("content-length", 0)))
                await self._reply(lines[0].split()[0], headers, content, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _reply(
        self, method: str, headers: dict[str, str], content: bytes, writer: asyncio.StreamWriter
    ) -> None:
        if method == "GET":
            found = self.state is not None
            reply = Reply(status=200 if found else 404, body=json.dumps(self.state).encode())
            model = ""
        else:
            body = json.loads(content)
            self.requests.append(body)
            self.headers.append(headers)
            reply, model = self.respond(body), body["model"]
        if reply.delay_s:
            await asyncio.sleep(reply.delay_s)
        data = reply.body if reply.body is not None else completion(reply, model)
        extra = "".join(f"{name}: {value}\r\n" for name, value in reply.headers.items())
        writer.write(
            f"HTTP/1.1 {reply.status} X\r\ncontent-length: {len(data)}\r\n{extra}\r\n".encode()
            + data
        )
        await writer.drain()


def completion(reply: Reply, model: str) -> bytes:
    value: dict[str, Any] = {
        "object": "chat.completion",
        "model": model,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": reply.text},
                "finish_reason": reply.finish,
            }
        ],
    }
    if reply.tokens is not None:
        value["usage"] = {
            "prompt_tokens": reply.tokens[0],
            "completion_tokens": reply.tokens[1],
        }
    return json.dumps(value).encode()


@pytest.fixture
def provider() -> Iterator[Provider]:
    found = Provider()
    yield found
    found.close()


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


@dataclass(frozen=True)
class Ran:
    """What a command left behind."""

    status: int
    out: str
    err: str

    @property
    def found(self) -> dict[str, Any]:
        return dict(json.loads(self.out))


Command = Callable[..., Ran]


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
        *("--tier", f"small={provider.url}#s", "--tier", f"large={provider.url}#l"),
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


def sums(count: int) -> list[dict[str, Any]]:
    """Questions with references: sums, their results."""
    return [{"prompt": f"What is {i} + {i}?", "reference": 2 * i} for i in range(count)]


def right(body: dict[str, Any]) -> Reply:
    """Every sum right."""
    words = question(body).split()
    return Reply(f"The answer is {int(words[2]) * 2}.")
