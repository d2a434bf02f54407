"""Probes of the router: what two values of a field do to it, seen without a network."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from msgspec import to_builtins

from tandem_router import __main__ as router_command
from tandem_router.api.admin import router_state
from tandem_router.api.app import RouterApp
from tandem_router.config import LimitsConfig, RouterConfig
from tandem_router.errors import ApiError, UnreachableError
from tandem_router.openai.body import Bodies
from tandem_router.openai.headers import parse_headers
from tandem_router.openai.request import parse_inference
from tandem_router.policy import (
    Overrides,
    PlainScore,
    RouteRequest,
    TenantCeilings,
    TierOption,
    decide,
)
from tandem_router.policy.terms import ScoreStatus
from tandem_router.proxy.arrival import admit
from tandem_router.routing.predictor_source import ArtifactPredictor, Predictor
from tandem_router.routing.scorer import UNSCORED, Scored
from tandem_router.store.configured import configured_backend
from tandem_router.store.records import Batch

_BODIES = [
    {"prompt": "x", "n": 3},
    {"prompt": "x", "max_tokens": 300},
    {"prompt": "x", "stop": ["a", "b", "c"]},
    {"prompt": "x", "stop": "a long stop string"},
    {"prompt": "x", "metadata": [[[[[[1]]]]]]},
    {"messages": 5 * [{"role": "user", "content": "x"}]},
    {"prompt": 5 * ["x"]},
    {"prompt": "x", "logit_bias": {str(token): 1 for token in range(5)}},
    {"prompt": "x", "logprobs": 3},
]


def accepted(config: RouterConfig) -> list[str]:
    """What the router says to requests of several sizes."""
    return [*_bodies(config.limits), _headers(config.limits)]


def _bodies(limits: LimitsConfig) -> list[str]:
    said = []
    for body in _BODIES:
        kind: Any = "chat" if "messages" in body else "completions"
        try:
            parse_inference(kind, json.dumps({"model": "chat", **body}).encode(), Bodies(limits))
            said.append("taken")
        except ApiError as error:
            said.append(str(error))
    return said


def _headers(limits: LimitsConfig) -> str:
    try:
        parse_headers([(b"x", 2000 * b"y")], limits)
    except ApiError as error:
        return str(error)
    return "taken"


def never_sent(config: RouterConfig) -> Any:
    """What a client is told that promises a body and sends none."""
    sent: list[Any] = []

    async def receive() -> Any:
        await asyncio.sleep(3600)

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(app(config)(asked("/v1/completions", 10), receive, send))
    return [message.get("body") for message in sent]


def asked(path: str, num_bytes: int) -> dict[str, Any]:
    """A request as ASGI says it."""
    return {
        "type": "http",
        "method": "POST",
        "path": path,
        "headers": [(b"content-length", b"%d" % num_bytes)],
        "query_string": b"",
    }


def app(config: RouterConfig, predictor: Predictor | None = None, **options: Any) -> RouterApp:
    """A router whose clock stands still and that has no workers."""
    return RouterApp(
        config,
        predictor=predictor,
        endpoints_path=Path(tempfile.gettempdir()) / "no-endpoints.json",
        key_secret=32 * b"k",
        clock=lambda: 0.0,
        **options,
    )


def held(config: RouterConfig) -> list[str]:
    """What the first tenant's next requests of 100 tokens are told while none has ended."""
    ledger = app(config).services.ledger
    tenant = config.tenants[0].name if config.tenants else "anonymous"
    said = []
    for _ in range(4):
        try:
            ledger.hold(tenant, 100.0)
            said.append("taken")
        except ApiError as error:
            said.append(str(error))
    return said


def reported(config: RouterConfig) -> Any:
    """What /admin/state says of 100 requests of 10 to 1,000 ms."""
    router = app(config)
    services = router.services
    for i in range(1, 101):
        services.routing.latency["small"].saw(i / 100.0, i / 100.0, 0.0)
    return router_state(services, router.settings)["tiers"]


def scored(config: RouterConfig) -> Any:
    """What the predictor makes of a long and of a short prompt."""

    async def ask() -> list[Any]:
        scorer = app(config).services.routing.scorer
        found = [await scorer.score(text) for text in (3_000 * "x", "short")]
        scorer.close()
        return [dict(one.score.quality) for one in found if one.score is not None]

    return asyncio.run(ask())


def paid(config: RouterConfig) -> Any:
    """What a small budget leaves of an answer whose client named no bound."""
    services = app(config).services
    found = []
    for remaining in (0.0005, 0.01):
        request = RouteRequest(
            prompt_tokens=10,
            score=None,
            score_status=ScoreStatus.ABSENT,
            overrides=Overrides(max_cost_usd=remaining),
            tenant=TenantCeilings(),
        )
        options = [
            TierOption(name=t.name, usd_per_1m_output_tokens=t.usd_per_1m_output_tokens)
            for t in config.tiers
        ]
        decision = decide(request, options, services.steering.set_points, services.steering.state)
        found.append(str(decision))
    return found


def prefixes(config: RouterConfig) -> Any:
    """Blocks of a prompt, and how many of them a worker's index keeps."""
    router = app(config)
    router.set_table({"small": {"unified": ("http://127.0.0.1:1",)}})
    (worker,) = router.picker.workers
    chain = router.picker.chain(2048 * b"x")
    worker.prefixes.add(chain)
    return [chain[:1], len(chain), worker.prefixes.num_covered(chain)]


class Artifact(ArtifactPredictor):
    """A learned predictor whose training gains are these."""

    def training_gains(self, dearest: str, cheapest: str) -> list[tuple[float, float]]:
        return [(gain / 100.0, 0.9) for gain in range(100)]


def floor_threshold(config: RouterConfig) -> float:
    """The threshold that holds the floor over the training data."""
    steering = app(config, Artifact(Path("none"), ("small", "large"))).services.steering
    return steering.set_points.gain_threshold


class Slow:
    """Takes 30 ms."""

    def score(self, prompt: str) -> PlainScore:
        time.sleep(0.03)
        return PlainScore({"small": 0.5, "large": 0.9})


def slowly_scored(config: RouterConfig) -> Any:
    """Whether a prediction of 30 ms is in time."""

    async def ask() -> Any:
        scorer = app(config, Slow()).services.routing.scorer
        found = await scorer.score("x")
        scorer.close()
        return found.status

    return asyncio.run(ask())


def background(config: RouterConfig) -> Any:
    """The periods of what runs beside the requests, as its functions are told them."""
    from tandem_router.api import app as beside
    from tandem_router.balancing import known_workers as followed

    told: list[Any] = []

    async def fake(*arguments: Any, **options: Any) -> None:
        told.append([a for a in arguments if isinstance(a, float)])
        periods = {k: v for k, v in options.items() if k.endswith("_s")}
        told.append({k: v() if callable(v) else v for k, v in periods.items()})

    async def run() -> None:
        async with app(config).running():
            await asyncio.sleep(0)

    kept = beside.poll_loads, followed.watch_file
    beside.poll_loads = followed.watch_file = fake  # type: ignore[assignment]
    try:
        asyncio.run(run())
    finally:
        beside.poll_loads, followed.watch_file = kept
    return told


def served(config: RouterConfig) -> Any:
    """What the HTTP server of `python -m tandem_router` is told."""
    import gc
    import signal

    import uvicorn

    told: list[Any] = []

    class Server:
        started = True

        def __init__(self, options: uvicorn.Config) -> None:
            told.append(options.timeout_graceful_shutdown)
            told.append(options.http.listener.limits)  # type: ignore[union-attr]

        def run(self, sockets: Any) -> None:
            return

    def listen(hosts: Any, port: int) -> list[Any]:
        told.append(port)
        return []

    listens = router_command.listen
    kept = uvicorn.Server, signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.json"
        file.write_text(config.model_dump_json(exclude_unset=True))
        uvicorn.Server = Server  # type: ignore[assignment, misc]
        router_command.listen = listen
        try:
            router_command.main(["--config", str(file), "--endpoints", str(file)])
        finally:
            uvicorn.Server = kept[0]  # type: ignore[misc]
            router_command.listen = listens
            signal.signal(signal.SIGTERM, kept[1])
            signal.signal(signal.SIGINT, kept[2])
            gc.unfreeze()
    return told


def kept_decisions(config: RouterConfig) -> int:
    """Decisions that are left of many."""
    log = app(config).services.decisions
    for _ in range(20):
        log.add(None)  # type: ignore[arg-type]
    return len(list(log.records()))


def cached(config: RouterConfig) -> Any:
    """Whether there is a cache."""
    return app(config).services.reuse.cache is not None


def points(config: RouterConfig) -> Any:
    """The set-points that the policy decides with at the start."""
    return to_builtins(app(config).services.steering.set_points)


def able(config: RouterConfig) -> list[str]:
    """What requests that need more than text are told of the first tier."""
    services = app(config).services
    said = []
    for more in (
        {"tools": [{"type": "function"}]},
        {"response_format": {"type": "json_object"}},
        {"logprobs": 1},
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        {"prompt": [1, 2, 3]},
        {"input": "x"},
    ):
        kind: Any = "chat" if "messages" in more else "completions"
        kind = "embeddings" if "input" in more else kind
        body = json.dumps({"model": "small", "prompt": "x", "max_tokens": 1, **more}).encode()
        request = parse_inference(kind, body, Bodies(config.limits))
        hold = services.ledger.hold("anonymous", 1.0)
        decision = services.routing.choose(
            request, Overrides(tier="small"), hold, UNSCORED, services.steering.set_points
        )
        said.append(f"{decision.tier}: {decision.message}")
    return said


def answer_time(config: RouterConfig) -> float:
    """How long a whole reply of a hundred tokens may take beyond the deadline."""
    body = b'{"model": "small", "prompt": "x", "max_tokens": 100}'
    request = parse_inference("completions", body, Bodies(config.limits))
    headers = parse_headers([], config.limits)
    return admit(app(config).services, request, headers, "anonymous", None, "id", 0.0).answer_s


def retries(config: RouterConfig) -> int:
    """How many retries may be under way beside a hundred requests, and beside none."""
    router = app(config)
    return sum(
        sum(router.picker.retries(tier).take(num_inflight) for _ in range(200))
        for tier, num_inflight in (("small", 100), ("large", 0))
    )


def ejected(config: RouterConfig) -> Any:
    """Which failures of two of a tier's four workers eject them, and for how long."""
    router = app(config)
    router.set_table({"small": {"unified": tuple(f"http://127.0.0.1:{n}" for n in range(1, 5))}})
    one, other, *_ = router.picker.workers
    told = [
        [router.picker.outcome(worker, good=False) for _ in range(9)] for worker in (one, other)
    ]
    out: list[float] = []
    for _ in range(4):
        one.outcomes.failed(1000.0 * (len(out) + 1), config.failover.outliers, [])
        out.append(one.outcomes.ejected_until - 1000.0 * (len(out) + 1))
    return told, out


def cache_bounds(config: RouterConfig) -> Any:
    """What leaves the cache first, what fits into it, and when an answer is too old."""
    cache = app(config).services.reuse.cache
    return None if cache is None else (cache.eviction, cache.capacity_bytes, cache.ttl_s)


def bodies(config: RouterConfig) -> list[str]:
    """What two senders are told whose bodies are read."""
    held = app(config).front("router:8000").bodies
    return [str(held.refusal(sender, num_bytes)) for sender in "ab" for num_bytes in (3000, 9000)]


def upstream(config: RouterConfig) -> Any:
    """How long a server may take to be reached and to say something."""
    client = app(config).services.client
    return client.connect_timeout_s, client.stall_timeout_s


def shadowed_share(config: RouterConfig) -> float:
    """Of requests, that are answered twice."""
    return app(config).services.learner.gate.share


def chosen(config: RouterConfig) -> Any:
    """Who answers forty prompts of which the large tier makes more, and how long they may be."""
    services = app(config).services
    body = b'{"model": "chat", "prompt": "x"}'
    request = parse_inference("completions", body, Bodies(config.limits))
    scored = Scored(PlainScore({"small": 0.1, "large": 0.9}), ScoreStatus.OK)
    tenant = config.tenants[0].name if config.tenants else "anonymous"
    found = []
    for _ in range(40):
        hold = services.ledger.hold(tenant, 1.0)
        points = services.steering.set_points
        decision = services.routing.choose(request, Overrides(), hold, scored, points)
        services.steering.count(decision, request, points)
        services.ledger.withdraw(hold)
        found.append((decision.tier, decision.max_tokens))
    return found


def stored(config: RouterConfig) -> Any:
    """How many of five decisions a store keeps."""

    async def keep() -> Any:
        with tempfile.TemporaryDirectory() as folder:
            backend = configured_backend(config.store, Path(folder) / "store.db", None)
            assert backend is not None
            await backend.open()
            for number in range(5):
                decision = {"request_id": str(number), "time": float(number), "tier": "small"}
                await backend.write(Batch("writer", number + 1, decisions=[decision]))
            found = await backend.decisions(10)
            await backend.close()
            return [decision["request_id"] for decision in found]

    return asyncio.run(keep())


def flushed(config: RouterConfig) -> float:
    """Seconds between two batches of a store."""
    waited: list[float] = []

    async def sleep(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 2:
            raise asyncio.CancelledError

    async def run() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await router.services.store.run()

    kept = asyncio.sleep
    with tempfile.TemporaryDirectory() as folder:
        router = app(config, store_file=Path(folder) / "store.db")
        asyncio.sleep = sleep  # type: ignore[assignment]
        try:
            asyncio.run(run())
        finally:
            asyncio.sleep = kept
    return waited[-1]


def read_in_time(config: RouterConfig) -> Any:
    """Whether a verdict on an answer counts that takes 30 ms."""

    class Verifier:
        def verify(self, *_: Any) -> Any:
            time.sleep(0.03)
            return SimpleNamespace(quality_small=0.5, quality_large=0.9)

        def weigh(self, verdict: Any, *_: Any) -> Any:
            return verdict

    async def ask() -> Any:
        answers = app(config).services.routing.answers
        cascade = SimpleNamespace(verifier=Verifier(), weigh=Verifier().weigh)
        middle: Any = SimpleNamespace(cascade=cascade, predicted=(0.5, 0.9))
        found = await answers.read(middle, "prompt", "answer", None)
        answers.close()
        return found is not None

    return asyncio.run(ask())


def embedding_asked_for(config: RouterConfig) -> list[str]:
    """What is said of an embedding that is not there."""
    said: list[str] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("tandem.router")
    logger.addHandler(handler)
    try:
        app(config)
    finally:
        logger.removeHandler(handler)
    return said


def trained_every(config: RouterConfig) -> list[bool]:
    """Whether another training is due at hours after one."""
    with tempfile.TemporaryDirectory() as folder:
        retraining = app(config, retraining_dir=Path(folder)).services.retraining
        assert retraining is not None
        return [retraining.life.every_s <= hour * 3600.0 for hour in range(1, 6)]


def once(body: bytes) -> Any:
    """ASGI's `receive` of a client that sends this, stays and says no more."""
    left = [body]

    async def receive() -> Any:
        if not left:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": left.pop(), "more_body": False}

    return receive


def kept_of_a_stream(config: RouterConfig) -> list[Any]:
    """How many bytes of a stream are kept to go on with it."""
    from tandem_router.proxy import request_handler

    told: list[Any] = []

    class Relay:
        def __init__(self, request: Any, max_kept_bytes: int, *_: Any) -> None:
            told.append(max_kept_bytes)
            raise ApiError(503, "that was all")

    body = b'{"model": "small", "prompt": "x", "stream": true}'

    async def send(message: Any) -> None:
        return

    kept = request_handler.Relay
    request_handler.Relay = Relay  # type: ignore[assignment, misc]
    try:
        asyncio.run(app(config)(asked("/v1/completions", len(body)), once(body), send))
    finally:
        request_handler.Relay = kept  # type: ignore[misc]
    return told


def gateways(config: RouterConfig) -> list[Any]:
    """The port at which a gateway asks."""
    from tandem_router.gateway import server

    told: list[Any] = []

    @contextlib.asynccontextmanager
    async def serving(front: Any, host: str, port: int, *_: Any) -> AsyncIterator[None]:
        told.append(port)
        yield

    async def run() -> None:
        async with app(config, address=("127.0.0.1", 8000)).running():
            pass

    kept = server.serving
    server.serving = serving  # type: ignore[assignment]
    try:
        asyncio.run(run())
    finally:
        server.serving = kept
    return told


def patience(config: RouterConfig) -> list[Any]:
    """How long a provider may go without the beginning of an answer where another tier could."""
    told: list[Any] = []
    asked_once = asyncio.Event()

    class Away:
        async def request(self, *_: Any, begin_within_s: float | None, **__: Any) -> Any:
            told.append(begin_within_s)
            asked_once.set()
            raise UnreachableError("nobody is there")

        def close(self) -> None:
            return

    body = b'{"model": "chat", "prompt": "x", "max_tokens": 1}'

    async def send(message: Any) -> None:
        return

    async def ask() -> None:
        router = app(config, client=Away())
        router.set_table({"large": {"unified": ("http://127.0.0.1:1",)}})
        answer = router(asked("/v1/completions", len(body)), once(body), send)
        waits = asyncio.ensure_future(answer)  # for a worker, when nobody is left to ask
        await asked_once.wait()
        waits.cancel()

    asyncio.run(ask())
    return told[:1]
