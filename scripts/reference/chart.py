"""The page of every value of the chart, from the comments of its values.yaml."""

from __future__ import annotations

import re

from reference.codes import ROOT, UnreadableError
from reference.markdown import HEAD, cell, code, table


def page() -> str:
    """Every value with its default and what the comment above says."""
    rows, path, said = [], [], ""  # type: list[tuple[str, str, str]], list[tuple[int, str]], str
    for line in (ROOT / "charts" / "tandem" / "values.yaml").read_text().splitlines():
        if match := re.match(r"^\s*# -- (.*)$", line):
            said = match[1]
        elif said and (match := re.match(r"^\s*# (.*)$", line)):
            said += " " + match[1]
        elif match := re.match(r"^(\s*)([A-Za-z]\w*):\s*(.*)$", line):
            depth = len(match[1])
            path = [p for p in path if p[0] < depth] + [(depth, match[2])]
            if said:
                name = ".".join(p[1] for p in path)
                rows.append((code(name), code(match[3] or "see below it"), cell(said)))
            said = ""
        elif not line.strip():
            said = ""
    if len(rows) < 20:
        raise UnreadableError("the comments of charts/tandem/values.yaml were not understood")
    return (
        HEAD
        + "# Chart values\n\n`helm install tandem charts/tandem --set NAME=VALUE`; "
        + "`values.schema.json` refuses names that are not here.\n\n"
        + table(("value", "default", "meaning"), rows)
    )
