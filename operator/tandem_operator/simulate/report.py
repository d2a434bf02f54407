"""A run as people read it: a table in the terminal, one HTML page with plots."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

_COLUMNS = ("p50", "p90", "p95", "p99", "mean")


def table(result: dict[str, Any]) -> str:
    """The result in lines of text."""
    lines = [
        f"{result['requests']} requests in {result['duration_s']:.0f} s: {result['served']} "
        f"served, {result['rejected']} rejected, {result['failed']} failed",
        "",
        f"{'':14}{'p50':>10}{'p90':>10}{'p95':>10}{'p99':>10}{'mean':>10}",
    ]
    for name, label in (
        ("ttft_s", "TTFT"),
        ("tpot_s", "TPOT"),
        ("itl_s", "ITL, pooled"),
        ("e2e_s", "E2E"),
    ):
        row = result[name]
        cells = "".join(f"{_time(row.get(key)):>10}" for key in _COLUMNS)
        lines.append(f"{label:14}{cells}")
    slo = result["slo"]
    lines.append("")
    lines.append(
        f"SLO met       {_share(slo['both'])} (TTFT {_share(slo['ttft'])}, "
        f"TPOT {_share(slo['tpot'])}); rejected and failed requests count as missed"
    )
    lines.append(f"goodput       {result['goodput_per_s']:.3g} requests/s")
    for tier, row in result["tiers"].items():
        lines.append(
            f"tier {tier:9}{row['requests']} requests ({_share(row['share'])}), "
            f"TTFT p95 {_time(row['ttft_s']['p95'])}, TPOT p95 {_time(row['tpot_s']['p95'])}"
        )
    if result["quality_ratio"] is not None:
        lines.append(
            f"quality       {result['quality']:.4f}, {result['quality_ratio']:.4f} of the dearest"
        )
    usd = result["usd"]
    lines.append(
        f"cost          ${usd['total']:.2f} (${usd['workers']:.2f} workers by the hour, "
        f"${usd['tokens']:.2f} external tokens), {result['gpu_hours']:.2f} GPU hours"
    )
    for pool, hours in result["pod_hours"].items():
        lines.append(f"pool {pool:20} {hours:.2f} worker hours")
    if result["decisions"]:
        lines.append("")
        lines.append(f"{len(result['decisions'])} scaling decisions; the last ten:")
        lines += [
            f"  {d['at_s']:8.0f} s  {d['pool']:16} {d['before']:g} -> {d['after']:g}  {d['reason']}"
            for d in result["decisions"][-10:]
        ]
    return "\n".join(lines)


def _time(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value * 1000.0:.1f} ms" if value < 1.0 else f"{value:.2f} s"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100.0 * value:.1f} %"


_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;
color-scheme:light dark}pre{overflow:auto}svg{width:100%;height:11rem;border:1px solid #8884}
polyline{fill:none;stroke-width:1.5}figcaption{font-size:.9em}table{border-collapse:collapse}
td,th{padding:.2rem .6rem;text-align:left;border-bottom:1px solid #8884}
"""
_COLOURS = ("#3478c6", "#c0562f", "#3a8f52", "#8452a8", "#a88a1d", "#5b6b7a")


def page(result: dict[str, Any], title: str) -> str:
    """One HTML page that needs no network."""
    timeline = result["timeline"]
    times = [point["at_s"] for point in timeline]
    pools = sorted({name for point in timeline for name in point["workers"]})
    figures = [
        _figure("Workers", times, {p: [t["workers"].get(p, 0) for t in timeline] for p in pools}),
        _figure(
            "Sequences",
            times,
            {
                "running": [t["running"] for t in timeline],
                "waiting": [t["waiting"] for t in timeline],
            },
        ),
        _figure("Utilisation", times, {"busy share": [t["utilisation"] for t in timeline]}),
        _figure("Gain threshold", times, {"threshold": [t["threshold"] for t in timeline]}),
    ]
    rows = "".join(
        f"<tr><td>{d['at_s']:.0f} s<td>{html.escape(d['pool'])}<td>{d['before']:g}"
        f"<td>{d['after']:g}<td>{html.escape(d['reason'])}"
        for d in result["decisions"]
    )
    decisions = (
        f"<h2>Scaling decisions</h2><table><tr><th>time<th>pool<th>before<th>after<th>reason{rows}"
        "</table>"
        if rows
        else ""
    )
    return (
        "<!doctype html><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style><h1>{html.escape(title)}</h1>"
        f"<pre>{html.escape(table(result))}</pre>{''.join(figures)}{decisions}\n"
    )


def _figure(name: str, times: Sequence[float], series: dict[str, Sequence[float]]) -> str:
    if len(times) < 2 or not series:
        return ""
    top = max(max(values) for values in series.values()) or 1.0
    span = (times[-1] - times[0]) or 1.0
    step = max(1, len(times) // 800)
    lines = []
    legend = []
    for index, (label, values) in enumerate(series.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        points = " ".join(
            f"{1000.0 * (times[i] - times[0]) / span:.1f},{150.0 - 140.0 * values[i] / top:.1f}"
            for i in range(0, len(times), step)
        )
        lines.append(f"<polyline stroke='{colour}' points='{points}'/>")
        legend.append(f"<b style='color:{colour}'>{html.escape(label)}</b>")
    return (
        f"<figure><svg viewBox='0 0 1000 155' preserveAspectRatio='none' role=img "
        f"aria-label='{html.escape(name)}'>{''.join(lines)}</svg><figcaption>{html.escape(name)}, "
        f"0 to {top:.4g}, over {span:.0f} s: {', '.join(legend)}</figcaption></figure>"
    )
