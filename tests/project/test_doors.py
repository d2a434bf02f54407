"""Whatever can be written has its effect, is refused, or does not exist.

The walk visits every field of the custom resources and of both configuration classes, and fails for
one that nobody reads or whose effect nothing shows. docs/architecture.md, "Adding a field", says
how a row is added.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from pydantic import BaseModel, Field, create_model

import doors_probes
import doors_resources as resources
import doors_router
import doors_rows
import doors_worker
from doors_kit import ROOT, Door, Readers, doors, missing_tests, readers, unread
from tandem_operator.resources import SPECS
from tandem_router.config import RouterConfig
from tandem_worker.config import WorkerConfig

# Classes that are read as a whole: the pod gets the toleration, the router the tenant.
WHOLE = frozenset({"Toleration", "Tenant"})
OPERATOR = readers("operator/tandem_operator", "operator/tandem_operator/resources", WHOLE)
RESOURCE_DOORS = [(kind, door) for kind, spec in SPECS.items() for door in doors(spec)]


def test_every_field_of_a_resource_has_a_reader() -> None:
    assert unread((door for _, door in RESOURCE_DOORS), OPERATOR) == []


@pytest.mark.parametrize(
    ("kind", "door"), RESOURCE_DOORS, ids=[f"{kind}.{door.path}" for kind, door in RESOURCE_DOORS]
)
def test_the_effect_of_a_resources_field_can_be_seen(kind: str, door: Door) -> None:
    problem = resources.alike(kind, door, resources.ROWS[kind])

    assert problem is None, problem


def test_rows_name_fields_that_exist() -> None:
    known = {kind: {door.path for k, door in RESOURCE_DOORS if k == kind} for kind in SPECS}

    for kind, rows in resources.ROWS.items():
        assert set(rows) <= known[kind], sorted(set(rows) - known[kind])


@pytest.mark.parametrize("kind", SPECS)
def test_a_field_that_is_wired_to_nothing_is_found(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The walk is worth something only if it fails for what it is there to find."""
    nothing = (int, Field(default=1, description="Nobody reads it."))
    spec = create_model("Planted", __base__=SPECS[kind], wired_to_nothing=nothing)
    planted = next(door for door in doors(spec) if door.name == "wired_to_nothing")
    rows = {planted.path: resources.Row(1, 2)}

    assert unread([planted], OPERATOR) == ["wiredToNothing"]
    assert "no row" in (resources.alike(kind, planted, {}) or "")
    monkeypatch.setattr(resources, "typed", _without(resources.typed, kind, spec))
    monkeypatch.setattr(resources, "refusal", lambda kind, spec: None)
    assert "nothing shows" in (resources.alike(kind, planted, rows) or "")


def _without(typed, planted_kind, planted):  # type: ignore[no-untyped-def]
    """Takes the planted field as its class does, and reads on without it."""

    def read(kind: str, resource: str, spec: resources.Object) -> object:
        assert kind != planted_kind or planted.model_validate(spec)
        return typed(kind, resource, {k: v for k, v in spec.items() if k != "wiredToNothing"})

    return read


ROUTER = readers("router/tandem_router", "router/tandem_router/config")
WORKER = readers("worker/tandem_worker", "worker/tandem_worker/config.py")
CONFIGS = [(RouterConfig, doors_router.ROUTER, ROUTER), (WorkerConfig, doors_worker.WORKER, WORKER)]
PROBES = doors_rows.probes(doors_router.ROUTER)
NAMES = ["router", "worker"]


@pytest.mark.parametrize(("root", "table", "by"), CONFIGS, ids=NAMES)
def test_every_field_of_a_configuration_has_a_reader_and_a_row(
    root: type[BaseModel], table: dict[str, doors_rows.Tests | doors_rows.Probe], by: Readers
) -> None:
    found = list(doors(root))
    refused = doors_worker.REFUSED.get(root.__name__, frozenset())

    assert doors_rows.unknown(table, {door.path for door in found}) == []
    assert unread((door for door in found if door.path not in refused), by) == []


@pytest.mark.parametrize(("_", "table", "__"), CONFIGS, ids=NAMES)
def test_rows_name_tests_that_are_about_their_field(
    _: object, table: dict[str, doors_rows.Tests | doors_rows.Probe], __: object
) -> None:
    wrong = {
        path: found
        for path, row in doors_rows.nodes(table)
        if (found := missing_tests(row.nodes, row.word or path.rpartition(".")[2]))
    }

    assert wrong == {}


@pytest.mark.parametrize(("path", "row"), PROBES, ids=[path for path, _ in PROBES])
def test_two_values_of_a_configured_field_do_something_different(
    path: str, row: doors_rows.Probe
) -> None:
    assert not doors_rows.same(path, row), f"nothing shows which value {path} has"


class _PlantedConfig(RouterConfig):
    wired_to_nothing: int = 1


def test_a_configured_field_that_is_wired_to_nothing_is_found() -> None:
    found = {door.path: door for door in doors(_PlantedConfig)}

    assert unread([found["wired_to_nothing"]], ROUTER) == ["wired_to_nothing"]
    assert doors_rows.unknown(doors_router.ROUTER, set(found)) == ["wired_to_nothing has no row"]
    assert doors_rows.same("http_port", doors_rows.Probe(doors_probes.accepted, 8001, 8002))
    assert doors_rows.same("http_port", doors_rows.Probe(lambda config: object(), 8001, 8002))


DOCS = ROOT / "docs"


def listed(page: str, title: str) -> list[str]:
    """The names in code type in the first column of the page's table with this title."""
    lines = iter((DOCS / page).read_text(encoding="utf-8").splitlines())
    for line in lines:
        if line.startswith(f"| {title} |"):
            break
    rows = [line.split("|")[1] for line in lines_of_table(lines)]
    return [name.split(":")[0].strip() for row in rows for name in re.findall(r"`([^`]+)`", row)]


def lines_of_table(lines: Iterator[str]) -> Iterator[str]:
    """The rows up to the end of a table, without its rule."""
    for line in lines:
        if not line.startswith("|"):
            return
        if not line.startswith("|---"):
            yield line


def sources(folder: str) -> str:
    """All Python and JSON below a folder of the checkout."""
    found = [p for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".json")]
    return "\n".join(path.read_text(encoding="utf-8") for path in found)


def test_every_field_of_the_contract_is_read_by_the_worker_and_tested() -> None:
    """Headers, and every field of a body: `tests/worker/test_every_field.py`; a client's headers:
    `tests/router/test_every_header.py`."""
    worker, tested = (
        sources("worker/tandem_worker"),
        sources("tests/contract") + sources("tests/worker"),
    )
    names = [*listed("contract.md", "field"), "resume_token_ids"]

    assert len(names) > 5
    for name in names:
        word = name.rpartition(".")[2]
        assert word in worker, name
        assert word in tested, name


def test_every_environment_variable_of_a_pod_has_a_reader() -> None:
    """One that nobody reads is a promise to whoever looks at the pod."""
    for kind, package in (("Model", "worker/tandem_worker"), ("Router", "router/tandem_router")):
        read = sources(package)
        names = re.findall(
            r'"name": "([A-Z][A-Z_]+)"', resources.OBSERVE[kind](resources.BASE[kind])
        )

        assert "POD_IP" in names
        # Triton itself reads its cache's folder.
        assert [n for n in set(names) - {"TRITON_CACHE_DIR", "TMPDIR"} if n not in read] == []
