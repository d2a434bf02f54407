"""An artifact is data: reproducible, checked, and refused with a sentence when it is not right."""

from __future__ import annotations

import json
import os
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem_router.predictor import ArtifactError, artifact, load, loads
from tandem_router.predictor.records.dataset import Dataset
from tandem_router.predictor.training import trainer
from tandem_router.predictor.training.options import Options


def test_same_data_and_seed_give_the_same_bytes(
    dataset: Dataset, small_options: Options, content: bytes
) -> None:
    assert trainer.train(dataset, small_options).dumps() == content


def test_another_seed_gives_another_artifact(dataset: Dataset, content: bytes) -> None:
    options = Options(seed=1, num_trees=12, num_folds=2, max_features=3000)

    assert trainer.train(dataset, options).dumps() != content


def test_a_size_limit_is_kept(dataset: Dataset) -> None:
    options = Options(num_folds=2, num_trees=20, max_bytes=200_000)

    assert len(trainer.train(dataset, options).dumps()) <= 200_000


def test_it_carries_digest_schema_calibration_and_evaluation(
    content: bytes, dataset: Dataset
) -> None:
    meta = artifact.loads(content).meta

    assert meta["data"]["digest"] == dataset.digest
    assert "log_chars" in meta["features"]
    assert 0.0 <= meta["evaluation"]["heads"]["small"]["ece"] <= 0.2
    assert meta["evaluation"]["pairs"]["small -> large"]["methods"]["predictor"]["apgr"] > 0.55
    assert set(meta["intervals"]) == {"small", "large"}


def test_it_holds_no_text_of_the_training_data(content: bytes) -> None:
    assert b"Norford" not in content
    assert b"Which crop" not in content


def edited(
    content: bytes, change: Callable[[dict[str, Any], dict[str, np.ndarray]], None]
) -> bytes:
    source = artifact.loads(content)
    meta, arrays = json.loads(json.dumps(source.meta)), dict(source.arrays)
    change(meta, arrays)
    return artifact.dumps(meta, arrays)


def set_meta(key: str, value: Any) -> Callable[[dict[str, Any], dict[str, np.ndarray]], None]:
    def change(meta: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        del arrays
        meta[key] = value

    return change


def set_array(
    name: str, make: Callable[[np.ndarray], np.ndarray]
) -> Callable[[dict[str, Any], dict[str, np.ndarray]], None]:
    def change(meta: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        del meta
        arrays[name] = make(arrays[name])

    return change


def drop_array(name: str) -> Callable[[dict[str, Any], dict[str, np.ndarray]], None]:
    def change(meta: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        del meta
        del arrays[name]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_meta("format_version", 99), "another version of Tandem.*train again"),
        (set_meta("kind", "cake"), "not a predictor"),
        (set_meta("tiers", []), "tiers are not 1 to"),
        (set_meta("tiers", ["small", "small"]), "different names"),
        (set_meta("features", ["length"]), "features differ"),
        (set_meta("views", [{"type": "eval"}] * 6), "unknown type 'eval'"),
        (set_meta("views", [{}] * 99), "1 to 8 views"),
        (set_meta("length_tiers", ["other"]), "unknown tiers"),
        (set_meta("excerpt", [1, 2]), "another length"),
        (set_meta("intervals", [1, 2]), "metadata is not as"),
        (set_meta("length_tiers", [{}]), "metadata is not as"),
        (set_meta("cascade", {"first": "small"}), "verifier cannot be used"),
        (set_meta("cascade", "small"), "verifier cannot be used"),
        (drop_array("view/0/keys"), "'keys' is missing"),
        (drop_array("stack/utility"), "'stack/utility' is missing"),
        (set_array("view/0/keys", lambda a: a[::-1]), "not ascending"),
        (set_array("view/0/coef", lambda a: a[:, :1]), "expected float32"),
        (set_array("view/2/left", lambda a: a * 0), "backwards or outside"),
        (set_array("view/2/right", lambda a: a + 60_000), "backwards or outside"),
        (set_array("view/2/feature", lambda a: a * 0 + 255), "feature that does not exist"),
        (set_array("view/2/root", lambda a: a + 1), "roots of the trees"),
        (set_array("calibration/0/y", lambda a: -a), "not monotone"),
        (set_array("ood/scale", lambda a: a * 0), "no spread"),
        (set_array("stack/quality", lambda a: a * np.nan), "NaN or infinity"),
        (set_array("stack/quality", lambda a: a * 0 + 1e300), "numbers beyond 1e.12"),
    ],
)
def test_a_wrong_part_is_named(content: bytes, change: Any, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        loads(edited(content, change))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "truncated"),
        (b"PK\x03\x04 a zip file perhaps", "not an artifact"),
        (struct.pack("<Q", 1 << 60) + b"{}", "announces a header"),
        (struct.pack("<Q", 100) + b"{}", "truncated"),
        (struct.pack("<Q", 2) + b"[]", "not a JSON object"),
        (struct.pack("<Q", 2) + b"{}", "no `tandem` metadata"),
        (struct.pack("<Q", 4) + b"\xff\xfe\x00\x00", "not JSON"),
        (struct.pack("<Q", 100_000) + b"[" * 100_000, "not JSON"),
    ],
)
def test_files_that_are_no_artifact_are_refused(raw: bytes, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        loads(raw)


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.9, 0.9999])
def test_a_truncated_file_is_refused_by_name(content: bytes, share: float, tmp_path: Path) -> None:
    path = tmp_path / "half.tandem"
    path.write_bytes(content[: int(len(content) * share)])

    with pytest.raises(ArtifactError, match=r"half\.tandem: .*(truncated|not an artifact)"):
        load(path)


def test_a_file_too_large_is_not_even_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.tandem"
    with path.open("wb") as out:
        out.truncate(artifact.MAX_BYTES + 1)

    with pytest.raises(ArtifactError, match="more than the 20,000,000"):
        load(path)


def test_a_compressed_bomb_is_refused_without_unpacking_it(tmp_path: Path) -> None:
    path = tmp_path / "bomb.tandem"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
        for index in range(4):
            bomb.writestr(f"view/{index}/coef.npy", bytes(50_000_000))
    tracemalloc.start()

    with pytest.raises(ArtifactError, match=r"bomb\.tandem: not an artifact"):
        load(path)

    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert path.stat().st_size < 1_000_000
    assert peak < 10_000_000


def test_a_shape_of_terabytes_allocates_nothing(content: bytes) -> None:
    (size,) = struct.unpack_from("<Q", content)
    header = json.loads(content[8 : 8 + size])
    header["view/0/coef"]["shape"] = [20_000_000, 20_000_000, 4]
    raw = json.dumps(header).encode()
    tracemalloc.start()

    with pytest.raises(ArtifactError, match="does not fit the file"):
        loads(struct.pack("<Q", len(raw)) + raw + content[8 + size :])

    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20 * len(raw) + 2 * len(content)


def test_names_are_only_names(content: bytes, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    evil = "../planted"
    target = folder / "evil.tandem"
    source = artifact.loads(content)
    described = json.loads(json.dumps(source.meta))
    described["views"][0]["name"] = evil
    target.write_bytes(artifact.dumps(described, {**source.arrays, evil: np.zeros(3)}))

    predictor = load(target)

    assert predictor.view_names[0] == evil
    assert [file.name for file in folder.iterdir()] == ["evil.tandem"]
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]


def scored_or_refused(raw: bytes) -> None:
    """The only two things a file may do to the router."""
    try:
        predictor = loads(raw)
    except ArtifactError:
        return
    score = predictor.score("What is 12 + 34? Say 'done'.")
    assert np.isfinite([*score.quality.values(), *score.utility.values()]).all()


@settings(max_examples=200, deadline=None)
@given(
    flips=st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 7)), min_size=1, max_size=40
    ),
    cut=st.integers(0, 3),
)
def test_random_bit_flips_are_refused_or_harmless(
    content: bytes, flips: list[tuple[float, int]], cut: int
) -> None:
    damaged = bytearray(content)
    for position, bit in flips:
        damaged[int(position * len(damaged))] ^= 1 << bit

    scored_or_refused(bytes(damaged[: len(damaged) - cut]))


ANY_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(where=st.lists(st.integers(0, 30), min_size=1, max_size=4), value=ANY_JSON)
def test_any_value_anywhere_in_the_metadata_is_refused_or_harmless(
    content: bytes, where: list[int], value: Any
) -> None:
    source = artifact.loads(content)
    meta = json.loads(json.dumps(source.meta))
    node: Any = meta
    for step in where:
        keys = sorted(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            break
        key = keys[step % len(keys)]
        if step is where[-1] or not isinstance(node[key], dict | list):
            node[key] = value
            break
        node = node[key]

    scored_or_refused(artifact.dumps(meta, source.arrays))


@settings(max_examples=100, deadline=None)
@given(
    which=st.integers(0, 200),
    place=st.floats(0, 1, exclude_max=True),
    value=st.sampled_from([0.0, -1.0, 1e12, -1e12, 1e-300, 255.0, 65535.0, 2.0**31 - 1]),
)
def test_any_number_in_any_tensor_is_refused_or_harmless(
    content: bytes, which: int, place: float, value: float
) -> None:
    source = artifact.loads(content)
    name = sorted(source.arrays)[which % len(source.arrays)]
    array = source.arrays[name].copy()
    if array.size:
        limit = np.finfo if array.dtype.kind == "f" else np.iinfo
        bounds = limit(array.dtype)
        array.flat[int(place * array.size)] = np.clip(value, bounds.min, bounds.max)

    scored_or_refused(artifact.dumps(source.meta, source.arrays | {name: array}))


@settings(max_examples=150, deadline=None)
@given(position=st.integers(0, 3000), value=st.integers(0, 255))
def test_no_damaged_header_byte_raises_anything_else(
    content: bytes, position: int, value: int
) -> None:
    damaged = bytearray(content)
    damaged[position] = value

    try:
        predictor = loads(bytes(damaged))
    except ArtifactError:
        return
    predictor.score("What is 12 + 34?")


@settings(max_examples=50, deadline=None)
@given(
    shape=st.lists(st.integers(-5, 1 << 40), max_size=5),
    offsets=st.lists(st.integers(-5, 1 << 40), max_size=3),
    dtype=st.sampled_from(["F32", "U8", "O", "BOOL", 7, None]),
)
def test_hostile_tensor_entries_are_refused(
    shape: list[int], offsets: list[int], dtype: Any
) -> None:
    meta = json.dumps({"format_version": artifact.FORMAT_VERSION, "kind": "predictor"})
    header = {
        "__metadata__": {"tandem": meta},
        "x": {"dtype": dtype, "shape": shape, "data_offsets": offsets},
    }
    raw = json.dumps(header).encode()

    with pytest.raises(ArtifactError):
        loads(struct.pack("<Q", len(raw)) + raw + b"\x00" * 64)


def test_a_pipe_or_a_device_is_refused_without_reading_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")

    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(ArtifactError, match="is not a regular file; name the file"):
            artifact.read(path)


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()

    with pytest.raises(ArtifactError, match=r"cannot write .*taken: Is a directory; name another"):
        artifact.save(tmp_path / "taken", b"content")

    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_half_a_character_in_its_metadata_is_refused(content: bytes) -> None:
    """JSON may escape one half of a surrogate pair, which has no bytes."""
    length = int.from_bytes(content[:8], "little")
    header, rest = content[8 : 8 + length], content[8 + length :]
    outer = header.replace(b'{\\"', b'{\\"\\ud800x\\": 1, \\"', 1)
    inner = header.replace(b'{\\"', b'{\\"\\\\ud800x\\": 1, \\"', 1)

    for changed in (outer, inner):
        assert changed != header
        with pytest.raises(ArtifactError, match="text that is none"):
            loads(len(changed).to_bytes(8, "little") + changed + rest)
