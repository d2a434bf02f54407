"""What the documents tell a reader to apply to a cluster is taken by a real apiserver."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from document_kit import DOCS, ROOT, blocks, of_cluster
from tandem_operator.cli import main

PAGE = DOCS / "getting-started.md"
# KEDA's kinds are not there; test_scaling.py has what KEDA makes of that example.
EXAMPLES = [p for p in sorted((ROOT / "examples").glob("[0-9][0-9]-*")) if p.name != "13-keda"]


def typed(cluster: Any, line: str, folder: Path) -> None:
    """Run a line as far as a server without pods can go; it changes nothing."""
    if line.startswith(("kubectl apply", "kubectl create")):
        line += " --dry-run=server"
    elif line.startswith("kubectl delete"):
        line += " --dry-run=client --ignore-not-found"
    elif line.startswith("helm "):
        line = line.replace("charts/tandem", f"{ROOT}/charts/tandem") + " --dry-run=client"
    if line.startswith("kubectl label"):
        return  # of the Secret that the line before would have made
    result = cluster.run("sh", "-c", f"cd '{folder}' && {line}")
    assert result.returncode == 0, f"{line}\n{result.stderr}"


def for_cluster(text: str) -> str:
    """chat.yaml with the three lines of step 12's table changed."""
    rows = re.findall(r"^\| (?:Model|Router).*\| `(\S+)` \| `(\S+)` \|$", PAGE.read_text(), re.M)
    assert len(rows) == 3
    for old, new in rows:
        text, changed = re.subn(re.escape(old).replace("…", r"[^\"]*"), new, text)
        assert changed == 1, (old, text)
    return text


def test_the_second_half_of_getting_started(crds: Any, tmp_path: Path) -> None:
    models = tmp_path / "models"
    for ours, theirs in (("small", "tiny-1b"), ("large", "giant-70b")):
        shutil.copytree(ROOT / "examples" / "models" / ours, models / theirs)
    chat = tmp_path / "chat.yaml"
    small, large = models / "tiny-1b", models / "giant-70b"
    assert main(["init", "--small", str(small), "--large", str(large), "-o", str(chat)]) == 0
    claim, plugged = (b.text for b in reversed([b for b in blocks(PAGE) if b.language == "yaml"]))
    lines = "".join(f"  {line}\n" for line in plugged.splitlines())
    told = "".join(
        line
        for line in chat.read_text().splitlines(keepends=True)
        if not line.lstrip().startswith("#")
    )
    local = told.replace("  predictor: {type: Length}\n", lines)
    (tmp_path / "cluster.yaml").write_text(for_cluster(local))
    (tmp_path / "claim.yaml").write_text(claim)
    shutil.copy(ROOT / "examples" / "01-hybrid" / "predictor", tmp_path / "predictor")

    for line in of_cluster(PAGE):
        typed(crds, line, tmp_path)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda p: p.name)
def test_every_example_is_taken(crds: Any, example: Path) -> None:
    typed(crds, f"kubectl apply -f '{example}'", ROOT)


@pytest.mark.parametrize("page", sorted((DOCS / "tasks").glob("*.md")), ids=lambda p: p.stem)
def test_what_a_task_page_types_for_a_cluster(crds: Any, page: Path) -> None:
    for line in of_cluster(page):
        typed(crds, line, ROOT)
