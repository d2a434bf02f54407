"""How many tokens a request for embeddings may be.

Vectors of different models cannot be compared, so the tier of such a request is never a choice by
gain: it is named, or the only one that can (`tandem_router.routing.tier_router`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from tandem_router.config import LimitsConfig
from tandem_router.errors import bad_request
from tandem_router.openai.prompt_size import BYTES_PER_TOKEN, FEWEST_BYTES_PER_TOKEN

Part = str | int | list[int]


def input_tokens(given: str | Sequence[Part], limits: LimitsConfig) -> tuple[int, int, int]:
    """(expected, most, certain) tokens of the input; the last are counted, of its longest part.

    Raises ApiError (400) for an input of too many parts, or of several kinds.
    """
    parts: Sequence[Part] = [given] if isinstance(given, str) else given
    if type(parts[0]) is int:
        if set(map(type, parts)) != {int}:
            raise bad_request("`input` must hold token ids alone, or none", "input")
        parts = [cast(list[int], parts)]
    if len(parts) > limits.max_embedding_inputs:
        raise bad_request(
            f"`input` has {len(parts)} parts; at most {limits.max_embedding_inputs}", "input"
        )
    expected = most = certain = 0.0
    for index, part in enumerate(parts):
        if isinstance(part, int):
            raise bad_request(f"`input[{index}]` must be text or token ids", "input")
        if isinstance(part, str):
            size = len(part.encode(errors="replace"))
            expected += max(1.0, size / BYTES_PER_TOKEN)
            most += max(1.0, size / FEWEST_BYTES_PER_TOKEN)
        else:
            expected += len(part)
            most += len(part)
            certain = max(certain, len(part))
    return max(1, int(expected)), max(1, int(most) + 1), int(certain)
