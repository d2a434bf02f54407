"""docs/architecture.md leads somewhere: every file and folder that its tables name is there."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAP = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
ROWS = [line for line in MAP.splitlines() if line.startswith("| ") and "`" in line]
NAMED = re.compile(r"`([A-Za-z0-9_./-]+(?:\.py|\.md|\.yaml|\.sh|/))`")


def test_every_file_of_the_map_is_there() -> None:
    """A row names a file whole, or by its end where the row's first name says the rest."""
    folders = (
        "operator",
        "router",
        "worker",
        "kernels",
        "scripts",
        "tests",
        "docs",
        "charts",
        "examples",
    )
    paths = [p for folder in folders for p in (ROOT / folder).rglob("*")]
    ends = {f"/{p.relative_to(ROOT).as_posix()}{'/' if p.is_dir() else ''}" for p in paths}
    names = {name for row in ROWS for name in NAMED.findall(row)}
    lost = [n for n in sorted(names) if not any(end.endswith(f"/{n}") for end in ends)]

    assert len(names) > 100
    assert lost == []


# What a newcomer asks for, in the word they would type, and the file that answers.
ASKED = {
    "Retry-After": "router/tandem_router/proxy/tier_assignment.py",
    "rate limit": "router/tandem_router/limits/ledger.py",
    "CORS": "router/tandem_router/api/origin.py",
    "TLS": "router/tandem_router/http/client.py",
    "deadline": "router/tandem_router/http/deadlines.py",
    "slow client": "router/tandem_router/http/server.py",
    "answer cost": "router/tandem_router/limits/prices.py",
    "preempt": "worker/tandem_worker/scheduling/scheduler.py",
    "log-prob": "worker/tandem_worker/openai/response.py",
    "image": "router/tandem_router/openai/prompt_size.py",
    "conformal": "router/tandem_router/control/certified_floor.py",
    "PodDisruptionBudget": "operator/tandem_operator/plan/objects.py",
    "MIG": "operator/tandem_operator/plan/scheduling.py",
    "KEDA": "operator/tandem_operator/resources/workerpool.py",
    "warm-up": "kernels/tandem_kernels/warm_up.py",
    "outlier": "router/tandem_router/balancing/outliers.py",
    "chat_template": "worker/tandem_worker/tokenization/chat_template.py",
    "leader": "operator/tandem_operator/kube/leader.py",
    "stop string": "worker/tandem_worker/tokenization/detokenizer.py",
    "LoRA": "router/tandem_router/engines/served_models.py",
    "metrics": "router/tandem_router/telemetry/metrics.py",
    "embedding": "worker/tandem_worker/server/embedding.py",
    "postgres": "router/tandem_router/store/postgres.py",
    "judge": "router/tandem_router/quality/judge.py",
    "port_forward": "operator/tandem_operator/local/port_forward.py",
    "rollout": "operator/tandem_operator/plan/rollout.py",
    "tool call": "worker/tandem_worker/dialects/reader.py",
    "forecast": "operator/tandem_operator/autoscale/forecast.py",
    "resume": "router/tandem_router/proxy/resume.py",
    "LEC": "router/tandem_router/cache/store.py",
}
SHORT = re.compile(r"`([A-Za-z0-9_./-]+)`")


def places(word: str, files: list[str]) -> set[str]:
    """What a word leads to: files that bear it, and those that its rows of the map name."""
    named = {f for f in files if word.lower() in f.rsplit("/", 1)[-1].lower()}
    for row in ROWS:
        # A short word is looked for as it is written: MIG is not in "might".
        asked = row if word.isupper() else row.lower()
        if (word if word.isupper() else word.lower()) in asked:
            for name in SHORT.findall(row):
                named.update(f for f in files if f"/{f}".endswith(f"/{name}"))
    return named


def sources() -> list[str]:
    folders = ["operator", "router", "worker", "kernels"]
    listed = subprocess.run(
        ["git", "ls-files", *folders], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [f for f in listed.stdout.splitlines() if f.endswith(".py")]


@pytest.mark.parametrize("word", ASKED)
def test_a_stranger_who_asks_for_something_is_led_to_its_file(word: str) -> None:
    """By names and the map alone, among few others."""
    found = places(word, sources())

    assert ASKED[word] in found
    assert len(found) <= 16, sorted(found)
