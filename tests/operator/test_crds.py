"""The CRDs: committed as generated, structural, bounded, described."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, Field

from tandem_operator.resources.crds import (
    COLUMNS,
    PLURALS,
    crd,
    crd_yaml,
    file_name,
    main,
    open_api,
)
from tandem_operator.resources.rules import RULES
from tandem_operator.resources.schema import SchemaError, count_fields, structural

CRDS = Path(__file__).parents[2] / "charts" / "tandem" / "files" / "crds"


def _nodes(schema: dict[str, Any], at: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    yield at, schema
    for name, child in schema.get("properties", {}).items():
        yield from _nodes(child, f"{at}.{name}")
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            yield from _nodes(schema[key], f"{at}[]")


@pytest.mark.parametrize("kind", PLURALS)
def test_the_committed_crd_is_the_generated_one(kind: str) -> None:
    path = CRDS / file_name(kind)
    command = "python -m tandem_operator.resources.crds charts/tandem/files/crds"

    assert path.read_text() == crd_yaml(kind), f"{path} is out of date; run `{command}`"


@pytest.mark.parametrize("kind", PLURALS)
def test_schemas_are_structural_and_bounded(kind: str) -> None:
    for at, node in _nodes(open_api(kind)["properties"]["spec"]):
        assert not {"$ref", "anyOf", "allOf", "$defs", "exclusiveMaximum"} & node.keys(), at
        if "x-kubernetes-preserve-unknown-fields" in node:
            continue
        assert "type" in node, at
        if node["type"] == "string":
            assert "enum" in node or "maxLength" in node, at
        if node["type"] == "array":
            assert "maxItems" in node, at
        if node["type"] == "integer" and kind != "status":
            assert "minimum" in node, at


@pytest.mark.parametrize("kind", PLURALS)
def test_every_field_says_what_it_is(kind: str) -> None:
    for at, node in _nodes(open_api(kind)):
        for name, child in node.get("properties", {}).items():
            if name != "metadata":
                assert child.get("description"), f"{at}.{name}"


def test_together_they_stay_below_350_fields() -> None:
    total = sum(
        count_fields(open_api(kind)["properties"][part])
        for kind in PLURALS
        for part in ("spec", "status")
    )

    assert total < 350


@pytest.mark.parametrize("kind", PLURALS)
def test_every_rule_is_in_the_crd(kind: str) -> None:
    text = yaml.safe_dump(crd(kind), width=10_000)

    found = {r["rule"] for _, n in _nodes(open_api(kind)) for r in n.get(_RULES, [])}
    assert {rule.cel for rule in RULES[kind]} <= found
    assert "$ref" not in text


_RULES = "x-kubernetes-validations"


def test_defaults_of_optional_objects_stay_bare() -> None:
    spec = open_api("Model")["properties"]["spec"]["properties"]

    assert spec["drain"]["default"] == {}
    assert spec["drain"]["properties"]["timeout"]["default"] == "60s"


def test_columns_are_those_that_the_design_names() -> None:
    names = [c["name"].upper() for c in COLUMNS["Router"]]

    assert names[:7] == ["READY", "REASON", "SLO", "BUDGET", "$/H", "GPUS", "ENDPOINT"]


def test_only_worker_pools_can_be_scaled() -> None:
    scalable = [k for k in PLURALS if "scale" in crd(k)["spec"]["versions"][0]["subresources"]]

    assert scalable == ["WorkerPool"]


def test_the_command_writes_all_files(tmp_path: Path) -> None:
    assert main([str(tmp_path)]) == 0

    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(file_name(k) for k in PLURALS)
    assert main([]) == 2


class _Unbounded(BaseModel):
    names: list[str] = Field(description="Names.")


class _Undescribed(BaseModel):
    count: int = 1


@pytest.mark.parametrize(
    ("model", "message"), [(_Unbounded, "a list needs a bound"), (_Undescribed, "no description")]
)
def test_a_type_that_an_apiserver_would_refuse_is_an_error(
    model: type[BaseModel], message: str
) -> None:
    with pytest.raises(SchemaError, match=message):
        structural(model, [], ("spec",))
