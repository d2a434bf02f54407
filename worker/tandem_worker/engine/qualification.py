"""Whether a model with lossy settings still answers as the exact one: measured before it serves.

The exact model's greedy answers are given to the lossy one token by token, and the loss is by how
much their perplexity rises: exp(mean(log p_exact - log p_lossy)) - 1. A token on which the exact
model hardly decided costs hardly anything, which a comparison of texts would count as a difference.
The answers come from the file beside the weights; where only KV blocks are lossy and there is none,
the worker makes them itself, with the same weights and exact KV blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from tandem_worker.config import BLOCK_SIZE
from tandem_worker.engine.drawn import Sampled, TokenLogprobs
from tandem_worker.engine.requests import EngineRequest, Event, Work
from tandem_worker.engine.runner import ModelRunner
from tandem_worker.engine.sampling import SamplingParams
from tandem_worker.errors import UnqualifiedError, WorkerError
from tandem_worker.models.exact_answers import ExactAnswer, read_exact_answers
from tandem_worker.models.files import EXACT_ANSWERS
from tandem_worker.models.kv_cache import QUANTIZED
from tandem_worker.models.spec import ModelSpec
from tandem_worker.scheduling.sequence import Chunk
from tandem_worker.scheduling.sequence import Sequence as ScheduledSequence

ANSWER_TOKENS = 32
_STEP_TOKENS = 256
_MOST_BLOCKS = 256
"""Exact KV blocks, which lie beside the worker's own, at a time: a thousand long prompts together
would need more memory than the model itself."""
_BITS = {torch.float32: (8, 23), torch.bfloat16: (8, 7), torch.float16: (5, 10)}
_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Qualification:
    """What a worker says of itself; where a loss is above the stated one it does not serve."""

    state: Literal["exact", "within_loss", "not_measured"]
    message: str

    def as_dict(self) -> dict[str, str]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Loss:
    """Attributes:
    rise: By which the perplexity of the exact answers rises, a share.
    differing: Share of their tokens of which the lossy model would have written another.
    """

    rise: float
    differing: float
    num_answers: int
    num_tokens: int

    def describe(self, max_rise: float) -> str:
        """One clause for a status."""
        return (
            f"the perplexity of {self.num_answers} exact answers changes by {self.rise:+.2%} "
            f"(at most +{max_rise:.2%}), {self.differing:.1%} of their {self.num_tokens} tokens "
            "would differ"
        )


def qualify(
    runner: ModelRunner,
    own_prompts: Callable[[], Sequence[list[int]]],
    directory: Path,
    *,
    max_loss: float,
) -> Qualification:
    """Hold a loaded model against the exact one.

    own_prompts: What is asked where no file of exact answers is there, as token ids.

    Raises:
        UnqualifiedError: its answers lose more than max_loss.
        ModelError: the file of exact answers is broken.
    """
    of_weights, of_kv = lossy_weights(runner.spec, runner.dtype), lossy_kv(runner)
    lossy = " and ".join(filter(None, (of_weights, of_kv)))
    if not lossy:
        return Qualification("exact", "weights and KV blocks have the checkpoint's own type")
    stored = read_exact_answers(directory, runner.spec.vocab_size)
    answers = [a for a in stored if len(a.prompt) + len(a.answer) <= _most_tokens(runner)]
    measured = lossy if answers else of_kv
    text = ""
    if measured:
        answers = answers or answer_exactly(runner, own_prompts())
        loss = loss_of(runner, answers)
        text = f"{measured}: {loss.describe(max_loss)}"
        if not loss.rise <= max_loss:
            raise UnqualifiedError(
                f"{text}; use an exact setting, better weights, or state a larger loss (max-loss)"
            )
    if measured == lossy:
        return Qualification("within_loss", text)
    why = f"no {EXACT_ANSWERS} lies beside the weights"
    if stored:
        why = f"no answer of {EXACT_ANSWERS} fits into {_most_tokens(runner)} tokens"
    unknown = (
        f"{of_weights}: not measured, {why}; write it with `tandem exact-answers` from the original"
    )
    return Qualification("not_measured", "; ".join(filter(None, (unknown, text))))


def lossy_weights(spec: ModelSpec, dtype: torch.dtype) -> str:
    """What of the weights is not as the checkpoint's author computed it; empty for nothing."""
    if spec.quantization is not None:
        return f"{spec.quantization.method} weights"
    own = _TYPES.get(spec.dtype, dtype)
    if any(mine < theirs for mine, theirs in zip(_BITS[dtype], _BITS[own], strict=True)):
        return f"{spec.dtype} weights as {str(dtype).removeprefix('torch.')}"
    return ""


def lossy_kv(runner: ModelRunner) -> str:
    """The same of KV blocks."""
    names = {dtype: name for name, dtype in QUANTIZED.items()}
    kind = names.get(runner.kv_dtype)
    return f"{kind} KV blocks" if kind else ""


def answer_exactly(
    runner: ModelRunner, prompts: Iterable[Sequence[int]], num_tokens: int = ANSWER_TOKENS
) -> list[ExactAnswer]:
    """Greedy answers of these weights with exact KV blocks, and how likely they were.

    Prompts whose ids the model lacks, or that leave no room for an answer, are left out.
    """
    most = min(runner.max_model_len, runner.spec.max_position)
    num_tokens = min(num_tokens, most - 1)
    kept = [
        list(prompt[: most - num_tokens])
        for prompt in prompts
        if prompt and max(prompt) < runner.spec.vocab_size
    ]
    answers: list[ExactAnswer] = []
    while kept:
        spans = _spans(kept, num_tokens)
        together, kept = kept[: len(spans)], kept[len(spans) :]
        with runner.exact_kv(spans[-1].stop):
            made = [
                ExactAnswer(tuple(prompt), tuple(answer), ())
                for prompt, answer in zip(
                    together, _continue(runner, together, num_tokens, spans), strict=True
                )
                if answer
            ]
            answers += [
                replace(exact, logprobs=tuple(min(0.0, p.logprob) for p in _score(runner, exact)))
                for exact in made
            ]
    return answers


def loss_of(runner: ModelRunner, answers: Sequence[ExactAnswer]) -> Loss:
    """What the model as it is loses on exact answers; infinite where it gives no numbers."""
    lost, differing, num_tokens = 0.0, 0, 0
    for exact in answers:
        found = _score(runner, exact)
        num_tokens += len(found)
        for token, was, now in zip(exact.answer, exact.logprobs, found, strict=True):
            lost += was - now.logprob
            differing += now.top[0][0] != token
    if num_tokens == 0:
        raise WorkerError(
            "no exact answer could be made to measure lossy settings with: the model's context "
            "leaves no room for any; raise max_model_len, or use exact settings"
        )
    mean = lost / num_tokens
    rise = math.expm1(min(mean, 700.0)) if math.isfinite(mean) else math.inf
    return Loss(rise, differing / num_tokens, len(answers), num_tokens)


def _most_tokens(runner: ModelRunner) -> int:
    return min(runner.max_model_len, runner.num_blocks * BLOCK_SIZE)


def _spans(prompts: Sequence[list[int]], num_tokens: int) -> list[range]:
    """The KV blocks of as many of the first prompts as are answered together; one at least."""
    spans: list[range] = []
    end = 0
    for prompt in prompts:
        start, end = end, end - (-(len(prompt) + num_tokens) // BLOCK_SIZE)
        if spans and end > _MOST_BLOCKS:
            break
        spans.append(range(start, end))
    return spans


def _continue(
    runner: ModelRunner, prompts: Sequence[list[int]], num_tokens: int, spans: Sequence[range]
) -> list[list[int]]:
    """Greedy tokens of all prompts together, up to an end token, which is one of them."""
    running = [
        EngineRequest(
            ScheduledSequence(
                f"exact-{index}",
                list(prompt),
                len(prompt),
                block_ids=list(spans[index]),
            ),
            SamplingParams(temperature=0.0),
            _ignore,
        )
        for index, prompt in enumerate(prompts)
    ]
    sequences = [request.sequence for request in running]
    running = [request for request in running if _drew(runner, [request], 0)]
    while running := [
        r
        for r in running
        if r.num_generated < num_tokens
        and r.sequence.token_ids[-1] not in runner.spec.eos_token_ids
    ]:
        if not _drew(runner, running, len(running)):
            break
    return [sequence.token_ids[sequence.num_prompt_tokens :] for sequence in sequences]


def _drew(runner: ModelRunner, requests: Sequence[EngineRequest], num_decodes: int) -> bool:
    """Compute all that is left of each and append its next token; False where one has none."""
    chunks = [
        Chunk(r.sequence, r.sequence.num_computed_tokens, r.sequence.num_uncomputed_tokens)
        for r in requests
    ]
    work = [Work(chunk, request) for chunk, request in zip(chunks, requests, strict=True)]
    drawn = runner.execute(work, num_decodes)
    for chunk, token in zip(chunks, drawn, strict=True):
        if not isinstance(token, Sampled):
            return False
        chunk.sequence.num_computed_tokens += chunk.num_tokens
        chunk.sequence.token_ids.append(token.token_id)
    return True


def _score(runner: ModelRunner, exact: ExactAnswer) -> list[TokenLogprobs]:
    """Log-probabilities of the answer's tokens, each after those before it."""
    tokens = [*exact.prompt, *exact.answer]
    sequence = ScheduledSequence("score", tokens, len(tokens))
    request = EngineRequest(sequence, SamplingParams(), _ignore, prompt_logprobs=1)
    sequence.block_ids = list(range(-(-len(tokens) // BLOCK_SIZE)))
    end = len(tokens) - 1  # after the last position a token would be drawn
    for start in range(0, end, _STEP_TOKENS):
        chunk = Chunk(sequence, start, min(end - start, _STEP_TOKENS))
        runner.execute([Work(chunk, request)], 0)
        sequence.num_computed_tokens += chunk.num_tokens
    return request.collected_logprobs[len(exact.prompt) - 1 :]


def _ignore(event: Event) -> None:
    """Takes the events of what nobody waits for."""
