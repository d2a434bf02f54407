"""Conditions, and the troubleshooting page: the source's words joined with what is said of them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml
from reference.codes import UnreadableError, conditions, error_codes, request_reasons
from reference.markdown import HEAD, cell, code, table

from tandem_operator.cli.explain import CAUSES

HEADS = (("look", "Look at"), ("do", "What to do"))
SECTIONS = ("types", "conditions", "requests", "codes")


def rows() -> dict[str, dict[str, Any]]:
    """What is said of each word, by section."""
    said: dict[str, dict[str, Any]] = yaml.safe_load(Path(CAUSES).read_text())
    return said


def words() -> dict[str, set[str]]:
    """What the source can say, by section."""
    types, reasons = conditions()
    return {
        "types": types,
        "conditions": reasons,
        "requests": set(request_reasons()),
        "codes": set(error_codes()),
    }


def check() -> None:
    """Every word of the source has its row, and every row its word. Raises UnreadableError."""
    said, there = rows(), words()
    wrong = []
    for section in SECTIONS:
        missing = sorted(there[section] - set(said[section]))
        gone = sorted(set(said[section]) - there[section])
        wrong += [f"{section}: add a row for {word}" for word in missing]
        wrong += [f"{section}: remove {word}, which nothing says any more" for word in gone]
    if wrong:
        file = "operator/tandem_operator/cli/troubleshooting.yaml"
        raise UnreadableError(f"{file}: {'; '.join(wrong)}; then `make reference`")


def explanations(server: str | None = None) -> str:
    """JSON: what a server answers at /errors/CODE, of its own codes or (None) of all."""
    said = rows()["codes"]
    made = {}
    for name, by in error_codes().items():
        if server is None or server in by:
            lines = [name, "", said[name]["means"]]
            lines += [
                f"{head}: {plain(said[name][key])}" for key, head in HEADS if key in said[name]
            ]
            made[name] = "\n".join(lines) + "\n"
    return json.dumps(made, indent=1, ensure_ascii=False)


def plain(text: str) -> str:
    """Without the marks of Markdown: a link is its words, code its letters."""
    return re.sub(r"\[([^]]+)\]\([^)]+\)", r"\1", text).replace("`", "")


def conditions_page() -> str:
    """The page of conditions and reasons."""
    said = rows()
    out = [
        HEAD + "# Conditions and reasons\n",
        "`kubectl get` and `tandem get` show the reason of Ready, the first blocking cause; "
        "`describe` shows all conditions. What to do about a reason is in "
        "[troubleshooting](../troubleshooting.md).\n",
        "## Conditions\n",
        table(
            ("condition", "of", "meaning"),
            ((code(n), cell(r["of"]), cell(r["means"])) for n, r in sorted(said["types"].items())),
        ),
        "## Reasons\n",
        table(
            ("reason", "meaning"),
            (
                (f"[`{n}`](../troubleshooting.md#{n.lower()})", cell(r["means"]))
                for n, r in sorted(said["conditions"].items())
            ),
        ),
        "## Reasons of a request\n",
        "In `x-tandem-reason`, in `/admin/decisions` and as a label of `tandem_decisions_total`.\n",
        table(
            ("reason", "meaning"),
            (
                (f"[`{n}`](../troubleshooting.md#request-{n})", cell(r["means"]))
                for n, r in said["requests"].items()
            ),
        ),
        "## Error codes\n",
        "In `error.code` of a reply.\n",
        table(
            ("code", "from", "status", "meaning"),
            (
                (
                    f"[`{n}`](../troubleshooting.md#error-{n})",
                    ", ".join(by),
                    ", ".join(map(str, sorted(set().union(*by.values())))),
                    cell(said["codes"][n]["means"]),
                )
                for n, by in error_codes().items()
            ),
        ),
    ]
    return "\n".join(out)


def page() -> str:
    """The troubleshooting page."""
    said = rows()
    out = [
        "---\nhide: [toc]\n---\n\n" + HEAD + "# Troubleshooting\n",
        "Look a word up here, or type `tandem explain WORD` (such as `tandem explain Degraded`). "
        "Reasons are in `kubectl get` and `tandem get`, codes in `error.code` of a reply, a "
        "request's reason in `x-tandem-reason`.\n",
        "The first three looks, whatever it is: `tandem describe router NAME` (or `kubectl "
        "describe`), `tandem logs NAME`, and `http://ENDPOINT/admin/state`.\n",
    ]
    for title, section, prefix, intro in (
        (
            "Reasons of Models, Routers and pools",
            "conditions",
            "",
            "In the column REASON and in every condition.",
        ),
        (
            "Error codes",
            "codes",
            "error-",
            'Replies are `{"error": {"message", "type", "param", "code", "doc_url"}}`; the message '
            "names the thing and the next step, `doc_url` is where the router itself has this row "
            "(`curl http://ENDPOINT/errors/CODE`).",
        ),
        (
            "Reasons of a request",
            "requests",
            "request-",
            "Why this tier answered; none of these is an error by itself.",
        ),
    ):
        entries = said[section].items()
        if section != "requests":
            entries = sorted(entries, key=lambda e: e[0].lower())
        out += [f"## {title}\n", f"{intro}\n"]
        out.append(
            table(
                ("word", "what it means", "what to look at", "what to do"),
                (
                    (
                        f'<span id="{prefix + name if prefix else name.lower()}"></span>`{name}`',
                        cell(r["means"]),
                        cell(r.get("look", "nothing: all is well")),
                        cell(r.get("do", "nothing")),
                    )
                    for name, r in entries
                ),
            )
        )
    return "\n".join(out)
