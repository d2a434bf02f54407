"""Four sums that must be nothing: requests lost, tokens wrong, dollars unbooked, texts leaked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from faulty_day.clients import Asked
from faulty_day.reference import answer
from faulty_day.schedule import ENDS_STREAMS, POOL, TIERS
from faulty_day.servers import PROMPT_TOKENS_OF_WORKERS, Provider

PRICES = {POOL: (0.2, 0.8), "mini": (1.0, 4.0), "full": (5.0, 20.0)}  # US dollars per million
SECRETS = (b"provider-internals", b"sk-live", b"key-of-")
CENT_OF_A_TOKEN = 1e-9


@dataclass
class Verdict:
    """What was found; a list's entries are sentences for whoever looks for the cause."""

    lost: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    unbooked: list[str] = field(default_factory=list)
    leaked: list[str] = field(default_factory=list)
    unbooked_usd: float = 0.0
    due_usd: float = 0.0
    booked_usd: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def clean(self) -> bool:
        return not (self.lost or self.wrong or self.unbooked or self.leaked)


def judge(
    asked: Sequence[Asked],
    sick: Mapping[str, Sequence[tuple[float, float]]],
    providers: Sequence[Provider],
    decisions: Mapping[str, Mapping[str, Any]],
    spent_usd: float,
) -> Verdict:
    """sick: when each tier could not answer. decisions: by request, as the store holds them."""
    verdict = Verdict()
    counts = verdict.counts
    names = "answered", "moved", "resumed", "left", "cut_after_first_token"
    names += "named_tier_failed", "no_tier_throughout"
    counts.update({"requests": len(asked), **dict.fromkeys(names, 0)})
    for one in asked:
        record = decisions.get(one.request_id)
        _look(one, sick, providers, record, verdict)
        _add_up(one, providers, record, verdict)
        if any(secret in one.raw for secret in SECRETS):
            verdict.leaked.append(f"{_name(one)}: {bytes(one.raw[-300:])!r}")
    for provider in providers:
        for name in provider.told_internals:
            verdict.leaked.append(f"provider {provider.tier} was told {name}")
    told = sum(float(each["cost_usd"] or 0.0) for each in decisions.values())
    if abs(told - spent_usd) > 1e-6 * max(1.0, told):
        verdict.unbooked.append(f"decisions add up to ${told:.6f}, spend to ${spent_usd:.6f}")
    return verdict


def _look(
    one: Asked,
    sick: Mapping[str, Sequence[tuple[float, float]]],
    providers: Sequence[Provider],
    record: Mapping[str, Any] | None,
    verdict: Verdict,
) -> None:
    counts = verdict.counts
    if record is not None:
        counts["moved"] += record["reason"] == "unavailable"
        counts["resumed"] += bool(one.pieces and record["num_failovers"] and one.tier == POOL)
    expected = answer(one.tier, POOL, one.mark, one.max_tokens) if one.tier else []
    whole = "".join(expected)
    fits = one.text == whole if one.complete else whole.startswith(one.text)
    if one.pieces and not fits:
        verdict.wrong.append(f"{_name(one)}: {one.text!r} is not {whole!r}")
        return
    if one.complete and not one.error:
        counts["answered"] += 1
        return
    if one.leaves and len(one.pieces) >= 3:
        counts["left"] += 1
        return
    kinds = {kind for each in providers for kind in each.kinds_of.get(one.request_id, ())}
    may = TIERS if one.model not in TIERS else (one.model,)
    if one.pieces:
        may = (one.tier,)  # nobody else can go on after the first token
    well = [
        tier
        for tier in may
        if not any(start < one.ended and one.started < end for start, end in sick[tier])
    ]
    broken = kinds & ENDS_STREAMS or not well
    if one.error and one.pieces and one.tier != POOL and broken:
        counts["cut_after_first_token"] += 1
        return
    if well or one.broke or not (one.error and one.error.get("message")):
        said = one.broke or one.error
        verdict.lost.append(f"{_name(one)}: {', '.join(well) or 'no tier'} could, {said}")
    else:
        counts["named_tier_failed" if one.model in TIERS else "no_tier_throughout"] += 1


def _add_up(
    one: Asked,
    providers: Sequence[Provider],
    record: Mapping[str, Any] | None,
    verdict: Verdict,
) -> None:
    """What providers bill and workers computed for the client, beside what was booked."""
    due, parts = 0.0, []
    for provider in providers:
        usd_in, usd_out = PRICES[provider.tier]
        for prompt, output in provider.bills.get(one.request_id, ()):
            if one.leaves and one.tier == provider.tier:
                output = min(output, len(one.pieces))  # what it was sent before it left
            due += (prompt * usd_in + output * usd_out) / 1e6
            parts.append(f"{provider.tier} {prompt}+{output}")
    if one.tier == POOL and one.pieces:
        usd_in, usd_out = PRICES[POOL]
        said, number = "", 0
        for piece in answer(POOL, POOL, one.mark, one.max_tokens):
            if len(said) >= len(one.text):
                break
            said, number = said + piece, number + 1
        due += (PROMPT_TOKENS_OF_WORKERS * usd_in + number * usd_out) / 1e6
        parts.append(f"{POOL} {PROMPT_TOKENS_OF_WORKERS}+{number}")
    booked = float(record["cost_usd"] or 0.0) if record is not None else 0.0
    verdict.due_usd += due
    verdict.booked_usd += booked
    if due > booked + CENT_OF_A_TOKEN:
        verdict.unbooked_usd += due - booked
        said = "no record" if record is None else f"{record['status']} {record['attempts']}"
        told = f"is ${due:.9f}, booked ${booked:.9f}; {said}"
        verdict.unbooked.append(f"{_name(one)}: {parts} {told}")


def _name(one: Asked) -> str:
    how = "stream" if one.stream else "whole"
    took = one.ended - one.started
    return (
        f"{one.mark} ({one.api}, {how}, {one.model}, {one.status}, tier {one.tier or '-'}, "
        f"{took:.1f} s, {one.request_id})"
    )
