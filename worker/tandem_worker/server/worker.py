"""One worker put together: model, engine thread and both ends of the KV link."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tandem_worker.config import WorkerConfig
from tandem_worker.engine.constraints import ConstraintFactory, GrammarError, open_tokenizer
from tandem_worker.engine.sampling import SamplingParams
from tandem_worker.errors import RequestError, WorkerError
from tandem_worker.metrics import WorkerMetrics
from tandem_worker.models.embedding_settings import EmbeddingSettings, read_embedding_settings
from tandem_worker.scheduling.kv_blocks import BlockManager
from tandem_worker.scheduling.places import FairGate, Places
from tandem_worker.scheduling.scheduler import Scheduler, SchedulerLimits
from tandem_worker.scheduling.sequence import Sequence as ScheduledSequence
from tandem_worker.server.grammar_check import GrammarCheck
from tandem_worker.server.http_server import url_of
from tandem_worker.server.peer_client import request_json
from tandem_worker.server.surprises import context_notes, say_what_surprises
from tandem_worker.telemetry.tracing import Tracing

if TYPE_CHECKING:
    from tandem_worker.dialects.reader import AnswerReader
    from tandem_worker.disaggregation.decode_side import RemotePrefill
    from tandem_worker.disaggregation.prefill_side import PrefillService
    from tandem_worker.engine.qualification import Qualification
    from tandem_worker.engine.runner import ModelRunner
    from tandem_worker.engine.thread import EngineLoad, EngineThread
    from tandem_worker.models.identity import WeightsIdentity
    from tandem_worker.openai.context import RequestContext
    from tandem_worker.openai.request import CompletionRequest
    from tandem_worker.server.generation import Generation
    from tandem_worker.tokenization.tokenizer import Tokenizer
    from tandem_worker.transfer import KVLayout, KVReceiver, KVSender

logger = logging.getLogger(__name__)

NUM_PREPARING = 4
"""Prompts rendered and tokenized at once; a chat template renders one at a time anyway."""


class Worker:
    """One worker in the running event loop.

    Args:
        config: Settings.
        weights_dir: A Hugging Face model directory.
        host: Address of this worker; KV blocks arrive there.
        port: Port of the HTTP server around it.
        name: How peers' errors call this worker: its pod.
        peer_token: Shared secret that peers must send, or what reads the ones that hold now, the
            first to send; empty for none.
    """

    tokenizer: Tokenizer
    engine: EngineThread
    constraints: ConstraintFactory

    def __init__(
        self,
        config: WorkerConfig,
        weights_dir: Path,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        peer_token: Callable[[], Sequence[bytes]] | bytes = b"",
        name: str = "",
    ) -> None:
        self.config = config
        self.weights_dir = weights_dir
        self.host = host
        self.port = port
        fixed = (peer_token,) if isinstance(peer_token, bytes) and peer_token else ()
        self.peer_tokens: Callable[[], Sequence[bytes]] = (
            peer_token if callable(peer_token) else lambda: fixed
        )
        self.name = name or f"{config.served_model} at {self.url}"
        self.metrics = WorkerMetrics(config.served_model)
        self.tracing = Tracing()
        self.started_at = int(time.time())
        self.max_model_len = 0
        self._notes: list[str] = []
        self.vocab_size = 0
        self.hidden_size = 0
        self.sampling_defaults: dict[str, float] = {}
        self.is_draining = False
        self.num_requests = 0
        self.places = Places(config.max_num_seqs, config.max_waiting)
        """For sequences, from a request's admission to its end."""
        self.preparing = FairGate(NUM_PREPARING)
        """For whoever renders and tokenizes."""
        self._is_loaded = False
        self._load_error: str | None = None
        self._eos: frozenset[int] = frozenset()
        self._receiver: KVReceiver | None = None
        self._sender: KVSender | None = None
        self.remote_prefill: RemotePrefill | None = None
        """Asks prefill workers; None until loaded and in other roles than decode."""
        self._prefill_service: PrefillService | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self.kv_layout: KVLayout | None = None
        """Shape of the KV blocks that travel; None until loaded and in a unified worker."""
        self._weights: dict[str, str] = {}
        self._qualification: dict[str, str] = {}
        self.embedding = EmbeddingSettings()
        self._runner: ModelRunner | None = None
        self.metrics.watch(
            lambda: self.engine.load if self._is_loaded else None,
            lambda: self.engine.core.counters if self._is_loaded else None,
        )
        self.metrics.watch_transfer(
            lambda: self._receiver.stats() if self._receiver is not None else None
        )

    # -- state -----------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        """Base URL of the HTTP server."""
        return url_of(self.host, self.port)

    @property
    def is_ready(self) -> bool:
        """Loaded, healthy and accepting requests."""
        return self._is_loaded and not self.is_draining and self.failure is None

    @property
    def failure(self) -> str | None:
        """Why the worker cannot serve, or None; a step that hung may still end."""
        if self._load_error is not None:
            return self._load_error
        if self._is_loaded and not self.engine.is_alive:
            return "the engine thread has ended"
        if self._runner is not None and self._runner.failure is not None:
            return self._runner.failure
        if self._is_loaded and self.engine.is_hanging:
            return "a step hangs: no layer was finished for a minute"
        return self.engine.broken if self._is_loaded else None

    @property
    def kv_address(self) -> str | None:
        """Where KV blocks arrive, IP:PORT; None until loaded and in other roles than decode."""
        return self._receiver.address if self._receiver is not None else None

    @property
    def prefill_service(self) -> PrefillService:
        """Serves /internal/prefill.

        Raises:
            RequestError: this worker has no KV link.
        """
        if self._prefill_service is None:
            raise self._no_kv_link()
        return self._prefill_service

    def _no_kv_link(self) -> RequestError:
        return RequestError(
            f"this worker's role is {self.config.role}, so it has no KV link; ask a prefill worker",
            status=409,
            code="wrong_role",
        )

    @property
    def revision(self) -> str:
        """What pairs prefill and decode workers: the configuration's, and the weights' digest.

        Without the digest while they load.
        """
        digest = self._weights.get("digest")
        if not self.config.revision or digest is None:
            return self.config.revision
        return f"{self.config.revision}-{digest[:12]}"

    def check_loaded(self) -> None:
        """Raise a 503 RequestError while the model loads."""
        if not self._is_loaded:
            raise RequestError(
                "the model is still loading; try again shortly",
                status=503,
                type="server_error",
                code="loading",
                headers={"retry-after": "1"},
            )

    def check_accepting(self) -> None:
        """Raise a 503 RequestError unless new work is welcome."""
        self.check_loaded()
        if self.is_draining:
            raise RequestError(
                "this worker is draining; send the request to another one",
                status=503,
                type="server_error",
                code="draining",
                headers={"retry-after": "1", "x-tandem-draining": "1"},
            )

    async def check_format(self, sampling: SamplingParams) -> None:
        """Raise a 400 RequestError where the answer's format cannot be had."""
        grammar = sampling.grammar
        if not grammar or self.constraints.knows(grammar):
            return
        if not self._eos:
            raise RequestError(
                "this model has no end token, so no formatted answer could end; ask for text",
                code="unsupported_parameter",
            )
        try:
            await self._grammar_check.check(grammar)
            await asyncio.to_thread(self.constraints.create, sampling)
        except GrammarError as error:
            raise RequestError(
                f"the answer's format cannot be used: {error}", code="invalid_format"
            ) from error

    def load(self) -> dict[str, Any]:
        """The body of GET /v1/load."""
        load: EngineLoad | None = self.engine.load if self._is_loaded else None
        core = self.engine.core if self._is_loaded else None
        return {
            "role": self.config.role,
            "served_model": self.config.served_model,
            "revision": self.revision,
            "weights": self._weights,
            "qualification": self._qualification,
            "ready": self.is_ready,
            "draining": self.is_draining,
            "num_running": load.num_running if load else 0,
            "num_waiting": load.num_waiting + load.num_awaiting_kv if load else 0,
            "pending_prefill_tokens": load.pending_prefill_tokens if load else 0,
            "expected_tokens": load.expected_tokens if load else 0,
            "kv_blocks": {
                "total": load.blocks_total if load else 0,
                "free": load.blocks_free if load else 0,
                "cached": load.blocks_cached if load else 0,
                "used": load.blocks_used if load else 0,
            },
            "block_size": self.config.block_size,
            "max_model_len": self.max_model_len,
            "kv_address": self.kv_address,
            "step_time_s": core.counters.step_time_s if core else 0.0,
            "profile": core.profile.as_dict() if core else None,
            "capabilities": self.capabilities(),
            "notes": self._notes,
        }

    def capabilities(self) -> dict[str, Any]:
        """What a body may ask of this worker; the router leaves it out otherwise."""
        formats = self._is_loaded and bool(self._eos)
        return {
            "tools": formats and self.tokenizer.dialect.calls is not None,
            "structured_output": formats,
            "images": False,
            "logprobs": True,
            "embeddings": self._is_loaded and not self.embedding.problem,
            "context_length": self.max_model_len,
        }

    # -- life ------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Load the model, link to the peers, and become ready.

        Raises:
            WorkerError: the model or the KV port cannot be used.
        """
        self.tracing.begin("tandem-worker")
        try:
            await self._load_model()
        except WorkerError as error:
            self._load_error = str(error)
            raise
        self._is_loaded = True

    async def _load_model(self) -> None:
        started = time.perf_counter()
        # torch is imported here, in another thread, so that probes are answered meanwhile.
        runner, tokenizer, identity, qualification = await asyncio.to_thread(
            _load, self.config, self.weights_dir
        )
        self._weights = identity.as_dict()
        self.embedding = await asyncio.to_thread(read_embedding_settings, self.weights_dir)
        self._qualification = qualification.as_dict()
        self._runner = runner
        from tandem_worker.engine.core import EngineCore
        from tandem_worker.engine.profile import StepProfile
        from tandem_worker.engine.thread import EngineThread

        config = self.config
        self.tokenizer = tokenizer
        self.max_model_len = runner.max_model_len
        self._notes = context_notes(config, runner)
        self.vocab_size = runner.spec.vocab_size
        self._eos = runner.spec.eos_token_ids
        self.sampling_defaults = dict(runner.spec.sampling_defaults)
        self.hidden_size = runner.spec.hidden_size
        self._prepare_formats(runner.spec.vocab_size)
        profile = StepProfile()
        scheduler = Scheduler(
            BlockManager(runner.num_blocks, prefix_cache=config.prefix_cache),
            SchedulerLimits(
                max_num_seqs=config.max_num_seqs, max_batched_tokens=config.max_batched_tokens
            ),
            order=config.scheduler,
            service_time=lambda s: profile.service_time_s(
                s.num_computed_tokens, s.num_uncomputed_tokens, s.remaining_output_tokens
            ),
            choose_remote=self._choose_remote,
            step_costs=profile.step_costs,
        )
        core = EngineCore(runner, scheduler, eos_token_ids=self._eos, profile=profile)
        self.engine = EngineThread(core, asyncio.get_running_loop())
        if config.role != "unified":
            await self._link_kv(runner)
        self.engine.start()
        logger.info(
            "%s (%s): weights %s, %d parameters, %d KV blocks, context %d, loaded in %.1f s",
            config.served_model,
            config.role,
            self._weights["digest"][:16],
            runner.spec.num_parameters,
            runner.num_blocks,
            self.max_model_len,
            time.perf_counter() - started,
        )

    @property
    def peer_token(self) -> bytes:
        """The token to send now; empty without one."""
        return next(iter(self.peer_tokens()), b"")

    def _peer_headers(self, sequence_id: str) -> dict[str, str]:
        token = self.peer_token
        own = {"x-tandem-peer-token": token.decode()} if token else {}
        return own | self.tracing.headers(sequence_id)

    def _prepare_formats(self, vocab_size: int) -> None:
        text = self.tokenizer.to_json()
        num_ids = max(vocab_size, self.tokenizer.vocab_size)
        self.constraints = ConstraintFactory(open_tokenizer(text, num_ids, self._eos), vocab_size)
        self._grammar_check = GrammarCheck(text, num_ids, self._eos)

    async def _link_kv(self, runner: Any) -> None:
        """Set up both ends of the KV link; a unified worker has neither."""
        from tandem_worker.disaggregation.decode_side import RemotePrefill
        from tandem_worker.disaggregation.prefill_side import PrefillService
        from tandem_worker.transfer import KVPool, TransferError, create_receiver, create_sender
        from tandem_worker.transfer.sharded_memory import ShardedKVPool

        settings = self.config.transfer
        parts = [KVPool(part, weights=self._weights["digest"]) for part in runner.kv_parts]
        pool = parts[0]
        if len(parts) > 1:
            pool = ShardedKVPool(parts, runner.spec.num_kv_heads)
        self.kv_layout = pool.layout
        token = self.peer_tokens if self.peer_tokens() else None
        if self.config.role == "decode":
            self._receiver = create_receiver(
                pool,
                token=token,
                max_inflight_bytes=settings.max_inflight_bytes,
            )
            try:
                await self._receiver.start(self.host, self.config.kv_port)
            except TransferError as error:
                raise WorkerError(str(error)) from error
            self.remote_prefill = RemotePrefill(
                self.engine,
                self._receiver,
                self.metrics,
                call=request_json,
                headers=self._peer_headers,
                attempts=settings.attempts,
                reserve_timeout_s=settings.reserve_timeout_s,
            )
        self._sender = create_sender(
            pool,
            token=token,
            checksum=settings.checksum,
            name=self.name,
        )
        self._prefill_service = PrefillService(
            self.engine,
            self._sender,
            self.metrics,
            create_constraint=self.constraints.create,
            vocab_size=self.vocab_size,
            max_model_len=self.max_model_len,
        )

    def start_draining(self) -> None:
        """Refuse new requests from now on; running ones go on."""
        if not self.is_draining:
            logger.info("draining: %d requests run", self.num_requests)
            self.is_draining = True

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and wait for the running ones; says whether all finished."""
        self.start_draining()
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            logger.warning("drain timeout: %d requests are cut off", self.num_requests)
            return False
        return True

    async def stop(self) -> None:
        """Close everything; running requests are cut off."""
        if self.remote_prefill is not None:
            await self.remote_prefill.aclose()
        for side in (self._sender, self._receiver):
            if side is not None:
                await side.aclose()
        if hasattr(self, "_grammar_check"):
            await self._grammar_check.aclose()
        if hasattr(self, "engine"):
            await asyncio.to_thread(self.engine.stop)
        if self._runner is not None:
            await asyncio.to_thread(self._runner.close)
        await asyncio.to_thread(self.tracing.close)

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Count a request as running, for draining."""
        self.num_requests += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.num_requests -= 1
            if self.num_requests == 0:
                self._idle.set()

    # -- work ------------------------------------------------------------------------------------

    def generate(
        self,
        request: CompletionRequest,
        prompts: Sequence[tuple[int, ...]],
        context: RequestContext,
        max_tokens: int,
        make_reader: Callable[[], AnswerReader | None],
    ) -> Generation:
        """Set up one request's generation."""
        from tandem_worker.server.generation import Generation

        if any(request.resume_token_ids):
            self.metrics.resumed.inc()
        return Generation(
            request=request,
            prompts=prompts,
            context=context,
            max_tokens=max_tokens,
            engine=self.engine,
            remote=self.remote_prefill,
            tokenizer=self.tokenizer,
            eos_token_ids=self._eos,
            metrics=self.metrics,
            create_constraint=self.constraints.create,
            make_reader=make_reader,
        )

    async def check_kv_link(self, address: str) -> dict[str, Any]:
        """Push one test block to a decode worker and compare checksums."""
        from tandem_worker.transfer import kv_link_check

        if self._sender is None or self.kv_layout is None:
            raise self._no_kv_link()
        return asdict(await kv_link_check(self._sender, address, self.kv_layout))

    def _choose_remote(self, sequence: ScheduledSequence, uncached: int) -> bool:
        """Called by the scheduler, in the engine's thread."""
        limit = self.config.local_prefill_max_tokens
        if limit is not None:
            return uncached > limit
        assert self.remote_prefill is not None
        start = len(sequence.token_ids) - uncached
        core = self.engine.core
        return self.remote_prefill.costs.remote_is_cheaper(
            uncached, core.profile.prefill_time_s(start, uncached), len(core.scheduler.running)
        )


def _load(
    config: WorkerConfig, weights_dir: Path
) -> tuple[Any, Tokenizer, WeightsIdentity, Qualification]:
    from tandem_worker.engine.qualification import qualify
    from tandem_worker.models.files import check_formats, names_in
    from tandem_worker.models.identity import identify
    from tandem_worker.server.exact_answers import PROMPTS, asked
    from tandem_worker.tokenization.tokenizer import Tokenizer

    check_formats(names_in(weights_dir), str(weights_dir))
    identity = identify(weights_dir)
    tokenizer = Tokenizer(weights_dir)
    runner = _runner(config, weights_dir)
    runner.end_with(tokenizer.eos_token_ids)
    say_what_surprises(config, runner, tokenizer)
    try:
        runner.warm_up()
        qualification = qualify(
            runner,
            lambda: [asked(tokenizer, text) for text in PROMPTS],
            weights_dir,
            max_loss=config.max_loss,
        )
    except WorkerError:
        runner.close()
        raise
    if qualification.state != "exact":
        logger.log(
            logging.INFO if qualification.state == "within_loss" else logging.WARNING,
            "%s",
            qualification.message,
        )
    return runner, tokenizer, identity, qualification


def _runner(config: WorkerConfig, weights_dir: Path) -> ModelRunner:
    if config.tensor_parallel == 1:
        from tandem_worker.engine.runner import ModelRunner

        return ModelRunner(config, weights_dir)
    from tandem_worker.engine.tensor_parallel import TensorParallelRunner

    return TensorParallelRunner(config, weights_dir)
