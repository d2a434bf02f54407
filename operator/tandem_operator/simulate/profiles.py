"""How long a step takes on a machine: the fitted form, and tables of what was measured.

The fitted form is the one that workers report and `tandem profile` writes:

    prefill of a batch of chunks   a + b * sum(L) + c * sum((start + L)^2 - start^2)     seconds
    one decode step                a + b * sum(context) + c * batch                      seconds

A step that holds both reads the weights once: the larger constant counts, the rest adds up.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol


class ProfileError(ValueError):
    """A profile cannot be used; the message says which number and why."""


class StepModel(Protocol):
    """Time of one step from what it computes, seconds."""

    def step_s(
        self,
        chunks: Sequence[tuple[int, int]],
        contexts: Sequence[int] = (),
    ) -> float:
        """Time of a step.

        Args:
            chunks: (start, length) of each piece of a prompt, tokens.
            contexts: Of each sequence that decodes one token, tokens.
        """
        ...

    def decode_line(self, num_decodes: int, decode_context: int) -> tuple[float, float] | None:
        """(first, increase): k decode steps of this batch take first, first + increase, …

        None where steps are not linear in the context.
        """
        ...


@dataclass(frozen=True, slots=True)
class Profile:
    """What `tandem profile` measures of one engine on one machine.

    Attributes:
        prefill: a, b, c of a prefill step, seconds.
        decode: a, b, c of a decode step, seconds.
        kv_tokens: Tokens that fit into the KV cache of one worker.
        kv_bytes_per_token: Bytes of keys and values of one token, over all layers.
        link_bytes_per_s: Between a prefill and a decode worker.
        link_latency_s: Of one transfer, beside its bytes.
    """

    prefill: tuple[float, float, float]
    decode: tuple[float, float, float]
    kv_tokens: int
    kv_bytes_per_token: float = 131072.0
    link_bytes_per_s: float = 12.5e9
    link_latency_s: float = 0.002
    name: str = ""

    def step_s(
        self,
        chunks: Sequence[tuple[int, int]],
        contexts: Sequence[int] = (),
    ) -> float:
        """See :class:`StepModel`."""
        base = work = 0.0
        if chunks:
            base, b, c = self.prefill
            for start, length in chunks:
                work += (b + c * (2 * start + length)) * length
        if contexts:
            a, b, c = self.decode
            base = a if a > base else base
            work += b * sum(contexts) + c * len(contexts)
        return base + work

    def decode_line(self, num_decodes: int, decode_context: int) -> tuple[float, float]:
        """See :class:`StepModel`."""
        a, b, c = self.decode
        return a + b * decode_context + c * num_decodes, b * num_decodes

    def as_json(self) -> str:
        """The file's text."""
        return json.dumps({"kind": "tandem-profile", **asdict(self)}, indent=1) + "\n"


def load_profile(path: Path) -> Profile:
    """Read a profile.

    Raises ProfileError naming the file and what is wrong with it.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ProfileError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ProfileError(f"{path} is not JSON: {error}") from error
    return parse_profile(data, str(path))


def parse_profile(data: Any, source: str) -> Profile:
    """A profile from decoded JSON. Raises ProfileError."""
    if not isinstance(data, dict):
        raise ProfileError(f"{source}: expected an object as `tandem profile` writes it")
    known = set(Profile.__dataclass_fields__)
    extra = sorted(set(data) - known - {"kind", "fit", "measured"})
    if extra:
        raise ProfileError(f"{source}: unknown field {extra[0]!r}; known are {sorted(known)}")
    fields: dict[str, Any] = {}
    for half in ("prefill", "decode"):
        numbers = data.get(half)
        if not isinstance(numbers, list) or len(numbers) != 3:
            raise ProfileError(f"{source}: {half} must be three numbers [a, b, c] in seconds")
        fields[half] = tuple(_at_least(source, half, number, 0.0) for number in numbers)
        if sum(fields[half]) <= 0.0:
            raise ProfileError(f"{source}: {half}={numbers} says that steps take no time")
    fields["kv_tokens"] = int(_at_least(source, "kv_tokens", data.get("kv_tokens"), 64.0))
    for name in ("kv_bytes_per_token", "link_bytes_per_s", "link_latency_s"):
        if name in data:
            fields[name] = _at_least(source, name, data[name], 0.0)
    if fields.get("link_bytes_per_s") == 0.0:
        raise ProfileError(f"{source}: link_bytes_per_s=0 means that no block ever arrives")
    fields["name"] = str(data.get("name", ""))
    return Profile(**fields)


def _at_least(source: str, name: str, value: Any, least: float) -> float:
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not good or value < least:
        raise ProfileError(f"{source}: {name}={value!r} must be a number of at least {least:g}")
    return float(value)
