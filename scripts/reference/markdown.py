"""Tables and cells of Markdown, as the generated pages write them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

HEAD = "<!-- Written by `make reference` from the code; do not edit. -->\n\n"


def cell(text: object) -> str:
    """A text that stands in a table: one line, no bars, no tags."""
    flat = " ".join(str(text).split())
    return flat.replace("|", "\\|").replace("<", "&lt;")


def code(text: object) -> str:
    """A text in code font; nothing for nothing."""
    flat = " ".join(str(text).split()).replace("|", "\\|")
    return f"`{flat}`" if flat else ""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; cells are written as they are."""
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"
