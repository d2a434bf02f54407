"""The loader: what it takes, and the sentence it gives for everything else."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from objects_table import BAD, GOOD, MODEL, ROUTER
from tandem_operator.manifests import ManifestError, load_paths, load_text
from wrong_values import WRONG


@pytest.mark.parametrize("name", GOOD)
def test_good_yaml_is_taken(name: str) -> None:
    manifests = load_text(GOOD[name])

    assert manifests
    assert all(m.obj["metadata"]["name"] == m.name for m in manifests)


@pytest.mark.parametrize("name", BAD)
def test_bad_yaml_is_refused_with_line_field_and_rule(name: str) -> None:
    text, problems = BAD[name]

    with pytest.raises(ManifestError) as caught:
        load_text(text, "f.yaml")

    assert [str(p).removeprefix("f.yaml:") for p in caught.value.problems] == problems


@pytest.mark.parametrize("name", WRONG)
def test_a_value_that_nothing_runs_with_is_refused_where_it_is_written(name: str) -> None:
    text, path, sentence = WRONG[name]

    with pytest.raises(ManifestError) as caught:
        load_text(text, "f.yaml")

    (problem,) = map(str, caught.value.problems)
    assert f": {path}: " in problem
    assert sentence.removesuffix(" items").removesuffix(" char") in problem


def test_the_table_is_large_enough() -> None:
    assert len(WRONG) >= 30
    assert len(GOOD) + len(BAD) >= 60
    assert len(BAD) >= 20


def test_defaults_are_filled_in() -> None:
    (manifest,) = load_text(MODEL)

    assert manifest.obj["spec"]["engine"]["maxNumSeqs"] == 64
    assert manifest.obj["spec"]["drain"] == {"timeout": "60s"}


def test_a_loaded_object_loads_again_unchanged() -> None:
    for text in GOOD.values():
        for manifest in load_text(text):
            again = load_text(yaml.safe_dump(manifest.obj))

            assert [m.obj for m in again] == [manifest.obj]


def test_relative_files_are_found_beside_the_yaml(tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text(MODEL.replace("file:///models/m", "file://./weights"))

    (manifest,) = load_paths([tmp_path])

    assert manifest.obj["spec"]["weights"]["source"] == f"file://{tmp_path}/weights"


def test_what_an_image_holds_is_found_in_a_folder_above_the_yaml(tmp_path: Path) -> None:
    weights = tmp_path / "examples" / "models" / "m"
    weights.mkdir(parents=True)
    (tmp_path / "examples" / "01").mkdir()
    file = tmp_path / "examples" / "01" / "m.yaml"
    inside = "image:///opt/tandem/examples/models/m"
    file.write_text(MODEL.replace("file:///models/m", inside))

    (manifest,) = load_paths([file])

    assert manifest.obj["spec"]["weights"]["source"] == f"file://{weights}"


@pytest.mark.parametrize("source", ["image:///opt/tandem/absent", "image:///models/m"])
def test_a_path_in_an_image_that_is_not_here_says_what_to_use(tmp_path: Path, source: str) -> None:
    (tmp_path / "m.yaml").write_text(MODEL.replace("file:///models/m", source))

    with pytest.raises(ManifestError, match="there are no images here; use file://"):
        load_paths([tmp_path])


def test_a_folder_is_read_in_order_and_problems_of_all_files_are_told(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(MODEL.replace("replicas: 1", "replicas: -1"))
    (tmp_path / "b.yml").write_text(ROUTER + "  port: 0\n")
    (tmp_path / "notes.txt").write_text("not read")

    with pytest.raises(ManifestError) as caught:
        load_paths([tmp_path])

    lines = str(caught.value).splitlines()
    assert [line.split(": ")[0] for line in lines] == [
        f"{tmp_path}/a.yaml:6",
        f"{tmp_path}/b.yml:8",
    ]


def test_the_same_object_in_two_files_is_told_with_both_places(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(MODEL)
    (tmp_path / "b.yaml").write_text(MODEL)

    with pytest.raises(ManifestError, match=r"already defined at .*a\.yaml:1"):
        load_paths([tmp_path])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.yaml", "no such file or folder; check the path"),
        ("hybird.yaml", "did you mean"),
        ("empty", "the folder holds no .yaml file"),
        ("latin1.yaml", "is not UTF-8 text"),
    ],
)
def test_paths_that_cannot_be_read_are_told(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "hybrid.yaml").write_text(MODEL)
    (tmp_path / "empty").mkdir()
    (tmp_path / "latin1.yaml").write_bytes("a: \xe4".encode("latin-1"))

    with pytest.raises(ManifestError, match=message):
        load_paths([tmp_path / name])


def _loaded_or_explained(text: str) -> bool:
    try:
        return bool(load_text(text))
    except ManifestError as error:
        return bool(error.problems) and all(p.message and p.line >= 1 for p in error.problems)


def test_lists_that_lie_too_deep_in_one_another_are_told() -> None:
    with pytest.raises(ManifestError, match="too deep in one another"):
        load_text("a: " + "[" * 5000)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=200))
def test_any_text_gives_manifests_or_problems(text: str) -> None:
    assert _loaded_or_explained(text)


_TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(_TREES, st.sampled_from(["weights", "engine", "unified", "prefill", "drain", "other"]))
def test_any_value_in_a_spec_gives_a_manifest_or_problems(tree: object, field: str) -> None:
    obj = yaml.safe_load(MODEL)
    obj["spec"][field] = tree

    assert _loaded_or_explained(yaml.safe_dump(obj))
