"""The evaluation as one self-contained page: curves, reliability, tables; no script, no network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from tandem_router.predictor.evaluation.verdict import ORACLE, PREDICTOR

Report = dict[str, Any]

_WIDTH, _HEIGHT = 640, 380
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 16, 16, 44
#: Paul Tol's bright scheme, which colour-blind readers can tell apart; the predictor comes first.
_COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bb7722", "#777777")

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #6a737d; --line: #d8dee4; --paper: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8ea; --soft: #9aa4af; --line: #3a424c; --paper: #14171a; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
.note { color: var(--soft); } .say { border-left: 4px solid #4477aa; padding-left: .8rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; }
th, td { text-align: right; padding: .3rem .6rem; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child, .prompt { text-align: left; }
tr.own { font-weight: 600; } .prompt { max-width: 34rem; overflow-wrap: anywhere; }
svg { width: 100%; max-width: 640px; height: auto; display: block; }
svg text { fill: var(--soft); font: 12px system-ui, sans-serif; }
svg .axis { stroke: var(--line); } .legend span { white-space: nowrap; margin-right: 1rem; }
.swatch { display: inline-block; width: 1.2em; height: .3em; vertical-align: middle;
  margin-right: .4em; }
"""


def render(found: Report, title: str) -> str:
    """The page for a report of :func:`tandem_router.predictor.evaluation.report.report`."""
    data = found["data"]
    title = f"{', '.join(found['tiers'])}: {title}"
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        f'<p class="note">{data["num_rows"]:,} graded prompts in {data["num_groups"]:,} groups, '
        f"{data['num_rejected']:,} left out; data {escape(data['digest'][:12])}. "
        "Intervals are 95 % bootstrap intervals over groups.</p>",
        '<p class="note">APGR: the share of the quality gap between the two tiers that a ranking '
        "recovers, averaged over all shares of calls to the dearer one; random routing has 0.500. "
        "CPT50: the share of calls that recovers half of the gap; random routing needs 50 %.</p>",
    ]
    if found.get("trained_on_this_data"):
        parts.append(
            '<p class="say">The predictor was trained on this very data; expect less on other '
            "prompts. The verdicts are those of its training, on rows left out.</p>"
        )
    for name, pair in found["pairs"].items():
        parts += _pair(name, pair)
    parts += [f'<p class="say">{escape(sentence)}</p>' for sentence in found["not_judged"]]
    parts += _cascade(found.get("cascade"))
    parts += _heads(found["heads"])
    parts += _lengths(found["lengths"])
    parts += _spend(found["spend"])
    parts += _surprises(found["surprises"])
    parts.append("</body></html>\n")
    return "\n".join(parts)


def _pair(name: str, pair: Report) -> list[str]:
    out = [f"<h2>{escape(name)}</h2>"]
    out += [f'<p class="say">{escape(pair["sentence"])}</p>'] if pair.get("sentence") else []
    if pair.get("beside"):
        out.append(f'<p class="note">{escape(pair["beside"])}.</p>')
    out += _floors(pair.get("floors") or [])
    if pair["methods"][PREDICTOR]["apgr"] is None:
        return out
    curves = pair.get("curves")
    if curves:
        names = _ranked(pair)
        out.append(_legend(names))
        out.append(_curves(curves, names))
    out.append(
        '<div class="wide"><table><tr><th>ranking</th><th>APGR</th><th>95 %</th><th>CPT50</th>'
        "<th>CPT80</th><th>saved, no drop</th><th>saved, 1 % drop</th></tr>"
    )
    for method in _ranked(pair):
        values = pair["methods"][method]
        interval = values["apgr_interval"]
        cells = [
            escape(method),
            f"{values['apgr']:.3f}",
            f"{interval[0]:.3f} to {interval[1]:.3f}" if interval else "",
            *(
                f"{values[key]:.1%}"
                for key in ("cpt50", "cpt80", "saved_at_no_drop", "saved_at_1_percent_drop")
            ),
        ]
        row = "".join(f"<td>{cell}</td>" for cell in cells)
        out.append(f"<tr{' class=own' if method == PREDICTOR else ''}>{row}</tr>")
    out.append("</table></div>")
    return out


def _floors(rows: Sequence[Report]) -> list[str]:
    """Which floor saves what, with the line to paste."""
    if not rows:
        return []
    money = rows[0]["saved_usd_per_1000"] is not None
    out = [
        '<div class="wide"><table><tr><th>quality floor</th>'
        f"<th>saved {'cost' if money else 'calls'}</th>"
        + ("<th>saved per 1,000 requests</th>" if money else "")
        + "<th>a random mix saves</th><th>quality</th><th>to paste into the Router</th></tr>"
    ]
    for row in rows:
        mixed = f"{row['mixed']:.0%}" if "mixed" in row else "-"
        usd = f"<td>${row['saved_usd_per_1000']:,.4g}</td>" if money else ""
        out.append(
            f"<tr><td>{row['floor']:g}</td><td>{row['saved']:.0%}</td>{usd}"
            f"<td>{mixed}</td><td>{row['quality']:.3f}</td><td><code>{escape(row['yaml'])}</code></td></tr>"
        )
    out.append("</table></div>")
    return out


def _cascade(found: Report | None) -> list[str]:
    if not found:
        return []
    interval = found["apgr_interval"]
    cells = [
        f"{found['num_rows']:,}",
        f"{found['apgr']:.3f}",
        f"{interval[0]:.3f} to {interval[1]:.3f}" if interval else "",
        *(
            f"{found[key]:.1%}"
            for key in ("cpt50", "cpt80", "saved_at_no_drop", "saved_at_1_percent_drop")
        ),
    ]
    return [
        "<h2>With the first tier's answer</h2>",
        f'<p class="say">{escape(found["sentence"])}</p>',
        f"<p>{escape(found['verifier_sentence'])}</p>" if found["verifier_sentence"] else "",
        *(f"<p>By itself, {escape(view['sentence'])}</p>" for view in found["views"].values()),
        '<div class="wide"><table><tr><th>rows with an answer</th><th>APGR</th><th>95 %</th>'
        "<th>CPT50</th><th>CPT80</th><th>saved, no drop</th><th>saved, 1 % drop</th></tr>",
        "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr></table></div>",
    ]


def _ranked(pair: Report) -> list[str]:
    methods = pair["methods"]
    others = [name for name in methods if name not in (PREDICTOR, ORACLE)]
    return [PREDICTOR, *sorted(others, key=lambda name: -(methods[name]["apgr"] or 0.0)), ORACLE]


def _legend(names: Sequence[str]) -> str:
    items = "".join(
        f'<span><i class="swatch" style="background:{_colour(i)}"></i>{escape(name)}</span>'
        for i, name in enumerate(names)
    )
    return f'<p class="legend">{items}</p>'


def _colour(index: int) -> str:
    return _COLOURS[index % len(_COLOURS)]


def _curves(curves: Report, names: Sequence[str]) -> str:
    values = [y for name in names for y in curves[name]["quality"]]
    low, high = min(values), max(values)
    low, high = _round_range(low, high)
    lines = []
    for index, name in reversed(list(enumerate(names))):
        points = " ".join(
            f"{_x(share):.1f},{_y((quality - low) / (high - low)):.1f}"
            for share, quality in zip(curves[name]["share"], curves[name]["quality"], strict=True)
        )
        width = 2.5 if name == PREDICTOR else 1.3
        dash = ' stroke-dasharray="4 3"' if name == ORACLE else ""
        lines.append(
            f'<polyline fill="none" stroke="{_colour(index)}" stroke-width="{width}"{dash} '
            f'points="{points}"/>'
        )
    return _frame(
        "mean quality against the share of calls to the second tier",
        "share of calls to the second tier",
        "mean quality",
        (low, high),
        lines,
    )


def _frame(
    label: str, x_name: str, y_name: str, y_range: tuple[float, float], inside: Sequence[str]
) -> str:
    low, high = y_range
    step_size = _step(high - low)
    out = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}">']
    for value in np.arange(low, high + step_size / 2.0, step_size):
        at = (float(value) - low) / (high - low)
        out.append(
            f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{_y(at):.1f}" '
            f'y2="{_y(at):.1f}"/>'
            f'<text x="{_LEFT - 6}" y="{_y(at) + 4:.1f}" text-anchor="end">{value:.3g}</text>'
        )
    for tenth in range(0, 11, 2):
        out.append(
            f'<text x="{_x(tenth / 10):.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">'
            f"{tenth / 10:.0%}</text>"
        )
    out += inside
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    out.append(
        f'<text x="{middle}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(x_name)}</text>'
        f'<text transform="translate(14 {_HEIGHT / 2}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_name)}</text></svg>"
    )
    return "".join(out)


def _step(width: float) -> float:
    """A round step (1, 2 or 5 times a power of ten) that gives three to eight ticks."""
    unit = 10.0 ** math.floor(math.log10(width / 4.0))
    return next(unit * times for times in (1.0, 2.0, 5.0, 10.0) if width / (unit * times) <= 8.0)


def _round_range(low: float, high: float) -> tuple[float, float]:
    """The range from one round tick to another around the values, within 0 to 1."""
    step = _step(max(high - low, 0.01))
    bottom = max(math.floor(low / step + 1e-9) * step, 0.0)
    return bottom, max(min(math.ceil(high / step - 1e-9) * step, 1.0), bottom + step)


def _x(share: float) -> float:
    return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)


def _y(part: float) -> float:
    return _HEIGHT - _BOTTOM - part * (_HEIGHT - _TOP - _BOTTOM)


def _heads(heads: Report) -> list[str]:
    if not heads:
        return []
    names = list(heads)
    marks = [
        f'<line stroke="#777777" stroke-dasharray="4 3" x1="{_x(0)}" y1="{_y(0)}" x2="{_x(1)}" '
        f'y2="{_y(1)}"/>'
    ]
    for index, name in enumerate(names):
        points = [(_x(b["predicted"]), _y(b["actual"])) for b in heads[name]["reliability"]]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dots = "".join(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{_colour(index)}"/>' for x, y in points
        )
        marks.append(
            f'<polyline fill="none" stroke="{_colour(index)}" stroke-width="1.5" '
            f'points="{path}"/>{dots}'
        )
    out = ["<h2>Are the probabilities what they say?</h2>", _legend(names)]
    out.append(
        _frame("reliability diagram", "predicted quality", "actual quality", (0.0, 1.0), marks)
    )
    out.append(
        '<div class="wide"><table><tr><th>tier</th><th>rows</th><th>quality</th><th>ECE</th>'
        "<th>95 %</th><th>ECE by chance alone</th><th>Brier</th><th>Brier of a constant</th></tr>"
    )
    for name, head in heads.items():
        interval = head["ece_interval"]
        shown = f"{interval[0]:.3f} to {interval[1]:.3f}" if interval else ""
        out.append(
            f"<tr><td>{escape(name)}</td><td>{head['num_rows']:,}</td>"
            f"<td>{head['mean_quality']:.3f}</td><td>{head['ece']:.3f}</td><td>{shown}</td>"
            f"<td>{head['ece_if_perfect']:.3f}</td><td>{head['brier']:.4f}</td><td>{head['brier_of_the_mean']:.4f}</td></tr>"
        )
    out.append("</table></div>")
    return out


def _lengths(lengths: Report) -> list[str]:
    if not lengths:
        return []
    out = [
        "<h2>Answer lengths</h2>",
        '<div class="wide"><table><tr><th>tier</th><th>mean tokens</th><th>pinball q10</th>'
        "<th>q50</th><th>q90</th><th>q50 of a constant</th><th>inside q10..q90</th></tr>",
    ]
    for name, length in lengths.items():
        out.append(
            f"<tr><td>{escape(name)}</td><td>{length['mean_tokens']:.0f}</td>"
            + "".join(f"<td>{length[f'pinball_q{q}']:.1f}</td>" for q in (10, 50, 90))
            + f"<td>{length['pinball_q50_of_a_constant']:.1f}</td>"
            f"<td>{length['inside_q10_to_q90']:.0%}</td></tr>"
        )
    out.append("</table></div>")
    return out


def _spend(spend: Report) -> list[str]:
    if not spend:
        return []
    out = [
        "<h2>Dollars</h2>",
        '<div class="wide"><table><tr><th>tier</th><th>per 1,000 requests</th><th>predicted</th>'
        "<th>off by</th></tr>",
    ]
    for name, row in spend.items():
        off = "" if row["error"] is None else f"{row['error']:+.1%}"
        out.append(
            f"<tr><td>{escape(name)}</td><td>${1000 * row['mean_usd']:,.4g}</td>"
            f"<td>${1000 * row['predicted_mean_usd']:,.4g}</td><td>{off}</td></tr>"
        )
    out.append("</table></div>")
    return out


def _surprises(rows: Sequence[Report]) -> list[str]:
    if not rows:
        return []
    tiers = list(rows[0]["predicted"])
    head = "".join(f"<th>{escape(tier)}: was</th><th>expected</th>" for tier in tiers)
    out = [
        "<h2>The most surprising rows</h2>",
        '<p class="note">Where the difference between the tiers was farthest from the forecast: '
        "label errors, luck, or what the predictor cannot see.</p>",
        f'<div class="wide"><table><tr><th>prompt</th>{head}</tr>',
    ]
    for row in rows:
        cells = "".join(
            f"<td>{_number(row['quality'].get(tier))}</td><td>{row['predicted'][tier]:.2f}</td>"
            for tier in tiers
        )
        place = " ".join(part for part in (row["line"], row["task"]) if part)
        out.append(
            f'<tr><td class="prompt">{escape(row["prompt"])}<br>'
            f'<span class="note">{escape(place)}</span></td>{cells}</tr>'
        )
    out.append("</table></div>")
    return out


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
