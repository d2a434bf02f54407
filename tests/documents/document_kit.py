"""What a page tells its reader to type: the console lines and YAML blocks of a Markdown file, and
who runs each of them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
GETTING_STARTED = DOCS / "getting-started.md"
TASKS = sorted(p for p in (DOCS / "tasks").glob("*.md") if p.name != "index.md")
EXAMPLES = sorted(p for p in (ROOT / "examples").iterdir() if re.match(r"\d\d-", p.name))
_FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)

#: Typed by a reader and run by no test: by how a line begins, why, and what looks at it instead.
NOT_RUN = {
    "make setup": "installs from a registry; every test runs in what it made",
    "python3 -m build --wheel": "fetches a build system; tests/project/test_wheel.py builds the "
    "wheel without a network",
    "pip install ": "the same test installs it",
    "kubectl wait --for=condition=GatewayReady ": "needs the definitions of Gateway "
    "API's Inference Extension; tests/operator/test_gateway.py drives the condition, tests/gateway "
    "an Envoy",
    "docker ": "no container runtime here; files and names are compared with the chart's line",
}

#: Examples that `tandem up` does not start here, and what starts them.
STARTED_ELSEWHERE = {
    "01-hybrid": "tests/e2e, with its real models",
    "02-vllm": "tests/e2e/test_vllm_example.py, with servers that answer as vLLM does",
    "07-own-weights": "claims are a cluster's: tests/controlplane/test_documents.py",
    "09-gpus": "GPUs are a cluster's: tests/controlplane/test_documents.py",
    "13-keda": "KEDA's kinds: the HPA that KEDA makes of it, in tests/controlplane/test_scaling.py",
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


def run_by(page: Path) -> list[tuple[str, str]]:
    """(line, who runs it) of a page: `here`, `cluster`, or `nobody`; "" where that is not known.

    What follows a forwarded port is asked through it, so it is the cluster's too.
    """
    found, forwarded = [], False
    for line in commands(page):
        forwarded |= line.startswith("kubectl port-forward ")
        if line.startswith(tuple(NOT_RUN)):
            who = "nobody"
        elif line.startswith(("kubectl ", "helm ")) or forwarded:
            who = "cluster"
        else:
            who = "here" if line.startswith(("tandem ", "curl ", "export ")) else ""
        found.append((line, who))
    return found


def here(page: Path) -> list[str]:
    """The lines that run on one machine."""
    return [line for line, who in run_by(page) if who == "here"]


def of_cluster(page: Path) -> list[str]:
    """The lines that run against a cluster."""
    return [line for line, who in run_by(page) if who == "cluster"]


def example_of(page: Path) -> Path:
    """The file of `examples/` that a task page shows; a route, which is a gateway's, aside."""
    shown = re.findall(r'^--8<-- "(examples/[^"]+)"$', page.read_text(), re.M)
    shown = [file for file in shown if not file.endswith("/route.yaml")]
    assert len(shown) == 1, f"{page.name} shows {shown}"
    return ROOT / shown[0]
