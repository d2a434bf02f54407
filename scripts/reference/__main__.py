"""`make reference`: writes docs/reference/ and docs/troubleshooting.md from the code."""

from __future__ import annotations

import sys
from pathlib import Path

from reference import chart, commands, fields, headers, metrics, troubleshooting
from reference.codes import ROOT, UnreadableError

DOCS = ROOT / "docs"


def pages() -> dict[Path, str]:
    """Every generated page. Raises UnreadableError where the source and what is said differ."""
    from tandem_router.config import RouterConfig
    from tandem_worker.config import WorkerConfig

    troubleshooting.check()
    made = {f"reference/{name}": text for name, text in fields.kind_pages().items()}
    made["reference/commands.md"] = commands.page()
    made["reference/headers.md"] = headers.page()
    made["reference/metrics.md"] = metrics.page()
    made["reference/chart.md"] = chart.page()
    made["reference/conditions.md"] = troubleshooting.conditions_page()
    made["reference/router-configuration.md"] = fields.configuration_page(
        "Router configuration",
        "The file that `tandem-router --config` reads; the operator writes it from a Router. "
        "What changes without a restart is in [router](../router.md#for-operators).",
        RouterConfig,
    )
    made["reference/worker-configuration.md"] = fields.configuration_page(
        "Worker configuration",
        "The file that `tandem-worker --config` reads; the operator writes it from a Model.",
        WorkerConfig,
    )
    made["troubleshooting.md"] = troubleshooting.page()
    made["../router/tandem_router/error_codes.json"] = troubleshooting.explanations()
    made["../worker/tandem_worker/error_codes.json"] = troubleshooting.explanations("worker")
    return {(DOCS / name).resolve(): text.rstrip() + "\n" for name, text in made.items()}


def main() -> int:
    """Write what differs; say what that was."""
    try:
        made = pages()
    except UnreadableError as error:
        sys.stderr.write(f"reference: {error}\n")
        return 1
    (DOCS / "reference").mkdir(exist_ok=True)
    changed = [p for p, text in made.items() if not p.exists() or p.read_text() != text]
    for path in changed:
        path.write_text(made[path])
        sys.stdout.write(f"wrote {path.relative_to(ROOT)}\n")
    if not changed:
        sys.stdout.write("the reference is current\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
