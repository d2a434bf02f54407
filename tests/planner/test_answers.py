"""What `tandem plan` answers when it is typed: each kind of answer, by simulation."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from tandem_operator.cli import main
from tandem_operator.simulate.profiles import Profile

PLAN = """\
apiVersion: tandem.dev/v1alpha1
kind: Model
metadata: {name: small}
spec: {weights: {source: "hf://a/b"}, unified: {gpus: 1, usdPerHour: "1"}}
---
apiVersion: tandem.dev/v1alpha1
kind: Model
metadata: {name: large}
spec: {weights: {source: "hf://a/c"}, unified: {gpus: 1, usdPerHour: "6"}}
---
apiVersion: tandem.dev/v1alpha1
kind: Router
metadata: {name: chat}
spec:
  tiers:
  - {name: small, modelRef: {name: small}}
  - {name: large, modelRef: {name: large}}
  predictor: {artifact: "configmap://p"}
  objective: {qualityFloor: "0.97"}
  slo: {ttft: {target: 2s}, tpot: {target: TPOT}}
"""
# A step takes 20 ms, a prompt's token a tenth of one: long prompts make decodes wait.
PROFILE = Profile((0.02, 1.5e-4, 0.0), (0.02, 1e-7, 1e-4), kv_tokens=400_000)


def trace(count: int, rate: float, prompt: int, output: int, hard: float) -> str:
    """Own lines; the small model fails on this share of the prompts, and the prediction knows."""
    rng, now, lines = random.Random(1), 0.0, []
    for _ in range(count):
        now += rng.expovariate(rate)
        easy = rng.random() >= hard
        row = {
            "at_s": round(now, 3),
            "prompt_tokens": rng.choice((prompt // 2, prompt, prompt * 3 // 2)),
            "output_tokens": output,
            "quality": {"small": float(easy), "large": 1.0},
            "predicted": {"small": 0.95 if easy else 0.1, "large": 1.0},
        }
        lines.append(json.dumps(row) + "\n")
    return "".join(lines)


def planned(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    *changes: str,
    rows: str,
    tpot: str = "100ms",
) -> tuple[int, Any, str]:
    """Exit status, the data and the text of `tandem plan`."""
    for name, text in (
        ("plan.yaml", PLAN.replace("TPOT", tpot)),
        ("trace.jsonl", rows),
        ("profile.json", PROFILE.as_json()),
    ):
        (folder / name).write_text(text)
    profiles = [f"--profile={tier}={folder}/profile.json" for tier in ("small", "large")]
    files = [f"{folder}/plan.yaml", f"{folder}/trace.jsonl"]
    what_if = ["--what-if", ",".join(changes)] if changes else []

    status = main(["plan", *files, *profiles, *what_if, "--json", f"{folder}/found.json"])

    said = capsys.readouterr()
    assert said.err == ""
    return status, json.loads((folder / "found.json").read_text()), said.out


def test_do_not_disaggregate_and_disaggregate_are_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Short prompts under a loose target, and long ones under a tight one."""
    short = trace(200, 12.0, 200, 100, hard=0.5)
    long = trace(200, 6.0, 4000, 100, hard=0.5)

    _, loose, _ = planned(tmp_path, capsys, rows=short, tpot="200ms")
    _, tight, _ = planned(tmp_path, capsys, rows=long, tpot="27ms")

    assert any("do not disaggregate large" in line for line in loose["sentences"])
    assert "large/unified" in loose["best"]["workers"]
    assert any(line.startswith("disaggregate large") for line in tight["sentences"])
    assert {"large/prefill", "large/decode"} <= set(tight["best"]["workers"])


def test_one_tier_is_enough_is_an_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, found, _ = planned(tmp_path, capsys, rows=trace(300, 8.0, 300, 60, hard=0.0))

    assert status == 0
    assert {name.split("/")[0] for name in found["best"]["workers"]} == {"small"}
    assert "one tier is enough: small holds everything alone" in found["sentences"]


def test_this_budget_cannot_hold_this_slo_is_an_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = trace(300, 8.0, 300, 60, hard=0.5)
    status, free, _ = planned(tmp_path, capsys, rows=rows)
    price = free["best"]["usd_per_hour"]

    short, found, out = planned(tmp_path, capsys, f"budget={price - 0.5}", rows=rows)

    assert (status, short) == (0, 1)
    assert found["best"] is None
    assert found["sentences"][0].startswith("this budget cannot hold this SLO")
    assert f"${price:.2f}/h" in found["sentences"][0]
    assert "kind: Router" not in out


def test_what_if_changes_the_question_and_so_the_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = trace(150, 30.0, 1000, 40, hard=0.2)

    usual, dear, lower, busy = (
        planned(tmp_path, capsys, *changes, rows=rows)[1]["best"]
        for changes in ((), ("price.large=60",), ("floor=0.7",), ("rate=4",))
    )

    assert dear["usd_per_hour"] > usual["usd_per_hour"]
    assert {name.split("/")[0] for name in usual["workers"]} == {"small", "large"}
    assert {name.split("/")[0] for name in lower["workers"]} == {"small"}
    assert sum(busy["workers"].values()) > sum(usual["workers"].values())


@pytest.mark.parametrize("change", ["flor=1", "rate=0", "price.huge=2", "budget=x"])
def test_a_change_that_means_nothing_is_refused_with_what_can_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    (tmp_path / "plan.yaml").write_text(PLAN.replace("TPOT", "1s"))
    (tmp_path / "trace.jsonl").write_text(trace(2, 1.0, 10, 5, 0.0))
    (tmp_path / "p.json").write_text(PROFILE.as_json())
    profiles = [f"--profile={tier}={tmp_path}/p.json" for tier in ("small", "large")]
    files = [f"{tmp_path}/plan.yaml", f"{tmp_path}/trace.jsonl"]

    status = main(["plan", *files, *profiles, "--what-if", change])

    assert status == 1
    said = capsys.readouterr().err
    assert said.startswith("tandem plan: --what-if")
    assert change.partition("=")[0] in said
