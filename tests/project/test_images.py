"""The Dockerfiles: linted, pinned, small, without root, and in step with the rest.

No engine to build them is needed here: hadolint reads them, and what they name is checked.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from tandem_operator.node.images import ImageTable
from tandem_operator.plan import Settings

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ("operator", "router", "worker")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
VALUES = yaml.safe_load((ROOT / "charts" / "tandem" / "values.yaml").read_text())


def instructions(image: str) -> list[tuple[str, str]]:
    """Keyword and arguments of each instruction, continued lines joined."""
    text = (ROOT / "docker" / f"{image}.Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(word, " ".join(rest.split())) for word, _, rest in (x.partition(" ") for x in lines)]


def final_stage(image: str) -> list[tuple[str, str]]:
    found = instructions(image)
    last = max(i for i, (word, _) in enumerate(found) if word == "FROM")
    return found[last:]


@pytest.mark.parametrize("image", IMAGES)
def test_hadolint_finds_nothing(image: str) -> None:
    hadolint = Path(sys.executable).parent / "hadolint"

    command = [str(hadolint), "--no-color", str(ROOT / "docker" / f"{image}.Dockerfile")]
    result = subprocess.run(command, capture_output=True, text=True)

    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("image", IMAGES)
def test_bases_are_pinned_to_a_version_and_a_digest_and_are_the_same(image: str) -> None:
    bases = [rest.split()[0] for word, rest in instructions(image) if word == "FROM"]

    assert len(bases) == 2
    assert len(set(bases)) == 1
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-[a-z]+@sha256:[0-9a-f]{64}", bases[0])


def locked(name: str) -> dict[str, tuple[str, int]]:
    """Name to (version, number of hashes) of a lock in docker/."""
    found: dict[str, tuple[str, int]] = {}
    text = (ROOT / "docker" / f"{name}.txt").read_text().replace("\\\n", " ")
    for line in text.splitlines():
        requirement = Requirement(line.partition("--hash")[0].strip())
        (version,) = requirement.specifier
        assert version.operator == "=="
        found[requirement.name.lower().replace("_", "-")] = (
            version.version,
            line.count("--hash=sha256:"),
        )
    return found


def pinned() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().split()
    return {
        name.lower().replace("_", "-"): version
        for name, _, version in (line.partition("==") for line in lines)
    }


@pytest.mark.parametrize("image", IMAGES)
def test_everything_is_installed_by_hash_and_nothing_is_fetched_to_build(image: str) -> None:
    installs = [r for w, r in instructions(image) if w == "RUN" and "pip " in r]

    locks, ours = installs
    assert f"--require-hashes --only-binary :all: -r docker/{image}.txt" in locks
    assert "--require-hashes --only-binary :all: -r docker/build.txt" in locks
    assert "--no-deps --no-build-isolation" in ours
    assert "--no-deps --no-index" in ours
    assert all(line.count("pip ") == line.count("--no-cache-dir") for line in installs)


@pytest.mark.parametrize("name", [*IMAGES, "build"])
def test_a_lock_holds_the_versions_that_are_tested_each_with_hashes(name: str) -> None:
    lock, constraints = locked(name), pinned()
    elsewhere = {package for package in lock if package not in constraints}

    assert all(hashes >= 1 for _, hashes in lock.values())
    assert {
        package: version
        for package, (version, _) in lock.items()
        if package not in elsewhere and constraints[package] != version
    } == {}, "run scripts/lock.sh"
    # Of platforms that no image has.
    assert elsewhere <= {"httpx2-jsfetch"}


@pytest.mark.parametrize("image", IMAGES)
def test_a_lock_holds_all_that_the_extra_asks_for(image: str) -> None:
    extras = {image} if image == "operator" else {image, "otel"}
    wanted: set[str] = set().union(*map(installed_by, extras))

    assert wanted - locked(image).keys() == set(), "run scripts/lock.sh"


def test_an_audit_that_cannot_be_made_fails_where_it_is_required(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("audit", ROOT / "scripts" / "audit.py")
    assert spec is not None
    assert spec.loader is not None
    audit = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(audit)

    def unreachable() -> list[str]:
        raise audit.NotAudited("the advisory service does not answer")

    monkeypatch.setattr(audit, "audit", unreachable)

    assert [audit.main(options) for options in ([], ["--required"], ["--requird"])] == [0, 1, 2]
    assert "NOTHING WAS AUDITED" in capsys.readouterr().err


@pytest.mark.parametrize("image", IMAGES)
def test_it_runs_as_a_numbered_user_that_is_not_root(image: str) -> None:
    users = [rest for word, rest in final_stage(image) if word == "USER"]

    assert len(users) == 1
    assert re.fullmatch(r"[1-9]\d{3,}:[1-9]\d{3,}", users[0])


@pytest.mark.parametrize("image", IMAGES)
def test_nothing_comes_from_a_url_and_nothing_secret_stays(image: str) -> None:
    for word, rest in instructions(image):
        assert word in ("FROM", "WORKDIR", "COPY", "RUN", "ENV", "USER", "ENTRYPOINT"), word
        assert not re.search(r"https?://|curl |wget ", rest)
        if word == "ENV":
            assert not re.search(r"(?i)token|password|secret|key", rest)


@pytest.mark.parametrize("image", IMAGES)
def test_the_final_stage_only_copies_what_was_built_and_the_examples(image: str) -> None:
    copies = [rest for word, rest in final_stage(image) if word == "COPY"]
    runs = [rest for word, rest in final_stage(image) if word == "RUN"]

    assert copies[0] == "--from=build /opt/tandem /opt/tandem"
    assert all(rest.startswith("examples/") for rest in copies[1:])
    assert len(runs) == (1 if image == "worker" else 0)  # a C compiler, for Triton
    assert all(rest.endswith("rm -rf /var/lib/apt/lists/*") for rest in runs)


@pytest.mark.parametrize("image", IMAGES)
def test_what_is_copied_exists_and_reaches_the_builder(image: str) -> None:
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = {line[1:] for line in ignore if line.startswith("!")}

    for word, rest in instructions(image):
        if word == "COPY" and not rest.startswith("--from"):
            *sources, _ = rest.split()
            assert all((ROOT / source).exists() for source in sources), rest
            assert {source.split("/")[0] for source in sources} <= allowed, rest
    assert "*" in ignore


def test_the_images_hold_what_the_example_names_in_them() -> None:
    text = (ROOT / "examples" / "01-hybrid" / "hybrid.yaml").read_text()
    copied = {
        rest.split()[1]
        for image in ("router", "worker")
        for word, rest in final_stage(image)
        if word == "COPY"
    }

    named = set(re.findall(r"image://(/[^\"\s]+)", text.split("kind:", 1)[1]))
    assert len(named) == 3
    assert named <= copied
    for path in named:
        assert (ROOT / Path(path).relative_to("/opt/tandem")).exists()


@pytest.mark.parametrize("image", IMAGES)
def test_a_process_node_runs_what_the_image_runs(image: str) -> None:
    """The tests' nodes map an image's name to a command: it is the image's entry point."""
    (entry,) = [json.loads(rest) for word, rest in final_stage(image) if word == "ENTRYPOINT"]
    if entry[0] in PROJECT["scripts"]:
        module = PROJECT["scripts"][entry[0]].partition(".__main__:")[0]
        entry = ["python", "-m", module]

    command = ImageTable().command(f"registry/tandem/{image}:1", [], [])
    assert command == [sys.executable, *entry[1:]]


def test_chart_operator_and_project_name_the_same_versions() -> None:
    version = PROJECT["version"]
    chart = yaml.safe_load((ROOT / "charts" / "tandem" / "Chart.yaml").read_text())
    settings = Settings()

    assert chart["version"] == chart["appVersion"] == version
    assert {i: VALUES["images"][i] for i in IMAGES} == {i: f"tandem/{i}:{version}" for i in IMAGES}
    assert settings.worker_image == VALUES["images"]["worker"]
    assert settings.router_image == VALUES["images"]["router"]


def installed_by(extra: str) -> set[str]:
    """Names of all distributions that `pip install .[extra]` brings, on this platform."""
    found: set[str] = set()
    todo = [Requirement(r) for r in PROJECT["dependencies"]]
    todo += [Requirement(r) for r in PROJECT["optional-dependencies"][extra]]
    while todo:
        requirement = todo.pop()
        name = requirement.name.lower().replace("_", "-")
        if name in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        found.add(name)
        todo += map(Requirement, importlib.metadata.requires(name) or [])
    return found


def test_operator_and_router_images_hold_no_torch() -> None:
    heavy = {"torch", "triton", "transformers"}

    assert installed_by("operator") & heavy == set()
    assert installed_by("router") & heavy == set()
    assert installed_by("operator") & {"scikit-learn", "scipy", "numpy"} == set()
    assert "torch" in installed_by("worker")
    assert installed_by("worker") & {"transformers", "kopf", "kubernetes"} == set()


@pytest.mark.parametrize("image", IMAGES)
def test_the_bill_of_materials_names_what_is_locked_with_its_hashes(image: str) -> None:
    spec = importlib.util.spec_from_file_location("sbom", ROOT / "scripts" / "sbom.py")
    assert spec is not None
    assert spec.loader is not None
    sbom = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sbom)

    bill = sbom.bill(image)

    parts = {
        part["name"].lower(): (part["version"], len(part["hashes"])) for part in bill["components"]
    }
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    assert parts == locked(image)
