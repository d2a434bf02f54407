"""What ends `tandem grade` early, and that nothing is asked or paid twice: money, Ctrl-C, kill."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eventually import eventually_in_another_process
from fake_provider import Command, Provider, Reply, right, rows_of, sums

Write = Callable[..., Path]


@pytest.mark.parametrize("concurrency", [1, 8])
def test_no_more_than_max_usd_is_spent_and_the_rest_is_asked_when_it_is_raised(
    tandem: Command,
    provider: Provider,
    two_tiers: list[str],
    write: Write,
    tmp_path: Path,
    concurrency: int,
) -> None:
    provider.respond = lambda body: Reply("4", tokens=(10, 100))
    words = ("grade", write(sums(50)), "-o", tmp_path / "g.jsonl", *two_tiers, "--json")
    words = (*words, "--max-tokens", 100, "--concurrency", concurrency)

    first = tandem(*words, "--max-usd", 0.05).found

    assert first["stopped"] == "max_usd"
    assert 0.03 < first["spent_usd"] <= 0.05
    second = tandem(*words, "--max-usd", 1).found
    assert second["stopped"] is None
    assert second["spent_usd"] == pytest.approx(50 * (210e-6 + 2100e-6))
    assert len(provider.requests) == 100


def test_money_is_held_by_bytes_for_letters_that_take_several_tokens(
    tandem: Command, provider: Provider, two_tiers: list[str], write: Write, tmp_path: Path
) -> None:
    provider.respond = lambda body: Reply("4", tokens=(1200, 1))
    rows = [{"prompt": f"{'数' * 1000} {i}", "reference": 4} for i in range(8)]

    found = tandem(
        *("grade", write(rows), "-o", tmp_path / "g.jsonl", *two_tiers, "--json"),
        *("--max-tokens", 1, "--max-usd", 0.034, "--concurrency", 1),
    ).found

    assert found["stopped"] == "max_usd"
    assert found["spent_usd"] <= 0.034


PROGRAM = "import sys; from tandem_operator.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_after_ctrl_c_nothing_is_asked_twice(
    tandem: Command,
    provider: Provider,
    two_tiers: list[str],
    write: Write,
    tmp_path: Path,
    number: signal.Signals,
) -> None:
    def slowly(body: dict[str, Any]) -> Reply:
        return Reply(right(body).text, delay_s=0.05)

    provider.respond = slowly
    output = tmp_path / "g.jsonl"
    words = ["grade", str(write(sums(60))), "-o", str(output), *two_tiers, "--concurrency", "3"]
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    eventually_in_another_process(lambda: len(provider.requests) >= 12, process=process)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)

    assert process.returncode == 130, (out, err)
    assert b"Ctrl-C again drops them" in err
    assert b"run the same command again" in out
    assert 6 <= len(rows_of(output)) < 60
    assert all(len(row["quality"]) == 2 for row in rows_of(output))
    provider.respond = right
    ran = tandem(*words)
    assert ran.status == 0
    assert len(rows_of(output)) == 60
    assert set(Counter(provider.prompts_to("s")).values()) == {1}
    assert set(Counter(provider.prompts_to("l")).values()) == {1}


def test_a_killed_run_goes_on_behind_its_last_whole_line(
    tandem: Command, provider: Provider, two_tiers: list[str], write: Write, tmp_path: Path
) -> None:
    provider.respond = right
    output = tmp_path / "g.jsonl"
    words = ("grade", write(sums(4)), "-o", output, *two_tiers)
    tandem(*words)
    journal = output.with_name("g.jsonl.journal")
    journal.write_bytes(journal.read_bytes()[:-20])

    tandem(*words)

    assert len(provider.requests) == 9
    assert len(rows_of(output)) == 4
