"""What README promises holds: its commands are typed by tests, its YAML is taken, links lead on.

The cluster's lines are typed in tests/controlplane/test_hybrid.py, the demo in tests/e2e.
"""

from __future__ import annotations

import re

from document_kit import DOCS, ROOT, blocks, commands
from tandem_operator.manifests import load_text

README = ROOT / "README.md"
GETTING_STARTED = DOCS / "getting-started.md"


def under(heading: str) -> list[str]:
    """The commands below a heading, without what explains them."""
    lines = [c for b in blocks(README) if b.heading == heading for c in b.commands()]
    return [re.split(r"\s{2,}#", line)[0].rstrip() for line in lines]


def test_the_two_commands_are_targets_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()

    assert under("Two commands") == ["make demo", "make test"]
    for command in under("Two commands"):
        assert re.search(rf"^{command.removeprefix('make ')}:", makefile, re.M)


def test_your_own_models_take_ten_lines_that_a_test_types_in_this_order() -> None:
    """docs/getting-started.md has the same lines, and tests/documents runs each of them."""
    short, whole = under("Your own models"), commands(GETTING_STARTED)

    assert 0 < len(short) <= 10
    assert [line for line in dict.fromkeys(whole) if line in short] == short


def test_the_yaml_is_taken() -> None:
    shown = [b.text for b in blocks(README) if b.language == "yaml"]

    whole, vllm = shown
    assert {m.obj["kind"] for m in load_text(whole, "README.md")} == {"Model", "Router"}
    [model] = load_text("apiVersion: tandem.dev/v1alpha1\nkind: Model\n" + vllm, "README.md")
    assert model.obj["spec"]["engine"]["type"] == "VLLM"
    assert len(vllm.splitlines()) == 6


def test_the_headers_are_in_the_reference() -> None:
    reference = (DOCS / "reference" / "headers.md").read_text()

    headers = set(re.findall(r"`(x-tandem-[a-z-]+)`", README.read_text()))
    assert len(headers) >= 8
    assert [h for h in headers if f"`{h}`" not in reference] == []


def test_every_page_is_linked_and_every_link_leads_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", README.read_text())
    inside = [link for link in links if "://" not in link]

    assert [link for link in inside if not (ROOT / link).exists()] == []
    pages = {f"docs/{p.name}" for p in DOCS.glob("*.md") if p.name != "index.md"}
    assert sorted(pages - set(inside)) == [], "name the page in README's last table"


def test_the_examples_are_as_many_as_it_says() -> None:
    numbers = {10: "Ten", 11: "Eleven", 12: "Twelve", 13: "Thirteen", 14: "Fourteen"}
    num = len([p for p in (ROOT / "examples").iterdir() if re.match(r"\d\d-", p.name)])

    assert f"{numbers[num]} complete examples" in README.read_text()


def test_what_is_measured_says_how() -> None:
    table = README.read_text().split("<!-- measured: begin -->")[1].split("<!-- measured: end")[0]

    for script in set(re.findall(r"python (benchmarks/\S+?\.py)", table)):
        assert (ROOT / script).is_file(), script
