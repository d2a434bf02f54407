"""Tables as kubectl prints them, from the printer columns of the CRDs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from tandem_operator.resources.base import Object
from tandem_operator.resources.timestamps import seconds_since_epoch


def _condition(obj: Object, kind: str, field: str) -> str:
    for c in (obj.get("status") or {}).get("conditions") or []:
        if c["type"] == kind:
            return str(c.get(field) or "")
    return ""


_FILTER = re.compile(r'^\.status\.conditions\[\?\(@\.type=="(\w+)"\)\]\.(\w+)$')


def cell(obj: Object, path: str) -> str:
    """The value at a JSON path of the kinds that the CRDs use; "" when absent."""
    if match := _FILTER.match(path):
        return _condition(obj, match[1], match[2])
    value: Any = obj
    for part in path.strip(".").split("."):
        if not isinstance(value, dict) or part not in value:
            return ""
        value = value[part]
    return str(value)


def age(timestamp: str, now: datetime | None = None) -> str:
    """Time since an RFC 3339 time in kubectl's short form, such as 5s, 3m or 2h."""
    total = max(0, int((now or datetime.now(UTC)).timestamp() - seconds_since_epoch(timestamp)))
    for unit, length in (("d", 86_400), ("h", 3_600), ("m", 60)):
        if total >= 2 * length:
            return f"{total // length}{unit}"
    return f"{total}s"


PLAIN_COLUMNS: dict[str, list[Object]] = {
    "Pod": [
        {"name": "Phase", "jsonPath": ".status.phase"},
        {"name": "Ready", "jsonPath": '.status.conditions[?(@.type=="Ready")].status'},
        {"name": "Restarts", "jsonPath": "restarts"},
        {"name": "Reason", "jsonPath": "reason"},
        {"name": "IP", "jsonPath": ".status.podIP"},
        {"name": "Age", "jsonPath": ".metadata.creationTimestamp", "type": "date"},
    ],
    "Deployment": [
        {"name": "Wanted", "jsonPath": ".spec.replicas"},
        {"name": "Ready", "jsonPath": ".status.readyReplicas"},
        {"name": "Updated", "jsonPath": ".status.updatedReplicas"},
        {"name": "Age", "jsonPath": ".metadata.creationTimestamp", "type": "date"},
    ],
    "Event": [
        {"name": "Type", "jsonPath": ".type"},
        {"name": "Reason", "jsonPath": ".reason"},
        {"name": "Object", "jsonPath": "object"},
        {"name": "Message", "jsonPath": ".message"},
        {"name": "Age", "jsonPath": ".metadata.creationTimestamp", "type": "date"},
    ],
}


def columns_of(kind: str) -> list[Object]:
    """Columns of a kind, those of priority 0 of a custom resource."""
    if kind in PLAIN_COLUMNS:
        return PLAIN_COLUMNS[kind]
    from tandem_operator.resources.crds import COLUMNS

    fallback = [{"name": "Age", "jsonPath": ".metadata.creationTimestamp", "type": "date"}]
    return [c for c in COLUMNS.get(kind, fallback) if not c.get("priority")]


def row(kind: str, obj: Object) -> list[str]:
    """The cells of one object, its name first."""
    cells = [str(obj["metadata"]["name"])]
    for column in columns_of(kind):
        path = column["jsonPath"]
        if path == "restarts":
            statuses = (obj.get("status") or {}).get("containerStatuses") or []
            text = str(sum(s.get("restartCount", 0) for s in statuses))
        elif path == "reason":
            text = _pod_reason(obj)
        elif path == "object":
            ref = obj.get("involvedObject") or {}
            text = f"{ref.get('kind', '').lower()}/{ref.get('name', '')}"
        else:
            text = cell(obj, path)
            if column.get("type") == "date" and text:
                text = age(text)
        cells.append(text or ("" if path.startswith("reason") else "-"))
    return cells


def _pod_reason(pod: Object) -> str:
    if pod["metadata"].get("deletionTimestamp"):
        return "Terminating"
    status = pod.get("status") or {}
    for c in status.get("conditions") or []:
        if c["type"] == "PodScheduled" and c["status"] == "False":
            return str(c.get("reason", ""))
    for group in ("initContainerStatuses", "containerStatuses"):
        for c in status.get(group) or []:
            waiting = (c.get("state") or {}).get("waiting") or {}
            if waiting.get("reason"):
                return str(waiting["reason"])
    return ""


def header(kind: str) -> list[str]:
    """The head of a kind's table."""
    return ["NAME", *(str(c["name"]).upper() for c in columns_of(kind))]


def render(rows: Iterable[Sequence[str]], widths: list[int] | None = None) -> list[str]:
    """Rows as lines with aligned columns; widths, when given, are kept and grown."""
    table = [list(r) for r in rows]
    sizes = widths if widths is not None else []
    for cells in table:
        for i, text in enumerate(cells):
            if i >= len(sizes):
                sizes.append(0)
            sizes[i] = max(sizes[i], len(text))
    return [
        "   ".join(text.ljust(sizes[i]) for i, text in enumerate(cells)).rstrip() for cells in table
    ]
