"""Asks a running engine for the timings of a grid: one prompt alone, then batches that decode.

Any OpenAI-compatible server will do. What is asked is a handful of `complete` calls, so that a
test measures a model of a server instead of a server.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from statistics import median

from tandem_operator.profiling.fit import DecodeTiming, PrefillTiming

OUTPUT_TOKENS = 24
# Two requests of a batch begin a little apart: the first tokens are not a full batch yet.
SKIPPED_TOKENS = 4


@dataclass(frozen=True, slots=True)
class Completion:
    """One streamed answer.

    Attributes:
        prompt_tokens: As the server counted them.
        started_s: When the request was sent.
        token_s: When each piece of the answer came.
    """

    prompt_tokens: int
    started_s: float
    token_s: Sequence[float]


Complete = Callable[[Sequence[str], int], Awaitable[list[Completion]]]
"""(prompts, output tokens) -> answers of all prompts, asked at the same time."""

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Grid:
    """What is measured: words of one prompt, and (batch, words) of decoding."""

    prompts: Sequence[int]
    batches: Sequence[tuple[int, int]]
    repeats: int = 3


def grid(max_tokens: int, max_batch: int, tokens_per_word: float) -> Grid:
    """A grid within a context length; words, because a server counts its own tokens."""
    longest = max(8.0, (max_tokens - OUTPUT_TOKENS - 16) / tokens_per_word)
    shares = (0.02, 0.05, 0.12, 0.25, 0.5, 0.75, 1.0)
    prompts = sorted({max(2, int(longest * share)) for share in shares})
    batches = []
    batch = 1
    while batch <= max_batch:
        batches += [(batch, prompts[0]), (batch, prompts[len(prompts) // 2])]
        batch *= 2
    return Grid(prompts, batches)


def prompt_of(num_words: int, rng: random.Random) -> str:
    """Words that no cache has seen: the first one already differs."""
    return " ".join(
        _WORDS[rng.randrange(len(_WORDS))] + str(rng.randrange(10)) for _ in range(num_words)
    )


_WORDS = ("sum", "of", "the", "red", "old", "box", "sea", "day", "cat", "sky", "two", "low")


async def measure(
    complete: Complete, plan: Grid, seed: int, progress: Progress
) -> tuple[list[PrefillTiming], list[DecodeTiming]]:
    """Timings of the whole grid; the median of the repeats of each point."""
    rng = random.Random(seed)
    prefills: list[PrefillTiming] = []
    await complete([prompt_of(plan.prompts[0], rng)], 2)  # the first request pays for warming up
    for words in plan.prompts:
        found = []
        for _ in range(plan.repeats):
            (answer,) = await complete([prompt_of(words, rng)], 1)
            found.append(answer)
        seconds = median(a.token_s[0] - a.started_s for a in found)
        prefills.append(PrefillTiming(round(median(a.prompt_tokens for a in found)), seconds))
        progress(f"prefill of {prefills[-1].prompt_tokens} tokens: {1000.0 * seconds:.1f} ms")
    decodes: list[DecodeTiming] = []
    for batch, words in plan.batches:
        prompts = [prompt_of(words, rng) for _ in range(batch)]
        answers = await complete(prompts, OUTPUT_TOKENS)
        timing = decode_timing(answers)
        if timing is not None:
            decodes.append(timing)
            progress(f"decode of {batch} at a time: {1000.0 * timing.seconds:.2f} ms a step")
    return prefills, decodes


def decode_timing(answers: Sequence[Completion]) -> DecodeTiming | None:
    """Mean step while all of them decode; None where they never did so together."""
    begin = max((a.token_s[min(SKIPPED_TOKENS, len(a.token_s) - 1)] for a in answers), default=0.0)
    end = min((a.token_s[-1] for a in answers), default=0.0)
    steps = [sum(begin < at <= end for at in a.token_s) for a in answers]
    if not answers or end <= begin or min(steps) < 3:
        return None
    context = sum(a.prompt_tokens + len(a.token_s) / 2.0 for a in answers)
    return DecodeTiming(len(answers), context, (end - begin) / median(steps))
