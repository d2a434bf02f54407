"""What `tandem grade` refuses with a sentence, before anybody is asked or where it cannot write."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fake_provider import Command, Provider, right, sums

Write = Callable[..., Path]


def refusal(tandem: Command, *words: object) -> str:
    ran = tandem("grade", *words)
    assert ran.status in (1, 2), ran.out
    assert "Traceback" not in ran.err
    return ran.err


TIER = "small=http://127.0.0.1:9/v1#m"


def test_a_price_that_is_none_and_a_key_that_no_header_holds_are_refused(
    tandem: Command, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "router.yaml"
    path.write_text(
        "kind: Router\nspec:\n  tiers:\n"
        "  - {name: small, usdPer1MInputTokens: '1', usdPer1MOutputTokens: cheap}\n"
    )
    monkeypatch.setenv("ODD_KEY", "schlüssel")
    words = (write(sums(2)), "-o", tmp_path / "g.jsonl")

    assert "tier small: usdPer1MOutputTokens is 'cheap', not dollars per million" in refusal(
        tandem, *words, "--router", path
    )
    assert "the key in ODD_KEY holds characters that no header can" in refusal(
        tandem, *words, "--tier", TIER, "--key", "small=ODD_KEY"
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "nobody to ask; name a Router (--router FILE or URL) or tiers"),
        (["--tier", "small"], "is not NAME=URL#MODEL, such as small="),
        (["--tier", "small=http://h/v1"], "names no model; end it with #MODEL"),
        (["--tier", "small=ftp://h#m"], "'ftp://h' is not a URL; write it like http"),
        (["--tier", "small=http://u:p@h/v1#m"], "leave user and password out of the URL"),
        (["--tier", TIER, "--tier", TIER], "two tiers are called 'small'"),
        (["--tier", TIER.replace("small", "judge")], "a tier cannot be called judge"),
        (["--tier", TIER, "--price", "large=1/2"], "there is no tier 'large'; the tiers are small"),
        (["--tier", TIER, "--price", "small=cheap"], "is not IN/OUT in dollars per million"),
        (["--tier", TIER, "--price", "small"], "--price 'small' is not NAME=VALUE"),
        (["--tier", TIER, "--key", "small=NOT_SET"], "the variable NOT_SET, named for small's key"),
        (["--tier", TIER, "--max-usd", "1"], "cannot be held, small has no price; give --price sm"),
        (["--tier", TIER, "--judge", "http://h/v1"], "--judge 'http://h/v1' names no model"),
        (["--tier", TIER, "--judge-price", "1/2"], "--judge-price speaks of a judge; name it"),
        (
            ["--tier", TIER, "--judge", "http://h#m", "--grade-command", "true"],
            "--judge and --grade-command both grade",
        ),
        (["--tier", TIER, "--grade-command", "no-such"], "there is no program 'no-such'"),
        (["--tier", TIER, "--grade-command", "'"], "is no command line"),
        (["--tier", TIER, "--samples", "0"], "'0' is not a whole number from 1 to 100"),
        (["--tier", TIER, "--temperature", "nan"], "'nan' is not a number from 0 to 2"),
        (["--router", "missing.yaml"], "--router missing.yaml does not exist"),
        (["--router", "http://127.0.0.1:9"], "--router: no Router answers at http://127.0.0.1:9"),
        (["--tier", TIER, "--reference", "right"], "no row has a `reference` (columns: reference)"),
    ],
)
def test_what_cannot_work_is_refused_before_anybody_is_asked(
    tandem: Command, write: Write, tmp_path: Path, words: list[str], says: str
) -> None:
    assert says in refusal(tandem, write(sums(2)), "-o", tmp_path / "g.jsonl", *words)
    assert not (tmp_path / "g.jsonl.journal").exists()


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([], "holds no prompts; expected text, JSON lines or a table"),
        (
            [{"prompt": "p", "answer": "4"}],
            "no row has a `reference` (columns: answer) and there is no judge, so answers could "
            "not be graded; name the column with --reference answer, a judge with",
        ),
        (
            [{"prompt": "p", "id": 7, "reference": 1}, {"prompt": "q", "id": 7, "reference": 1}],
            "the id 7 stands at prompts.jsonl:1 and again at prompts.jsonl:2",
        ),
        (
            [{"prompt": "p", "reference": "(", "grader": "regex"}],
            "1 references cannot be used; correct them or name another grader, the first are\n"
            "  prompts.jsonl:1: '(' is no regular expression",
        ),
        ([{"prompt": "p", "grader": "magic"}], "names the grader 'magic'; known are exact, norm"),
        ([{"question": "p"}], "its columns are question: rename `question` to `prompt`"),
        ([{"prompt": ""}], "has an empty prompt"),
    ],
)
def test_prompts_that_cannot_be_graded_are_refused_before_anybody_is_asked(
    tandem: Command, write: Write, tmp_path: Path, rows: list[Any], says: str
) -> None:
    assert says in refusal(tandem, write(rows), "-o", tmp_path / "g.jsonl", "--tier", TIER)


def test_a_file_of_another_run_is_not_gone_on_with(
    tandem: Command, provider: Provider, two_tiers: list[str], write: Write, tmp_path: Path
) -> None:
    provider.respond = right
    words = (write(sums(2)), "-o", tmp_path / "g.jsonl")
    tandem("grade", *words, *two_tiers)

    other = refusal(tandem, *words, "--tier", TIER)
    longer = refusal(tandem, *words, *two_tiers, "--max-tokens", 7)

    assert "holds answers of another run: its tiers are small (s at http://127.0.0.1" in other
    assert "not small (m at http://127.0.0.1:9/v1); go on with what it had" in other
    assert "its max_tokens is not set, not 7" in longer


def test_what_cannot_be_written_is_said_before_anybody_is_asked(
    tandem: Command, provider: Provider, two_tiers: list[str], write: Write, tmp_path: Path
) -> None:
    prompts = write(sums(2))
    (tmp_path / "mine.jsonl").write_text("precious")
    (tmp_path / "x.jsonl.journal").write_text("something else\n")

    assert "is a directory; name a file" in refusal(tandem, prompts, "-o", tmp_path, *two_tiers)
    assert "make it first" in refusal(tandem, prompts, "-o", tmp_path / "no" / "g", *two_tiers)
    assert "it would be overwritten" in refusal(
        tandem, prompts, "-o", tmp_path / "mine.jsonl", *two_tiers
    )
    assert "x.jsonl.journal:1 is not what `tandem grade` wrote" in refusal(
        tandem, prompts, "-o", tmp_path / "x.jsonl", *two_tiers
    )
    if os.geteuid() != 0:
        tmp_path.chmod(0o500)
        assert "Permission denied" in refusal(
            tandem, prompts, "-o", tmp_path / "g.jsonl", *two_tiers
        )
        tmp_path.chmod(0o700)
    assert provider.requests == []


def test_a_full_disk_ends_the_run_with_a_sentence(
    tandem: Command, provider: Provider, two_tiers: list[str], write: Write, tmp_path: Path
) -> None:
    provider.respond = right
    prompts = write(sums(20))
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, limit[1]))
    try:
        said = refusal(tandem, prompts, "-o", tmp_path / "g.jsonl", *two_tiers)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)

    assert f"cannot write {tmp_path / 'g.jsonl.journal'}: " in said
    again = tandem("grade", prompts, "-o", tmp_path / "g.jsonl", *two_tiers)
    assert again.status == 0
    assert len(provider.prompts_to("s")) < 40
