"""The page of every header: which there are is read from the source, what they mean from the docs.

`docs/router.md` explains the headers of clients and `docs/contract.md` those between our own
processes; a header of the source that neither explains is an error.
"""

from __future__ import annotations

import ast
import re

from reference.codes import ROOT, SERVERS, UnreadableError, modules, texts
from reference.markdown import HEAD, cell, code, table

NAME = re.compile(r"^x-(tandem-[a-z-]+|request-id|should-retry)$")
#: Named in passing on those pages, or of one route only.
ALSO = {
    "x-tandem-draining": ("worker", "on a 503: the worker drains and takes nothing new"),
    "x-should-retry": (
        "reply",
        "`false`: the same request cannot succeed later; clients that "
        "repeat by status code alone stop",
    ),
    "x-tandem-cache": ("reply", "the answer came from the response cache"),
    "retry-after": ("reply", "seconds after which the same request may succeed"),
    "cache-control": ("request", "`no-cache`: ask a worker even if the answer is in the cache"),
    "authorization": ("request", "`Bearer KEY`: an API key, once a Router has tenants"),
}


def used() -> set[str]:
    """Headers of ours that router or worker read or write."""
    found: set[str] = set()
    for folder in SERVERS.values():
        for _, tree in modules(folder):
            found |= {t for t in texts(tree) | _bytes(tree) if NAME.match(t)}
    return found


def _bytes(tree: ast.AST) -> set[str]:
    return {
        n.value.decode("latin-1")
        for n in ast.walk(tree)
        if isinstance(n, ast.Constant) and isinstance(n.value, bytes)
    }


def explained() -> dict[str, tuple[str, str]]:
    """Per header, (who sends it, meaning) as the tables of the pages say."""
    found: dict[str, tuple[str, str]] = dict(ALSO)
    for page, default in (("contract.md", "router to worker"), ("router.md", "")):
        where = default
        for line in (ROOT / "docs" / page).read_text().splitlines():
            head = re.match(r"^\| (request header|reply header|header) \|", line)
            if head:
                where = {"request header": "request", "reply header": "reply"}.get(head[1], default)
            if not line.startswith("| `x-"):
                continue
            names, meaning = line.strip("| ").split(" | ", 1)
            for name in re.findall(r"`(x-[a-z-]+)", names):
                found[name] = (where, meaning)
    return found


def page() -> str:
    """Every header that has an effect, or tells something."""
    known = explained()
    if missing := used() - set(known):
        raise UnreadableError(
            f"headers {', '.join(sorted(missing))} are used and not explained: add them to "
            f"a table of docs/router.md or docs/contract.md, or to ALSO in {__name__}"
        )
    out = [
        HEAD + "# Headers\n",
        "No other header of a client has an effect, and none of a client reaches a worker or a "
        "provider.\n",
    ]
    for title, kinds in (
        ("Of requests", ("request",)),
        ("Of replies", ("reply",)),
        ("Between router and workers", ("router to worker", "worker")),
    ):
        rows = [(code(n), _relinked(m)) for n, (w, m) in sorted(known.items()) if w in kinds]
        out += [f"## {title}\n", table(("header", "meaning"), rows)]
    return "\n".join(out)


def _relinked(text: str) -> str:
    """Links of a page in docs/, as seen from docs/reference/."""
    moved = re.sub(r"\]\((?!https?:|#)", "](../", text.replace("](#", "](../contract.md#"))
    return cell(moved).replace("\\\\|", "\\|")
