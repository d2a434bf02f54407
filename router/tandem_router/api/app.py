"""The router's ASGI application: who is wired to whom, which path goes where, what runs beside.

`/v1/*` is the data path; what a person or an operator asks is in `control_app`.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import random
import time
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterator,
    MutableMapping,
    Sequence,
)
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tandem_router.api.admin_access import OPEN_PATHS, AdminAccess, Secrets
from tandem_router.api.api_keys import Authenticator
from tandem_router.api.control_app import control_app
from tandem_router.api.inference import DataPath, Reading, respond_error
from tandem_router.api.live_settings import LiveSettings
from tandem_router.api.origin import check_host, check_writes
from tandem_router.api.request_body import ClientGone, Receive, Scope, read_body
from tandem_router.balancing.endpoint_picker import Picker
from tandem_router.balancing.file_discovery import EndpointTable
from tandem_router.balancing.health_check import poll_loads
from tandem_router.balancing.known_workers import KnownWorkers
from tandem_router.cache.response_cache import Reuse
from tandem_router.config import JudgeConfig, RouterConfig
from tandem_router.errors import ApiError, ConfigError
from tandem_router.http.client import UpstreamClient
from tandem_router.http.exchange import Exchange
from tandem_router.http.known_heads import Head
from tandem_router.limits.leases import SharedLimits
from tandem_router.limits.ledger import Ledger
from tandem_router.limits.prices import Prices
from tandem_router.openai.asgi import Send
from tandem_router.openai.headers import parse_headers
from tandem_router.openai.json_body import parse_json
from tandem_router.proxy.context import Services
from tandem_router.proxy.judge_calls import JudgeKeys
from tandem_router.proxy.provider_keys import ProviderKeys
from tandem_router.proxy.random_ids import new_request_id
from tandem_router.proxy.tally import Tally
from tandem_router.quality.answer_judge import AnswerJudge
from tandem_router.quality.labels import Labels
from tandem_router.quality.learner import LEARNING, Learner
from tandem_router.quality.live import LiveQuality
from tandem_router.quality.measured import Change
from tandem_router.quality.retraining import FolderArchive, Retraining, StoreArchive
from tandem_router.routing.arrivals import Arrivals
from tandem_router.routing.decision_log import DecisionLog
from tandem_router.routing.predictor_in_use import PredictorInUse
from tandem_router.routing.predictor_source import Predictor
from tandem_router.routing.set_points import Steering
from tandem_router.routing.tier_router import Routing
from tandem_router.store.configured import configured_backend
from tandem_router.store.records import Label, Spend
from tandem_router.store.writer import Store
from tandem_router.telemetry.logged_task import begin
from tandem_router.telemetry.metrics import Metrics
from tandem_router.telemetry.tracing import Tracing

if TYPE_CHECKING:
    from tandem_router.gateway.certificate import CertificateFolder
    from tandem_router.gateway.session import Front

logger = logging.getLogger("tandem.router")

Message = MutableMapping[str, Any]


class RouterApp:
    """ASGI application of one router.

    predictor: overrides the configured one (tests, embedding). artifact_path: the learned
    predictor's file, needed where the configuration says Learned. endpoints_path: the static file,
    needed unless the configuration says endpointslice. peer_token: shared secret of router and
    workers. metrics_token: opens /metrics. store_file, store_url: where the configured store is.
    config_path: watched for changed settings. retraining_dir, training_data: where the predictor
    is trained again, and what from beside labels. allowed_hosts: where `access.allowed_hosts` is
    absent. clock: monotonic seconds. rng: used for picking. address: host and port that it is
    served at, which a gateway is told. gateway_tls: folder of the certificate for `gateway_port`.
    """

    def __init__(
        self,
        config: RouterConfig,
        *,
        predictor: Predictor | None = None,
        artifact_path: Path | None = None,
        endpoints_path: Path | None = None,
        peer_token: Secrets | str | None = None,
        key_secret: Secrets | bytes | None = None,
        metrics_token: Secrets | str | None = None,
        store_file: Path | None = None,
        store_url: str | None = None,
        config_path: Path | None = None,
        retraining_dir: Path | None = None,
        training_data: Path | None = None,
        allowed_hosts: Sequence[str] | None = None,
        client: UpstreamClient | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        rng: random.Random | None = None,
        tracing: Tracing | None = None,
        address: tuple[str, int] | None = None,
        gateway_tls: Path | None = None,
    ) -> None:
        self._config_path = config_path
        self._predictor = PredictorInUse(config, predictor, artifact_path)
        predictor = self._predictor.current
        self.picker = Picker(config.picking, rng or random.Random(), clock, config.failover)
        changed = asyncio.Event()
        self.workers = KnownWorkers(config, self.picker, endpoints_path, changed.set)
        metrics = Metrics([tier.name for tier in config.tiers])
        prices = Prices(config)
        ledger = Ledger(config, clock)
        store = Store(
            configured_backend(config.store, store_file, store_url),
            wall_clock=wall_clock,
            flush_s=config.store.flush_s,
        )
        steering = Steering(
            config, prices, predictor, metrics, clock, ledger.budget, ledger.unbilled
        )
        client = client or UpstreamClient(
            connect_timeout_s=config.failover.connect_timeout_s,
            stall_timeout_s=config.failover.stall_timeout_s,
            outward=config.outward.rule,
        )
        routing = Routing(config, predictor, self.picker, steering, ledger, metrics, clock)
        labels = Labels(store)
        judge_keys = JudgeKeys(config, clock)

        async def ask_judge(judge: JudgeConfig, body: bytes) -> tuple[int, bytes]:
            return await judge_keys.post(client, judge, body)

        learner = Learner(
            config.learning,
            config.replicas,
            labels,
            store,
            ledger,
            metrics,
            ask_judge,
            routing.unfit,
            clock,
            wall_clock,
            (rng or random.Random()).random,
        )
        quality = LiveQuality(
            config,
            labels,
            store,
            steering,
            metrics,
            prices.cheapest,
            prices.dearest,
            wall_clock,
        )
        answer_judge = AnswerJudge(
            config, learner, quality.opinions, ledger, metrics, ask_judge, clock
        )
        decisions = DecisionLog(config.decisions_kept)
        self.services = Services(
            config=config,
            picker=self.picker,
            client=client,
            prices=prices,
            routing=routing,
            steering=steering,
            ledger=ledger,
            store=store,
            labels=labels,
            learner=learner,
            quality=quality,
            answer_judge=answer_judge,
            metrics=metrics,
            decisions=decisions,
            tally=Tally(metrics, decisions, store),
            clock=clock,
            wall_clock=wall_clock,
            peer_tokens=_secrets(peer_token),
            external_keys=ProviderKeys(config, clock),
            workers_changed=changed,
            reuse=Reuse(config, clock),
            arrivals=Arrivals((tier.name for tier in config.tiers), metrics),
            tracing=tracing,
        )
        self._retraining = self._make_retraining(retraining_dir, training_data)
        self.services.retraining = self._retraining
        self._predictor.on_kind, self._predictor.on_artifact = self._use, self._mounted
        self.keys = Authenticator(config.tenants, _secrets(key_secret), store, wall_clock)
        self.settings = LiveSettings(self.services, self.keys)
        self._access = AdminAccess(self.services.peer_tokens, _secrets(metrics_token))
        self.shared = SharedLimits(ledger, clock)
        if config.store.type == "postgres":
            store.on_flush = self.shared.step
            store.on_trouble = self.shared.check
            store.on_close = self.shared.release
        store.on_keys = self._keys_changed
        store.on_open = self._store_opened
        self._data_path = DataPath(self.services, self.keys)
        self.settings.check.append(self.workers.check)
        self.settings.on_change += [
            self.workers.reconfigure,
            self._predictor.reconfigure,
            self._data_path.reconfigure,
        ]
        if self._retraining is not None:
            self.settings.on_change.append(self._retraining.reconfigure)
        self._address = address
        if config.gateway_port is not None:
            importlib.import_module("tandem_router.gateway.server")  # says what is missing
        self._certificate = _certificate(config, gateway_tls)
        self._default_hosts = allowed_hosts
        self.control = control_app(
            self.services, self.keys, self.settings, lambda: self.is_ready, self.running
        )

    def _make_retraining(self, folder: Path | None, data: Path | None) -> Retraining | None:
        """What trains the predictor again; None where nobody asks for it."""
        services, artifact = self.services, self._predictor.artifact
        if services.config.predictor.retraining is None or artifact is None:
            return None
        if folder is None:
            raise ConfigError("predictor.retraining needs --retraining-dir FOLDER")
        measured = services.quality.measured
        backend = services.store.backend if services.config.store.type == "postgres" else None
        retraining = Retraining(
            services.config,
            artifact,
            services.store,
            StoreArchive(backend, folder, services.clock)
            if backend is not None
            else FolderArchive(folder),
            lambda labels: self._predictor_changed(artifact, labels),
            services.wall_clock,
            data,
        )
        services.quality.attach(retraining)
        told = measured.on_change

        def changed(change: Change) -> None:
            told(change)
            retraining.changed(change)

        measured.on_change = changed
        return retraining

    def _use(self, predictor: Predictor | None) -> None:
        services = self.services
        services.routing.predict_by(predictor)
        services.steering.predictor_changed(predictor)
        services.quality.measured.states(services.steering.states_quality)
        services.quality.predictor_changed()

    def _mounted(self, predictor: Predictor) -> None:
        self._predictor_changed(predictor)
        if self._retraining is not None:
            self._retraining.mounted()

    @property
    def config(self) -> RouterConfig:
        """As it is in force."""
        return self.services.config

    @property
    def _allowed_hosts(self) -> Sequence[str] | None:
        named = self.config.access.allowed_hosts
        return named if named is not None else self._default_hosts

    def _keys_changed(self) -> None:
        self.keys.refresh()
        self.services.ledger.set_keys(
            {key.id: (f"API key {key.id}", key) for key in self.services.store.keys.values()}
        )

    def _predictor_changed(self, predictor: Predictor, labels: Sequence[Label] = ()) -> None:
        """labels: not trained from, with what it says of them."""
        self.services.steering.predictor_changed(predictor)
        self.services.routing.scorer.predictor_changed()
        self.services.quality.predictor_changed(labels)

    def _store_opened(self, before: Sequence[Spend]) -> None:
        """Go on counting where earlier processes stopped."""
        self.services.learner.restore(before)
        self.services.answer_judge.restore(before)
        for row in before:
            if row.tenant != LEARNING:
                self.services.decisions.add_totals(row.tier, row)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.control(scope, receive, send)
            return
        if scope["method"] == "HEAD":
            scope, send = {**scope, "method": "GET"}, _without_body(send)
        if self._allowed_hosts is not None and scope["path"] not in OPEN_PATHS:
            try:
                check_host(scope["headers"], self._allowed_hosts)
            except ApiError as error:
                await respond_error(send, error, new_request_id())
                return
        if DataPath.handles(scope["path"]):
            await self._data_path(scope, receive, send)
        elif self.keys.required and not self._access.allows(scope["path"], scope["headers"]):
            await self._access.refuse(scope["path"], send)
        else:
            await self._controlled(scope, receive, send)

    def direct(self, exchange: Exchange) -> Awaitable[None] | None:
        """The answer to a request whose head has been read before; None: ask as ASGI says."""
        head = exchange.head
        if head is None:
            return None
        known: tuple[RouterConfig, Reading | None] | None = head.reading
        if known is None or known[0] is not self.services.config:
            known = head.reading = (self.services.config, self._read(head))
        return None if known[1] is None else self._data_path.answer(exchange, known[1])

    def _read(self, head: Head) -> Reading | None:
        if self._allowed_hosts is not None:
            try:
                check_host(head.headers, self._allowed_hosts)
            except ApiError:
                return None
        return self._data_path.read(head)

    async def _controlled(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The framework gets what is bounded, is JSON, and does not come from a foreign page."""
        try:
            parse_headers(scope["headers"], self.config.limits)
            check_writes(scope["method"], scope["headers"])
            body = b""
            if scope["method"] != "GET":
                body = await read_body(scope, receive, self.config.limits)
                if body:
                    parse_json(body, self.config.limits.max_json_depth)
        except ApiError as error:
            await respond_error(send, error, new_request_id())
            return
        except ClientGone:
            return
        told = False

        async def replay() -> Message:
            nonlocal told
            if told:
                return await receive()
            told = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.control(scope, replay if body else receive, send)

    def set_table(self, table: EndpointTable) -> None:
        """Take a new table of workers, as the discovery does."""
        self.workers.take(table)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Background work: endpoints and load reports."""
        store = self.services.store
        self.workers.follow()
        await store.step()  # what was known before counts from the first request on
        if self._retraining is not None:
            await self._retraining.prepare()
        tasks = [begin(work, "background work stopped") for work in self._work_beside_requests()]
        try:
            async with self._gateway():
                yield
        finally:
            await self.services.learner.close()
            self._predictor.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self.workers.close()
            self.services.routing.scorer.close()
            self.services.routing.answers.close()
            self.services.client.close()
            if self.services.tracing is not None:
                await asyncio.to_thread(self.services.tracing.close)

    def _work_beside_requests(self) -> Iterator[Coroutine[Any, Any, None]]:
        config, services = self.config, self.services
        yield poll_loads(
            self.picker,
            services.client,
            poll_s=config.picking.load_poll_s,
            peer_token=lambda: services.peer_token,
            pools=lambda: {t.name: t for t in self.config.tiers if t.kind == "pool"},
            dead_after_s=lambda: self.config.failover.dead_after_s,
            on_change=services.workers_changed.set,
        )
        yield self._predictor.watch()
        yield services.store.run()
        yield services.quality.run()
        if self._retraining is not None:
            yield self._retraining.run()
        if self._config_path is not None:
            yield self.settings.watch(self._config_path)

    @property
    def is_ready(self) -> bool:
        """Whether it should be sent requests.

        A Router whose tiers are all scaled to zero takes requests and holds them; one that has not
        heard of its workers yet, or reaches none of them, takes none.
        """
        asleep = self.workers.are_told and not any(self.picker.workers)
        return asleep or any(self.picker.num_usable(tier.name) for tier in self.config.tiers)

    @asynccontextmanager
    async def _gateway(self) -> AsyncIterator[None]:
        """The port at which a gateway asks, where there is one."""
        config = self.config
        if config.gateway_port is None or self._address is None:
            yield
            return
        from tandem_router.gateway.server import serving

        host, http_port = self._address
        home = f"[{host}]:{http_port}" if ":" in host else f"{host}:{http_port}"
        port, drain_s = config.gateway_port, config.drain_timeout_s
        front, certificate = self.front(home), self._certificate
        async with serving(front, host, port, lambda: self.is_ready, drain_s, certificate):
            yield

    def front(self, home: str) -> Front:
        """What a gateway's conversations share with this router's own address, `home`."""
        from tandem_router.gateway.session import Front

        path = self._data_path
        return Front(self.services, self.keys.caller, path.bodies, lambda: path.declared, home)


def _certificate(config: RouterConfig, folder: Path | None) -> CertificateFolder | None:
    """What a gateway that asks is shown; raises ConfigError where none can ask."""
    if folder is None:
        return None
    if config.gateway_port is None:
        raise ConfigError("--gateway-tls is for gateways that ask; set gateway_port, too")
    from tandem_router.gateway.certificate import CertificateFolder

    return CertificateFolder(folder)


def _without_body(send: Send) -> Send:
    """HEAD: the headers of GET."""

    async def headers_only(message: Message) -> None:
        if message["type"] == "http.response.body":
            message = {**message, "body": b""}
        await send(message)

    return headers_only


def _secrets(given: Secrets | str | bytes | None) -> Secrets:
    """One secret that never changes, or those that are read anew; none where there is none."""
    if callable(given):
        return given
    text = given.encode() if isinstance(given, str) else given
    fixed = (text,) if text else ()
    return lambda: fixed
