"""What a page tells its reader to type: the console lines and YAML blocks of a Markdown file."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
_FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)


#: Commands of a cluster that an apiserver alone cannot answer, and what looks at them.
NEEDS_PODS = {
    "kubectl wait ": "tests/controlplane/test_hybrid.py waits for running pods",
    "kubectl cp ": "needs a kubelet with tar in a container",
    "kubectl port-forward ": "needs a running pod; the Service's name is compared",
}


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, its text, and the heading above it."""

    language: str
    text: str
    heading: str

    def commands(self) -> list[str]:
        """The lines that a reader types."""
        return [line[2:] for line in self.text.splitlines() if line.startswith("$ ")]


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text = page.read_text()
    found = []
    for match in _FENCE.finditer(text):
        headings = re.findall(r"^#+ (.+)$", text[: match.start()], re.M)
        found.append(Block(match[1], match[2], headings[-1]))
    return found


def commands(page: Path) -> list[str]:
    """Every command line of a page, in order."""
    return [c for b in blocks(page) if b.language == "console" for c in b.commands()]


def of_cluster(page: Path, elsewhere: Iterable[str] = tuple(NEEDS_PODS)) -> list[str]:
    """The commands of a page that a real apiserver checks without running pods."""
    typed = [line for line in commands(page) if line.startswith(("helm ", "kubectl "))]
    return [line for line in typed if not line.startswith(tuple(elsewhere))]
