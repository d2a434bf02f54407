"""Turns a scheduled step into tensors, runs the model and draws tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from tandem_kernels import dispatch
from tandem_kernels.checks import KernelArgumentError
from tandem_kernels.sampler import sample
from tandem_kernels.warm_up import EngineShapes, ExpertLayers, warm_up
from tandem_worker.config import BLOCK_SIZE, WorkerConfig
from tandem_worker.engine.drawn import Drawn, Sampled, TokenLogprobs
from tandem_worker.engine.masks import MaskBuilder
from tandem_worker.engine.packing import pack
from tandem_worker.engine.requests import EngineRequest, Event, Work
from tandem_worker.engine.row_tables import RowTables
from tandem_worker.engine.sampling import SamplingParams, as_int64
from tandem_worker.errors import ConfigError
from tandem_worker.models.checkpoint import load_weights
from tandem_worker.models.cpu_linear import computes_bfloat16
from tandem_worker.models.cpu_transformer import CpuTransformer
from tandem_worker.models.kv_cache import QUANTIZED, Pair, allocate, token_bytes
from tandem_worker.models.sharding import WHOLE, Shard
from tandem_worker.models.spec import ModelSpec
from tandem_worker.models.transformer import Batch, Decodes, Prefills, Transformer
from tandem_worker.scheduling.sequence import Chunk
from tandem_worker.scheduling.sequence import Sequence as ScheduledSequence

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_DEFAULT_CPU_KV_BYTES = 256 * 1024 * 1024
_GPU_KV_FRACTION = 0.8


class ModelRunner:
    """A model, its KV caches and the step function, on one device.

    Args:
        config: Sizes, device and dtype.
        weights_dir: A Hugging Face model directory.
        shard: The part of the model that this process computes.
        reduce: Sums a tensor over all parts; needed where there are several.
        kv_file: Memory to hold the KV caches in, which another process maps too.

    Raises:
        ConfigError: the device is absent or the KV blocks do not fit.
        ModelError: the directory cannot be used.
    """

    failure: str | None = None
    """Why no step can be computed any more, or None."""

    def __init__(
        self,
        config: WorkerConfig,
        weights_dir: Path,
        *,
        shard: Shard = WHOLE,
        reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
        kv_file: str | None = None,
    ) -> None:
        torch.set_num_threads(config.num_threads)
        self.spec = ModelSpec.load(weights_dir)
        self.own_spec = shard.spec(self.spec)
        self.device = _device(config)
        self._masks = MaskBuilder(self.device)
        self._rows = RowTables(self.spec.vocab_size, self.device)
        name: str = config.dtype
        if name == "auto":
            name = _own_dtype(self.spec, self.device)
        self.dtype = _DTYPES[name]
        self.kv_dtype = QUANTIZED.get(config.kv_cache_dtype, self.dtype)
        weights = load_weights(
            self.spec, weights_dir, dtype=self.dtype, device=self.device, shard=shard
        )
        self.num_blocks = self._count_blocks(config)
        fitting = self.num_blocks * BLOCK_SIZE
        self.max_model_len = min(config.max_model_len or self.spec.max_position, fitting)
        on_cpu = self.device.type == "cpu" and not dispatch.interpreting()
        self.model = (CpuTransformer if on_cpu else Transformer)(
            self.own_spec, weights, max_positions=self.max_model_len + 1, reduce=reduce
        )
        try:
            self.kv_caches = self._allocate(kv_file)
        except RuntimeError as error:  # torch's way to say that there is no such memory
            raise ConfigError(
                f"{self.num_blocks} KV blocks need {self.num_blocks * self.block_bytes >> 30} GiB "
                f"on {self.device}, which cannot be had; lower num_kv_blocks or kv_cache_bytes"
            ) from error

    @property
    def kv_parts(self) -> list[list[Pair]]:
        """The KV caches of each process of this worker, rank by rank."""
        return [self.kv_caches]

    @contextlib.contextmanager
    def exact_kv(self, num_blocks: int) -> Iterator[None]:
        """Meanwhile compute with so many KV blocks of the model's own type; the others rest."""
        own, kind = self.kv_caches, self.kv_dtype
        self.kv_dtype = self.dtype
        self.kv_caches = self._allocate(num_blocks=num_blocks)
        try:
            yield
        finally:
            self.kv_caches, self.kv_dtype = own, kind

    def _allocate(self, file: str | None = None, num_blocks: int | None = None) -> list[Pair]:
        spec = self.own_spec
        return allocate(
            spec.num_layers,
            self.num_blocks if num_blocks is None else num_blocks,
            spec.num_kv_heads,
            spec.head_dim,
            self.kv_dtype,
            self.device,
            file=file,
        )

    @property
    def block_bytes(self) -> int:
        """K and V of one block over all layers."""
        spec = self.own_spec
        tokens = 2 * spec.num_layers * spec.num_kv_heads * BLOCK_SIZE
        return tokens * token_bytes(spec.head_dim, self.kv_dtype)

    @torch.inference_mode()
    def execute(
        self,
        work: Sequence[Work],
        num_decodes: int,
        on_layer: Callable[[int], None] | None = None,
    ) -> list[Drawn]:
        """Compute the chunks; see :class:`Runner`."""
        masks = self._masks.begin(work)
        batch = self.pack(work, num_decodes)
        self._announce(batch)
        hidden = self.model.forward(batch, self.kv_caches, on_layer)
        ends = np.cumsum([item.chunk.num_tokens for item in work])
        sampling = [index for index, item in enumerate(work) if item.draws]
        for index, item in enumerate(work):
            if item.request.prompt_logprobs is not None:
                end = int(ends[index])
                self._score_prompt(item, hidden[end - item.chunk.num_tokens : end])
        drawn: list[Drawn] = [None] * len(work)
        for index, item in enumerate(work):
            pooling = item.request.pooling
            if pooling is not None:
                end = int(ends[index])
                pooling.add(hidden[end - item.chunk.num_tokens : end])
                if item.chunk.samples:
                    drawn[index] = pooling.finish()
        if not sampling:
            return drawn
        rows = hidden
        if len(sampling) != hidden.shape[0]:
            rows = hidden[torch.as_tensor(ends[sampling] - 1, device=self.device)]
        logits = self.model.logits(rows)
        requests = [work[index].request for index in sampling]
        allowed, failures = masks.finish(logits)
        tokens = self._draw(logits, requests, allowed)
        for row, (index, token) in enumerate(zip(sampling, tokens, strict=True)):
            drawn[index] = failures.get(row, token)
        return drawn

    def end_with(self, token_ids: frozenset[int]) -> None:
        """These end an answer too."""
        self.spec = replace(self.spec, eos_token_ids=self.spec.eos_token_ids | token_ids)

    def close(self) -> None:
        """Give up what outlives this object; here nothing."""

    def _announce(self, batch: Batch) -> None:
        """Tell whoever computes the other parts of the model; here nobody."""

    def warm_up(self) -> None:
        """Prepare for the first request: compile every kernel variant, then run a tiny prompt.

        Compilation is for GPUs; a CPU runs the kernels' references.

        Raises:
            ConfigError: the kernels have no form of this model for the device.
        """
        if self.device.type == "cuda":
            try:
                warm_up(self.kernel_shapes())
            except KernelArgumentError as error:  # fp8 codes on a GPU without them
                raise ConfigError(
                    f"the kernels cannot run this model on {self.device}: {error}; take a "
                    "checkpoint or a kv_cache_dtype of another format, or set device to cpu"
                ) from error
        sequence = ScheduledSequence("warm-up", [0, 0, 0], 3, block_ids=[0])
        request = EngineRequest(sequence, SamplingParams(), _ignore)
        self.execute([Work(Chunk(sequence, 0, 2), request)], 0)
        self.execute([Work(Chunk(sequence, 2, 1), request)], 1)

    def kernel_shapes(self) -> EngineShapes:
        """What decides which kernel variants :meth:`execute` launches, whatever the requests."""
        spec = self.own_spec
        return EngineShapes(
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            hidden_size=spec.hidden_size,
            intermediate_size=spec.intermediate_size,
            vocab_size=spec.vocab_size,
            dtype=self.dtype,
            kv_dtype=self.kv_dtype,
            qk_norm=spec.qk_norm,
            sliding_windows=spec.sliding_windows,
            quantized_linears=self.model.weights.quantized_linears(),
            experts=ExpertLayers(spec.num_experts, spec.expert_size) if spec.num_experts else None,
            device=str(self.device),
        )

    def pack(self, work: Sequence[Work], num_decodes: int) -> Batch:
        """The tensors of one step: decodes first, then chunks of prompts."""
        packed = pack([item.chunk for item in work], [i.request.blocks for i in work], num_decodes)
        starts = np.cumsum([0, *packed.counts], dtype=np.int32)

        def part(array: np.ndarray, which: slice) -> torch.Tensor:
            # A tensor of its own: kernels are compiled for arguments that begin at 16 bytes.
            return self._to_device(array[which].copy())

        first, rest = slice(num_decodes), slice(num_decodes, None)
        return Batch(
            token_ids=self._to_device(packed.tokens),
            positions=self._to_device(packed.positions),
            slot_mapping=self._to_device(packed.slots),
            num_decodes=num_decodes,
            decodes=Decodes(part(packed.tables, first), part(packed.lens, first))
            if num_decodes
            else None,
            prefills=Prefills(
                part(packed.tables, rest), self._to_device(starts), part(packed.lens, rest)
            )
            if packed.counts
            else None,
        )

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)

    # -- drawing ---------------------------------------------------------------------------------

    def _draw(
        self,
        logits: torch.Tensor,
        requests: Sequence[EngineRequest],
        allowed: torch.Tensor | None,
    ) -> list[Sampled]:
        params = [request.sampling for request in requests]
        if allowed is None and all(p.is_plain_greedy for p in params):
            return [Sampled(token) for token in _argmax(logits)]

        def column(values: Sequence[float]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.float32, device=self.device)

        def wide(values: Sequence[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int64, device=self.device)

        # All filters or none, so that the kernel variants are those that warm_up compiled; a
        # filter that is off for a row (0 or 1) costs that row nothing.
        filtered = any(p.top_k > 0 or p.top_p < 1 or p.min_p > 0 for p in params)
        penalised = any(p.has_penalties for p in params)
        prompt_mask, output_counts = self._rows.history(requests) if penalised else (None, None)
        wanted = [p.num_logprobs for p in params if p.num_logprobs is not None]
        out = sample(
            logits,
            temperature=column([p.temperature for p in params]),
            seeds=wide([as_int64(p.seed) for p in params]),
            positions=wide([len(request.sequence.token_ids) for request in requests]),
            top_k=wide([p.top_k for p in params]) if filtered else None,
            top_p=column([p.top_p for p in params]) if filtered else None,
            min_p=column([p.min_p for p in params]) if filtered else None,
            repetition_penalty=column([p.repetition_penalty for p in params])
            if penalised
            else None,
            frequency_penalty=column([p.frequency_penalty for p in params]) if penalised else None,
            presence_penalty=column([p.presence_penalty for p in params]) if penalised else None,
            prompt_mask=prompt_mask,
            output_counts=output_counts,
            logit_bias=self._bias(requests, allowed),
            return_logprobs=bool(wanted),
            num_top_logprobs=min(max(wanted, default=0), self.spec.vocab_size),
        )
        tokens = out.token_ids.tolist()
        if not wanted or out.logprobs is None:
            return [Sampled(token) for token in tokens]
        logprobs = out.logprobs.tolist()
        top_ids = out.top_token_ids.tolist() if out.top_token_ids is not None else None
        tops = out.top_logprobs.tolist() if out.top_logprobs is not None else None
        drawn = []
        for row, (token, p) in enumerate(zip(tokens, params, strict=True)):
            if p.num_logprobs is None:
                drawn.append(Sampled(token))
                continue
            top: tuple[tuple[int, float], ...] = ()
            if top_ids is not None and tops is not None:
                pairs = zip(top_ids[row], tops[row], strict=True)
                top = tuple(pairs)[: p.num_logprobs]
            drawn.append(Sampled(token, TokenLogprobs(logprobs[row], top)))
        return drawn

    def _bias(
        self, requests: Sequence[EngineRequest], allowed: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Additive bias per token; -inf on what may not come, end tokens before ``min_tokens``."""
        bias = self._rows.bias(requests, self.spec.eos_token_ids)
        if allowed is None:
            return bias
        if bias is None:
            bias = torch.zeros(allowed.shape, dtype=torch.float32, device=self.device)
        return bias.masked_fill(~allowed, -np.inf)

    def _score_prompt(self, item: Work, hidden: torch.Tensor) -> None:
        """Log-probabilities of the tokens that follow each position of the chunk."""
        chunk, request = item.chunk, item.request
        tokens = chunk.sequence.token_ids
        # The chunk's last position predicts a token that is drawn, not given, at the prompt's end.
        end = min(chunk.start + chunk.num_tokens, chunk.sequence.num_prompt_tokens - 1)
        targets = tokens[chunk.start + 1 : end + 1]
        num_top = min(request.prompt_logprobs or 0, self.spec.vocab_size)
        for offset in range(0, len(targets), 128):  # bounds the (rows, vocab) table
            part = targets[offset : offset + 128]
            logprobs = self.model.logits(hidden[offset : offset + len(part)]).log_softmax(-1)
            index = torch.tensor(part, dtype=torch.int64, device=self.device)
            chosen = logprobs.gather(-1, index[:, None]).squeeze(-1).tolist()
            values, ids = torch.topk(logprobs, num_top, dim=-1)
            for value, row_ids, row_values in zip(
                chosen, ids.tolist(), values.tolist(), strict=True
            ):
                top = tuple(zip(row_ids, row_values, strict=True))
                request.collected_logprobs.append(TokenLogprobs(value, top))

    def _count_blocks(self, config: WorkerConfig) -> int:
        if config.num_kv_blocks is not None:
            return config.num_kv_blocks
        budget = config.kv_cache_bytes
        if budget is None:
            budget = _DEFAULT_CPU_KV_BYTES
            if self.device.type == "cuda":
                free, _ = torch.cuda.mem_get_info(self.device)
                budget = int(free * _GPU_KV_FRACTION)
        count = budget // self.block_bytes
        if count < 2:
            raise ConfigError(
                f"kv_cache_bytes={budget} holds {count} blocks of {self.block_bytes} bytes; "
                f"give at least {2 * self.block_bytes}"
            )
        return int(count)


def _argmax(logits: torch.Tensor) -> list[int]:
    """Of each row the first of the greatest; on a CPU by numpy, whose search is vectorised."""
    if logits.is_cuda:
        return logits.argmax(-1).tolist()
    best: list[int] = logits.numpy().argmax(-1).tolist()
    return best


def _ignore(event: Event) -> None:
    """Takes a warm-up's events."""


def _device(config: WorkerConfig) -> torch.device:
    available = torch.cuda.is_available() if config.device != "cpu" else False
    if config.device == "cuda" and not available:
        raise ConfigError(
            "device='cuda', but torch finds no CUDA device; use 'auto' or 'cpu', or check the "
            "driver"
        )
    return torch.device("cuda" if available else "cpu")


def _own_dtype(spec: ModelSpec, device: torch.device) -> str:
    """The checkpoint's own type where the device computes it; float16 as bfloat16 on a CPU."""
    if device.type == "cuda":
        return spec.dtype if spec.dtype in _DTYPES else "bfloat16"
    is_half = spec.dtype in ("bfloat16", "float16")
    return "bfloat16" if is_half and computes_bfloat16() else "float32"
