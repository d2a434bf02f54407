"""The prefill order: the one message between decode and prefill worker, written and parsed here.

``docs/contract.md`` describes the wire form; ``tests/contract`` holds its vectors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

from pydantic import Field, PlainValidator

from tandem_worker.config import BLOCK_SIZE
from tandem_worker.engine.constraints import MAX_GRAMMAR_CHARS
from tandem_worker.engine.sampling import SamplingParams
from tandem_worker.errors import RequestError
from tandem_worker.openai.fields import (
    INT32,
    MAX_LOGPROBS,
    UINT64,
    Declared,
    SamplingFields,
    TokenIds,
    wrong,
)

PROTOCOL_VERSION = 1
CONSTRAINED_VERSION = 2
"""Of an order with a grammar: who cannot honour it must refuse the order."""
_MAX_SALT_BYTES = 64


@dataclass(frozen=True, slots=True)
class PrefillJob:
    """What has to be computed, whoever does it."""

    request_id: str
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    sampling: SamplingParams
    deadline_ms: int | None = None
    cache_salt: bytes = b""
    tenant: str = ""


@dataclass(frozen=True, slots=True)
class PrefillOrder:
    """A job for a prefill worker, with the reservation that it fills.

    Attributes:
        epoch: Rises with every attempt, also across restarts of the decode worker.
        num_computed_tokens: Tokens the decode worker has already; whole blocks.
        kv_address: Where the blocks go, IP:PORT.
        block_ids: The decode worker's blocks for the rest, in order.
    """

    job: PrefillJob
    epoch: int
    num_computed_tokens: int
    kv_address: str
    block_ids: tuple[int, ...]

    def to_wire(self) -> dict[str, Any]:
        """JSON-ready; the body of POST /internal/prefill."""
        job = self.job
        return {
            "version": CONSTRAINED_VERSION if job.sampling.grammar else PROTOCOL_VERSION,
            "request_id": job.request_id,
            "epoch": self.epoch,
            "token_ids": list(job.token_ids),
            "num_computed_tokens": self.num_computed_tokens,
            "sampling": {**job.sampling.to_wire(), "num_prompt_tokens": job.num_prompt_tokens},
            "seed": job.sampling.seed,
            "position": len(job.token_ids),
            "deadline_ms": job.deadline_ms,
            **({"cache_salt": job.cache_salt.hex()} if job.cache_salt else {}),
            **({"tenant": job.tenant} if job.tenant else {}),
            "kv": {"address": self.kv_address, "block_ids": list(self.block_ids)},
        }

    @classmethod
    def parse(cls, data: Mapping[str, Any], *, vocab_size: int, max_model_len: int) -> PrefillOrder:
        """Check an order against the rules and against this worker's model.

        Raises:
            RequestError: it breaks one, or speaks another version.
        """
        version = data.get("version")
        if version not in (PROTOCOL_VERSION, CONSTRAINED_VERSION):
            raise RequestError(
                f"version={version!r} is not spoken here; this worker speaks {PROTOCOL_VERSION} "
                f"and {CONSTRAINED_VERSION}",
                param="version",
                code="version_mismatch",
            )
        wire = _Wire.read(data)
        wire.check(vocab_size=vocab_size, max_model_len=max_model_len)
        sampling = wire.sampling.sampling(
            num_logprobs=wire.sampling.num_logprobs, logit_bias=tuple(wire.sampling.logit_bias)
        )
        seed = 0 if wire.seed is None else wire.seed & UINT64
        return cls(
            job=PrefillJob(
                request_id=wire.request_id,
                token_ids=tuple(wire.token_ids),
                num_prompt_tokens=wire.sampling.num_prompt_tokens or len(wire.token_ids),
                sampling=replace(sampling, seed=seed, grammar=wire.sampling.grammar),
                deadline_ms=wire.deadline_ms,
                cache_salt=wire.cache_salt,
                tenant=wire.tenant,
            ),
            epoch=wire.epoch,
            num_computed_tokens=wire.num_computed_tokens,
            kv_address=wire.kv.address,
            block_ids=tuple(wire.kv.block_ids),
        )


class AbortOrder(Declared):
    """POST /internal/abort: give up a prefill of this epoch or an older one."""

    request_id: str
    epoch: int = Field(default=0, ge=0, le=UINT64)


class LinkCheckOrder(Declared):
    """POST /internal/kv-link: push one test block to this KV address, IP:PORT."""

    address: str


def _pairs(value: Any) -> list[tuple[int, float]]:
    rule = "must be a list of [token, bias] pairs, biases between -100 and 100"
    if not isinstance(value, list):
        raise wrong("logit_bias", value, rule)
    pairs = []
    for pair in value:
        if not isinstance(pair, list) or len(pair) != 2 or type(pair[0]) is not int:
            raise wrong("logit_bias", value, rule)
        token, bias = pair
        if type(bias) not in (int, float) or not -100 <= bias <= 100 or not 0 <= token <= INT32:
            raise wrong("logit_bias", value, rule)
        pairs.append((token, float(bias)))
    return pairs


def _salt(value: Any) -> bytes:
    try:
        salt = bytes.fromhex(value)
    except (TypeError, ValueError) as error:
        raise wrong("cache_salt", value, "must be hex digits") from error
    if len(salt) > _MAX_SALT_BYTES:
        raise wrong("cache_salt", value, f"must have at most {_MAX_SALT_BYTES} bytes")
    return salt


class _Sampling(SamplingFields):
    """Unknown keys are a newer peer's and are ignored."""

    top_p: float = Field(default=1.0, ge=0, le=1)  # an older peer passes a client's 0 on
    num_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    logit_bias: Annotated[list[tuple[int, float]], PlainValidator(_pairs)] = []
    num_prompt_tokens: int | None = Field(default=None, ge=1, le=INT32)
    grammar: str = Field(default="", max_length=2 * MAX_GRAMMAR_CHARS)


class _Target(Declared):
    address: str
    block_ids: TokenIds = Field(max_length=2**24)


class _Wire(Declared):
    request_id: str = Field(min_length=1, max_length=256)
    epoch: int = Field(default=0, ge=0, le=UINT64)
    token_ids: TokenIds = Field(min_length=1)
    num_computed_tokens: int = Field(default=0, ge=0)
    sampling: _Sampling
    seed: int | None = Field(default=None, ge=-(1 << 63), le=UINT64)
    position: int | None = None
    deadline_ms: int | None = Field(default=None, ge=0, le=INT32)
    cache_salt: Annotated[bytes, PlainValidator(_salt)] = b""
    tenant: str = Field(default="", max_length=64)
    kv: _Target

    def check(self, *, vocab_size: int, max_model_len: int) -> None:
        """Rules that join fields, and those of the model."""
        count, computed = len(self.token_ids), self.num_computed_tokens
        if count > max_model_len:
            raise wrong("token_ids", f"{count} tokens", f"exceeds {max_model_len}")
        named = {
            "token_ids": max(self.token_ids),
            "logit_bias": max((token for token, _ in self.sampling.logit_bias), default=0),
        }
        for name, highest in named.items():
            if highest >= vocab_size:
                raise RequestError(
                    f"{name} names token {highest}; the vocabulary ends at {vocab_size - 1}",
                    param=name,
                )
        if computed >= count or computed % BLOCK_SIZE:
            raise wrong(
                "num_computed_tokens", computed, f"must be a multiple of {BLOCK_SIZE} below {count}"
            )
        wanted = -(-count // BLOCK_SIZE) - computed // BLOCK_SIZE
        if len(self.kv.block_ids) != wanted:
            raise RequestError(
                f"kv.block_ids holds {len(self.kv.block_ids)} blocks; {count} tokens of which "
                f"{computed} are computed need {wanted}",
                param="kv.block_ids",
            )
        if self.position is not None and self.position != count:
            raise wrong("position", self.position, f"must equal the number of tokens, {count}")
        if (self.sampling.num_prompt_tokens or 1) > count:
            raise wrong("num_prompt_tokens", self.sampling.num_prompt_tokens, f"exceeds {count}")
