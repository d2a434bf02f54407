"""A report as lines for a terminal: the verdict last, since that is what stays in sight."""

from __future__ import annotations

from tandem_router.predictor.evaluation.verdict import PREDICTOR, Report


def lines(found: Report) -> list[str]:
    """The report as a person reads it."""
    out: list[str] = []
    for name, pair in found["pairs"].items():
        if pair["methods"][PREDICTOR]["apgr"] is not None:
            out += _methods(name, pair)
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
    for tier, spend in found["spend"].items():
        off = "" if spend["error"] is None else f", {spend['error']:+.1%}"
        out.append(
            f"{tier}: ${1000.0 * spend['mean_usd']:.4g} per 1,000 requests, predicted "
            f"${1000.0 * spend['predicted_mean_usd']:.4g}{off}"
        )
    verifier = found.get("cascade")
    if verifier:
        out.append(verifier["sentence"])
        if verifier["verifier_sentence"]:
            out.append(verifier["verifier_sentence"])
        out += [f"  by itself, {view['sentence']}" for view in verifier["views"].values()]
    return out + sentences(found)


def sentences(found: Report) -> list[str]:
    """What to do with each pair, a line each, and what stands beside it."""
    out: list[str] = []
    for name, pair in found["pairs"].items():
        out.append(f"{name}: {pair['sentence']}")
        if pair["routable"] and pair.get("beside"):
            out.append(f"  {pair['beside']}")
        out += _floors(pair)
    return out + list(found.get("not_judged", ()))


def _methods(name: str, pair: Report) -> list[str]:
    out = [
        f"{name}, {pair['num_rows']:,} rows (APGR: share of the gap recovered over all shares of "
        "calls, chance .500; CPT50: share of calls that recovers half of it)",
        f"  {'':<24}{'APGR':>7}{'95 % interval':>16}{'CPT50':>8}{'CPT80':>8}"
        f"{'saved, no drop':>16}{'1 % drop':>10}",
    ]
    ranked = sorted(pair["methods"].items(), key=lambda item: -(item[1]["apgr"] or 0.0))
    for method, values in ranked:
        interval = values["apgr_interval"]
        shown = f"{interval[0]:.3f} - {interval[1]:.3f}" if interval else ""
        out.append(
            f"  {method[:24]:<24}{values['apgr']:>7.3f}{shown:>16}"
            f"{values['cpt50']:>8.1%}{values['cpt80']:>8.1%}"
            f"{values['saved_at_no_drop']:>16.1%}{values['saved_at_1_percent_drop']:>10.1%}"
        )
    return out


def _floors(pair: Report) -> list[str]:
    rows = pair.get("floors")
    if not rows:
        return []
    money = rows[0]["saved_usd_per_1000"] is not None
    what = "cost" if money else "calls"
    out = []
    if not pair["routable"]:
        out.append("  what a floor that loses more than half a point saves all the same:")
    out.append(
        f"  {'floor':>7}{'saved ' + what:>13}{'mixing':>9}{'quality':>9}   to paste into the Router"
    )
    for row in rows:
        mixed = f"{row['mixed']:.0%}" if "mixed" in row else "-"  # older artifacts lack it
        out.append(
            f"  {row['floor']:>7g}{row['saved']:>13.0%}{mixed:>9}{row['quality']:>9.3f}"
            f"   {row['yaml']}"
        )
    return out
