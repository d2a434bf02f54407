"""What is known of a sequence while it is computed, and what one step computes of which. Pure."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import NamedTuple


@dataclass(slots=True)
class Waited:
    """What a sequence has waited, and what of it for itself; seconds by the costs of steps.

    Attributes:
        since_s: The clock when it came, less what it had waited by then.
        tenant_s: What its tenant had got by then.
        own_s: What it would have taken alone so far; None before its first token.
        prompt_s: What the first chunk of its prompt would have been alone.
        whole_s: The most of its tenant's prompts that one step wanted while it was among them.
    """

    since_s: float
    tenant_s: float
    own_s: float | None = None
    prompt_s: float = 0.0
    whole_s: float = 0.0


class State(enum.Enum):
    """Where a sequence stands."""

    WAITING = "waiting"
    RUNNING = "running"
    AWAITING_KV = "awaiting_kv"
    """Blocks are reserved and a prefill worker is filling them."""
    HOLDING = "holding"
    """Finished computing; its blocks are still being read (a push to a decode worker)."""
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """One sequence of tokens being computed.

    Attributes:
        request_id: Unique among live sequences.
        token_ids: Prompt and generated tokens so far; grows.
        num_prompt_tokens: Tokens the client sent; the rest was generated (here or before a resume).
        arrival_s: Clock reading on arrival, seconds.
        deadline_s: Clock reading by which the answer is wanted, or None.
        priority: Lower goes first.
        predicted_output_tokens: Expected length of the answer, for the orders that use it and for
            whoever picks a worker.
        remote_prefill: A prefill worker may fill the blocks.
        reuse_prefix: False where every position must really be computed (prompt log-probabilities).
        pinned: Never paused or preempted: a push is reading its blocks.
        salt: Keeps prefixes of different owners apart in the cache.
        tenant: Whose it is; tenants share the worker in turns. Empty: nobody's in particular.
        share: What `scheduling.step_shares` knows of its wait.
        num_computed_tokens: Positions whose keys and values are in ``block_ids``.
    """

    request_id: str
    token_ids: list[int]
    num_prompt_tokens: int
    arrival_s: float = 0.0
    deadline_s: float | None = None
    priority: int = 0
    predicted_output_tokens: int = 128
    remote_prefill: bool = False
    reuse_prefix: bool = True
    pinned: bool = False
    salt: bytes = b""
    tenant: str = ""
    state: State = State.WAITING
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    block_ids: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    num_published: int = 0
    level: int = 0
    served_tokens: int = 0
    queued_since_s: float = 0.0
    num_sat_out: int = 0
    share: Waited | None = None

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens that the next steps have to compute."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def remaining_output_tokens(self) -> int:
        """Tokens of the answer that are still expected, at least one.

        An answer that has grown beyond its prediction is put into the next bin, twice as long.
        """
        generated = len(self.token_ids) - self.num_prompt_tokens
        expected = max(1, self.predicted_output_tokens)
        while expected <= generated:
            expected *= 2
        return expected - generated


class Chunk(NamedTuple):
    """Positions ``start .. start + num_tokens`` of one sequence, computed in one step.

    A tuple, because a step of 256 sequences makes 256 of them: a frozen dataclass takes three
    times as long.
    """

    sequence: Sequence
    start: int
    num_tokens: int

    @property
    def samples(self) -> bool:
        """Whether this chunk reaches the last token, so that the next one can be sampled."""
        return self.start + self.num_tokens == len(self.sequence.token_ids)


@dataclass(slots=True)
class Step:
    """One step's work: decodes first, then prefill chunks; plus sequences whose state changed."""

    chunks: list[Chunk] = field(default_factory=list)
    num_decodes: int = 0
    reserved: list[Sequence] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens computed in this step."""
        return sum(chunk.num_tokens for chunk in self.chunks)
