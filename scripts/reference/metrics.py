"""The page of every metric, read from where each is made."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from reference.codes import ROOT, modules
from reference.markdown import HEAD, cell, code, table

PACKAGES = (
    ("Router", ROOT / "router" / "tandem_router", "`GET /metrics` of a router pod"),
    ("Worker", ROOT / "worker" / "tandem_worker", "`GET /metrics` of a worker pod"),
    ("Operator", ROOT / "operator" / "tandem_operator" / "kube", "`GET /metrics` of the operator"),
)
KINDS = {
    "counter": "counter",
    "counters": "counter",
    "Counter": "counter",
    "CounterMetricFamily": "counter",
    "gauge": "gauge",
    "gauges": "gauge",
    "Gauge": "gauge",
    "GaugeMetricFamily": "gauge",
    "histogram": "histogram",
    "histograms": "histogram",
    "Histogram": "histogram",
}


class Metric(NamedTuple):
    """One family as a scraper sees it."""

    name: str
    kind: str
    labels: tuple[str, ...]
    text: str


def page() -> str:
    """Every family of every process."""
    out = [HEAD + "# Metrics\n", "Times are seconds, money is US dollars, shares are 0 to 1.\n"]
    for title, folder, where in PACKAGES:
        rows = [
            (code(m.name), m.kind, ", ".join(map(code, m.labels)), cell(m.text))
            for m in sorted(set(families(folder)))
        ]
        out += [
            f"## {title}\n",
            f"{where}.\n",
            table(("metric", "type", "labels", "meaning"), rows),
        ]
    return "\n".join(out)


def families(folder: Path) -> Iterator[Metric]:
    """The families that the modules below a folder make."""
    for path, tree in modules(folder):
        if (
            "prometheus_client" not in path.read_text()
            and "tandem_operator_" not in path.read_text()
        ):
            continue
        extra = ("model_name",) if "tandem_worker" in path.parts else ()
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
                name = name or getattr(node.func, "id", "")
                if name in KINDS and (found := _of_call(node, KINDS[name], extra)):
                    yield found
            elif isinstance(node, ast.Tuple) and (found := _of_tuple(node, tree, extra)):
                yield found


def _text(node: ast.AST | None) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def _of_call(call: ast.Call, kind: str, extra: tuple[str, ...]) -> Metric | None:
    name, text = (_text(a) for a in (*call.args[:2], None, None)[:2])
    if name is None or text is None:
        return None
    given = [*call.args[2:], *(k.value for k in call.keywords if k.arg == "labels")]
    labels = extra
    for node in given:
        if isinstance(node, ast.List | ast.Tuple) and node.elts and all(map(_text, node.elts)):
            labels = tuple(str(_text(e)) for e in node.elts)
        elif isinstance(node, ast.Name) and node.id == "tier":
            labels = ("tier",)
    return Metric(_full(name, kind), kind, labels, text)


def _of_tuple(node: ast.Tuple, tree: ast.AST, extra: tuple[str, ...]) -> Metric | None:
    texts = [_text(e) for e in node.elts]
    if len(texts) == 4 and texts[1] in ("counter", "gauge") and texts[0] and texts[2]:
        return Metric(_full(texts[0], texts[1]), texts[1], (), texts[2])
    name = texts[0] if texts else None
    if len(texts) == 3 and name and name.startswith(("vllm:", "tandem_")) and texts[1]:
        kind = _kind_of_list(node, tree)
        return Metric(_full(name, kind), kind, extra, texts[1])
    return None


def _kind_of_list(node: ast.Tuple, tree: ast.AST) -> str:
    """Gauges stand in a list of that name; all other tuples are totals."""
    for other in ast.walk(tree):
        if isinstance(other, ast.Assign) and node in list(ast.walk(other.value)):
            names = [t.id for t in other.targets if isinstance(t, ast.Name)]
            return "gauge" if names == ["gauges"] else "counter"
    return "counter"


def _full(name: str, kind: str) -> str:
    """The name that stands in the scraped text."""
    full = name if name.startswith(("vllm:", "tandem_")) else f"tandem_{name}"
    return f"{full}_total" if kind == "counter" and not full.endswith("_total") else full
