"""The reference and the troubleshooting page say what the code says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from reference import __main__ as reference  # noqa: E402
from reference import codes, commands, headers, metrics, troubleshooting  # noqa: E402

RENEW = (
    "`make reference` writes it anew (PYTHONPATH=scripts python -m reference); commit the result"
)


@pytest.fixture(scope="module")
def pages() -> dict[Path, str]:
    return reference.pages()


def test_the_generated_pages_are_committed_as_they_are(pages: dict[Path, str]) -> None:
    old = [
        str(p.relative_to(ROOT)) for p, t in pages.items() if not p.exists() or p.read_text() != t
    ]

    assert old == [], f"{', '.join(old)} differ from the code; {RENEW}"


def test_no_page_of_the_reference_is_left_over(pages: dict[Path, str]) -> None:
    committed = set((ROOT / "docs" / "reference").glob("*.md"))

    assert committed - set(pages) == {ROOT / "docs" / "reference" / "index.md"}


def test_every_word_of_the_code_has_its_row_in_troubleshooting() -> None:
    troubleshooting.check()


def test_a_word_that_needs_something_says_what() -> None:
    """A row without `look` and `do` is of a state in which all is well."""
    for section in ("conditions", "codes", "requests"):
        for word, row in troubleshooting.rows()[section].items():
            assert set(row) in ({"means"}, {"means", "look", "do"}), word
            assert row["means"].endswith("."), word


def test_the_words_are_read_where_they_are_made() -> None:
    types, reasons = codes.conditions()
    by_code = codes.error_codes()

    assert {"Accepted", "PrefillReady", "SLOMet", "FloorNotHeld"} <= types
    assert {"InsufficientGPU", "ImageNotAllowed", "Scaling", "Degraded", "Length"} <= reasons
    assert by_code["request_rate_limit"] == {"router": {429}}
    assert by_code["body_too_large"] == {"router": {413}, "worker": {413}}
    assert codes.request_reasons()["gain"].startswith("a dearer tier")


def test_the_metrics_of_the_page_are_those_that_a_router_exports() -> None:
    from tandem_router.telemetry.metrics import Metrics

    exported = set()
    for family in Metrics(["small"]).registry.collect():
        exported.add(f"{family.name}_total" if family.type == "counter" else family.name)
    router = metrics.PACKAGES[0][1]

    assert {m.name for m in metrics.families(router)} == exported


def test_every_header_of_the_source_is_explained() -> None:
    assert headers.used() <= set(headers.explained())


def test_every_option_says_what_it_does() -> None:
    silent = [
        f"{parser.prog} {action.dest}"
        for parser in commands.parsers()
        for action in commands.options(parser)
        if not action.help
    ]

    assert silent == []
