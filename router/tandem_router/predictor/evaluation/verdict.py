"""What a report means, in words: whether a pair is worth routing, and the lines for a terminal."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from tandem_router.predictor.linear_algebra import FloatArray

PREDICTOR = "predictor"
ORACLE = "oracle"
RANDOM = "random"
#: Rows that must grade both tiers of a pair before it is judged.
MIN_ROWS = 5

Report = dict[str, Any]


def verdict(first: str, second: str, found: Report) -> tuple[bool, str]:
    """Whether the pair is worth routing, and the sentence a person needs."""
    own = found["methods"][PREDICTOR]
    low, high = found["quality"][first], found["quality"][second]
    levels = f"{first} {low:.3f}, {second} {high:.3f}"
    if own["apgr"] is None:
        return False, (
            f"{first} -> {second} is not routable: {second} is not better on average ({levels}), "
            f"so sending it calls wins nothing; use {first} for all."
        )
    if not found["methods"][ORACLE]["saved_at_no_drop"] > 0.0:
        return False, f"{first} -> {second} is not routable: {second} is better on every prompt."
    interval = own["apgr_interval"]
    saved, nearly = own["saved_at_no_drop"], own["saved_at_1_percent_drop"]
    if (interval[0] if interval else own["apgr"]) <= 0.5:
        between = f" (95 % interval {interval[0]:.3f} to {interval[1]:.3f})" if interval else ""
        return False, (
            f"{first} -> {second} is not routable on this evidence: the ranking recovers "
            f"{own['apgr']:.3f} of the quality gap on average{between}, which chance (0.500) can "
            "do; grade more prompts, or choose by price."
        )
    best = found.get("best_baseline")
    beside = ""
    if best is not None:
        beside = f"; the best baseline, {best}, {found['methods'][best]['apgr']:.3f}"
    by_chance = found["methods"][RANDOM]["saved_at_1_percent_drop"]
    if saved < 0.01 and nearly <= by_chance:
        return True, (
            f"{first} -> {second} is worth routing only where quality may fall below all-{second}: "
            f"next to it nothing is saved (at a 1 % drop {nearly:.0%} of the {second} calls, by "
            f"chance {by_chance:.0%}), half of the gap costs {own['cpt50']:.0%} of them, by chance "
            f"50% ({levels}; share of the gap recovered {own['apgr']:.3f}{beside}; random 0.500)."
        )
    return True, (
        f"{first} -> {second} is worth routing: {saved:.0%} of the {second} calls can be saved at "
        f"no drop below all-{second} and {nearly:.0%} at a 1 % drop ({levels}; share of the gap "
        f"recovered {own['apgr']:.3f}{beside}; random 0.500)."
    )


def graded_apart(labels: FloatArray, tiers: Sequence[str]) -> list[str]:
    """A sentence per pair of graded tiers that too few rows grade side by side to be judged."""
    known = ~np.isnan(labels)
    return [
        f"{tiers[first]} and {tiers[second]} are graded side by side on {both} rows, fewer than "
        f"{MIN_ROWS}: whether that pair is worth routing cannot be judged; grade both tiers' "
        "answers to the same prompts"
        for first, second in itertools.combinations(range(len(tiers)), 2)
        if known[:, first].any() and known[:, second].any()
        if (both := int((known[:, first] & known[:, second]).sum())) < MIN_ROWS
    ]


def lines(found: Report) -> list[str]:
    """The report as a person reads it in a terminal."""
    out: list[str] = []
    for name, pair in found["pairs"].items():
        if pair["methods"][PREDICTOR]["apgr"] is None:
            continue
        out.append(f"{name}, {pair['num_rows']:,} rows")
        out.append(
            f"  {'':<24}{'APGR':>7}{'95 % interval':>16}{'CPT50':>8}{'CPT80':>8}"
            f"{'saved, no drop':>16}{'1 % drop':>10}"
        )
        ranked = sorted(pair["methods"].items(), key=lambda item: -(item[1]["apgr"] or 0.0))
        for method, values in ranked:
            interval = values["apgr_interval"]
            shown = f"{interval[0]:.3f} - {interval[1]:.3f}" if interval else ""
            out.append(
                f"  {method[:24]:<24}{values['apgr']:>7.3f}{shown:>16}"
                f"{values['cpt50']:>8.1%}{values['cpt80']:>8.1%}"
                f"{values['saved_at_no_drop']:>16.1%}{values['saved_at_1_percent_drop']:>10.1%}"
            )
    for tier, head in found["heads"].items():
        out.append(
            f"{tier}: quality {head['mean_quality']:.3f}, ECE {head['ece']:.3f} (chance alone: "
            f"{head['ece_if_perfect']:.3f}), Brier {head['brier']:.4f} (a constant: "
            f"{head['brier_of_the_mean']:.4f})"
        )
    for tier, length in found["lengths"].items():
        out.append(
            f"{tier}: answers of {length['mean_tokens']:.0f} tokens, pinball q50 "
            f"{length['pinball_q50']:.1f} (a constant: {length['pinball_q50_of_a_constant']:.1f}), "
            f"{length['inside_q10_to_q90']:.0%} inside q10..q90"
        )
    verifier = found.get("cascade")
    if verifier:
        out.append(verifier["sentence"])
    out += [pair["sentence"] for pair in found["pairs"].values()]
    out += found["not_judged"]
    return out
