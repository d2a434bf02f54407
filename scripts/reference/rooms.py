"""How a package's files and folders import each other: counted, and drawn floor by floor.

`PYTHONPATH=scripts python -m reference.rooms` prints the figures of docs/architecture.md and draws
docs/pictures/rooms-*.svg. A room is a file, or a folder with all below it; an arrow runs from a
room to one that it imports, for types or inside a function too; a room stands one floor above the
highest that it imports.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from graphlib import TopologicalSorter
from pathlib import Path
from xml.sax.saxutils import escape

from reference.codes import ROOT

PLANS = {
    "operator": ("operator", "tandem_operator"),
    "router": ("router", "tandem_router"),
    "predictor": ("router", "tandem_router.predictor"),
    "worker": ("worker", "tandem_worker"),
}
PICTURES = ROOT / "docs" / "pictures"
BOX_HEIGHT, FLOOR_HEIGHT, CHAR_WIDTH, GAP = 34, 74, 8.2, 26

Rooms = Mapping[str, frozenset[str]]


def rooms(folder: str, package: str) -> Rooms:
    """Each room with those that it imports."""
    source = ROOT / folder
    base = source / package.replace(".", "/")
    modules = {_name(path.relative_to(source)): path for path in base.rglob("*.py")}
    found: dict[str, set[str]] = {}
    for module, path in modules.items():
        room = _room(module, package)
        if room is None:
            continue
        uses = found.setdefault(room, set())
        for imported in _imports(path, modules):
            other = _room(imported, package)
            if other not in (None, room):
                uses.add(str(other))
    return {room: frozenset(uses) for room, uses in sorted(found.items())}


def floors(plan: Rooms) -> dict[str, int]:
    """The floor of each room. Raises graphlib.CycleError where rooms import in a circle."""
    floor: dict[str, int] = {}
    for room in TopologicalSorter(plan).static_order():
        floor[room] = 1 + max((floor[used] for used in plan.get(room, ())), default=0)
    return floor


def figures(plan: Rooms) -> tuple[int, int, int]:
    """(rooms, floors, arrows)."""
    return len(plan), max(floors(plan).values()), sum(map(len, plan.values()))


def svg(name: str, plan: Rooms) -> str:
    """The picture; an arrow that a longer way implies is not drawn."""
    floor = floors(plan)
    top = max(floor.values())
    rows = [[room for room in plan if floor[room] == at] for at in range(top, 0, -1)]
    widths = {room: CHAR_WIDTH * len(room) + 26 for room in plan}
    row_widths = [sum(widths[r] for r in row) + GAP * (len(row) - 1) for row in rows]
    width, height = max(row_widths) + 60, FLOOR_HEIGHT * top + 20
    middle: dict[str, tuple[float, float]] = {}
    for at, (row, row_width) in enumerate(zip(rows, row_widths, strict=True)):
        left = (width - row_width) / 2
        for room in row:
            middle[room] = (left + widths[room] / 2, 20 + at * FLOOR_HEIGHT + BOX_HEIGHT / 2)
            left += widths[room] + GAP
    title = f"The rooms of the {name}; every import goes down"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" '
        f'width="{width:.0f}" height="{height}" font-family="system-ui, sans-serif" '
        f'font-size="14" fill="#17323a" role="img" aria-label="{title}">',
        f"<title>{title}</title>",
        '<defs><marker id="a" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0 0L10 5L0 10z" fill="#5c7a82"/></marker></defs>',
        f'<rect width="{width:.0f}" height="{height}" rx="14" fill="#ffffff"/>',
    ]
    for room, other in _shortest(plan):
        (x0, y0), (x1, y1) = middle[room], middle[other]
        y0, y1 = y0 + BOX_HEIGHT / 2, y1 - BOX_HEIGHT / 2 - 2
        bend = (y1 - y0) / 2
        lines.append(
            f'<path d="M{x0:.0f} {y0:.0f}C{x0:.0f} {y0 + bend:.0f} {x1:.0f} {y1 - bend:.0f} '
            f'{x1:.0f} {y1:.0f}" fill="none" stroke="#5c7a82" marker-end="url(#a)"/>'
        )
    for room, (x, y) in middle.items():
        lines += [
            f'<rect x="{x - widths[room] / 2:.0f}" y="{y - BOX_HEIGHT / 2:.0f}" '
            f'width="{widths[room]:.0f}" height="{BOX_HEIGHT}" rx="9" fill="#e0f2f0" '
            'stroke="#00897b" stroke-width="1.5"/>',
            f'<text x="{x:.0f}" y="{y + 5:.0f}" text-anchor="middle">{escape(room)}</text>',
        ]
    return "\n".join([*lines, "</svg>", ""])


def _shortest(plan: Rooms) -> Iterator[tuple[str, str]]:
    reached: dict[str, set[str]] = {}
    for room in TopologicalSorter(plan).static_order():
        uses = plan.get(room, frozenset())
        reached[room] = set(uses).union(*(reached[used] for used in uses))
    for room, uses in plan.items():
        for used in sorted(uses):
            if not any(used in reached[other] for other in uses):
                yield room, used


def _name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def _room(module: str, package: str) -> str | None:
    """None for the package's own face."""
    inside = module.removeprefix(package).lstrip(".")
    return inside.split(".")[0] or None


def _imports(path: Path, modules: Mapping[str, Path]) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        named: list[str] = []
        if isinstance(node, ast.Import):
            named = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            named = [name if name in modules else node.module for name in whole]
        yield from (name for name in named if name in modules)


def main() -> int:
    """Print the figures, and write the pictures that differ."""
    for name, (folder, package) in PLANS.items():
        plan = rooms(folder, package)
        number, high, arrows = figures(plan)
        sys.stdout.write(f"{name}: {number} rooms, {high} floors, {arrows} arrows\n")
        picture = PICTURES / f"rooms-{name}.svg"
        drawn = svg(name, plan)
        if not picture.exists() or picture.read_text() != drawn:
            picture.write_text(drawn)
            sys.stdout.write(f"wrote {picture.relative_to(ROOT)}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
