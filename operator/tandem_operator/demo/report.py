"""Prints the demo: a line per question, then the strategies side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .client import Answer
from .strategies import Summary

_HEADER = (
    f"{'#':>3}  {'question':<46} {'gain':>6}  {'tier':<6} {'reason':<14} "
    f"{'answer':<14} {'':<5} {'TTFT':>8} {'cost':>11}"
)


def shorten(text: str, width: int) -> str:
    """One line of at most ``width`` characters; what was cut shows as an ellipsis."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"


def header() -> str:
    return _HEADER + "\n" + "-" * len(_HEADER)


def answer_line(number: int, answer: Answer) -> str:
    gain = "-" if answer.gain is None else f"{answer.gain:+.3f}"
    return (
        f"{number:>3}  {shorten(answer.question.prompt, 46):<46} {gain:>6}  {answer.tier:<6} "
        f"{shorten(answer.reason, 14):<14} {shorten(answer.stated, 14):<14} "
        f"{'right' if answer.right else 'WRONG':<5} {1e3 * answer.ttft_s:>5.0f} ms "
        f"{1e6 * answer.cost_usd:>7.2f} u$"
    )


def strategy_table(summaries: Sequence[Summary]) -> str:
    rows = [
        f"{'strategy':<14} {'quality':>8} {'large calls':>12} {'cost':>12} {'saved':>7} "
        f"{'TTFT p50':>9} {'TPOT p50':>9}"
    ]
    rows.append("-" * len(rows[0]))
    for s in summaries:
        rows.append(
            f"{s.strategy:<14} {s.quality:>8.3f} {s.large_share:>11.1%} "
            f"{1e6 * s.cost_usd:>9.0f} u$ {s.cost_saved:>7.1%} {s.ttft_p50_ms:>6.0f} ms "
            f"{s.tpot_p50_ms:>6.1f} ms"
        )
    return "\n".join(rows)


def as_json(answer: Answer) -> dict[str, Any]:
    """One question for `--json`."""
    return {
        "id": answer.question.id,
        "question": answer.question.prompt,
        "family": answer.question.family,
        "level": answer.question.level,
        "expected": answer.question.answer,
        "gain": answer.gain,
        "tier": answer.tier,
        "reason": answer.reason,
        "answer": answer.stated,
        "text": answer.text,
        "right": answer.right,
        "ttft_ms": 1e3 * answer.ttft_s,
        "tpot_ms": None if answer.tpot_s is None else 1e3 * answer.tpot_s,
        "output_tokens": answer.output_tokens,
        "cost_usd": answer.cost_usd,
    }
