"""What goes into the engine and what comes out, as plain values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from tandem_worker.engine.drawn import Drawn, TokenLogprobs
from tandem_worker.engine.packing import BlockRow
from tandem_worker.engine.sampling import SamplingParams
from tandem_worker.errors import RequestError
from tandem_worker.scheduling.sequence import Chunk
from tandem_worker.scheduling.sequence import Sequence as ScheduledSequence

if TYPE_CHECKING:
    from tandem_worker.engine.pooling import Pooling

FinishReason = Literal["stop", "length", "abort", "error"]


class Constraint(Protocol):
    """Decides which tokens may come; :class:`~tandem_worker.engine.constraints.TokenConstraint`."""

    def mask(self, token_ids: Sequence[int], num_prompt_tokens: int) -> bytes: ...


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """A generated token; the last one of an answer carries the reason."""

    token_id: int
    logprobs: TokenLogprobs | None
    finish_reason: FinishReason | None
    num_cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class PromptLogprobsEvent:
    """Log-probabilities of the prompt's tokens from the second on (echo), before any token."""

    logprobs: tuple[TokenLogprobs, ...]
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class VectorEvent:
    """The prompt's vector; the request's end."""

    vector: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class ReservedEvent:
    """Blocks are reserved for a remote prefill.

    ``token_ids`` is the sequence so far: the prompt, and what was generated before a preemption.
    ``block_ids`` cover its positions from ``num_computed_tokens`` (block aligned) on.
    """

    token_ids: tuple[int, ...]
    block_ids: tuple[int, ...]
    num_computed_tokens: int


@dataclass(frozen=True, slots=True)
class ErrorEvent:
    """The request failed inside the engine.

    Attributes:
        status: 400 where the request itself is at fault, so that nobody tries it again.
    """

    message: str
    code: str | None = None
    status: int = 500

    def as_refusal(self) -> RequestError:
        """What the client is told, whole or at the end of its stream."""
        if self.status == 400:
            return RequestError(self.message, code=self.code)
        return RequestError(
            f"the engine failed: {self.message}",
            status=self.status,
            type="server_error",
            code=self.code,
        )


Event = TokenEvent | PromptLogprobsEvent | VectorEvent | ReservedEvent | ErrorEvent
Sink = Callable[[Event], None]
"""Called in the event loop's thread."""


class BlockPush(Protocol):
    """The part of a transfer's push that the engine drives: any thread, never waits."""

    @property
    def failure(self) -> Exception | None: ...

    def layer_blocks_nowait(
        self, layer: int, local_block_ids: Sequence[int], remote_block_ids: Sequence[int]
    ) -> None: ...


@dataclass(slots=True, eq=False)
class EngineRequest:
    """One sequence with everything the engine needs to compute it.

    Attributes:
        sequence: The scheduler's view.
        sampling: How to draw.
        sink: Receives the events.
        push: Where to push blocks as layers finish (prefill role), or None.
        remote_block_ids: Target blocks of the push, from position ``push_from_tokens`` on.
        constraint: Which tokens may be drawn, or None for all.
        pooling: How the prompt becomes a vector; then nothing is drawn.
        prompt_logprobs: Number of alternatives per prompt token, or None for no echo.
        blocks: The sequence's block ids as the runner reads them.
    """

    sequence: ScheduledSequence
    sampling: SamplingParams
    sink: Sink
    push: BlockPush | None = None
    remote_block_ids: tuple[int, ...] = ()
    push_from_tokens: int = 0
    num_pushed_blocks: int = 0
    constraint: Constraint | None = None
    prompt_logprobs: int | None = None
    pooling: Pooling | None = None
    collected_logprobs: list[TokenLogprobs] = field(default_factory=list)
    blocks: BlockRow = field(default_factory=BlockRow)

    @property
    def request_id(self) -> str:
        """The sequence's id."""
        return self.sequence.request_id

    @property
    def num_generated(self) -> int:
        """Tokens after the prompt, resumed ones included."""
        return len(self.sequence.token_ids) - self.sequence.num_prompt_tokens


@dataclass(frozen=True, slots=True)
class Work:
    """One chunk of the step with its request."""

    chunk: Chunk
    request: EngineRequest

    @property
    def draws(self) -> bool:
        """Whether a token is drawn after this chunk."""
        return self.chunk.samples and self.request.pooling is None


class Runner(Protocol):
    """Computes steps: :class:`~tandem_worker.engine.runner.ModelRunner`, or a fake in tests."""

    num_blocks: int

    def execute(
        self,
        work: Sequence[Work],
        num_decodes: int,
        on_layer: Callable[[int], None] | None,
    ) -> list[Drawn]:
        """Compute the chunks; one drawn token per chunk that reaches its sequence's end."""
        ...
