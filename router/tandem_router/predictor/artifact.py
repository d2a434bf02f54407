"""The predictor's file format: one safetensors file, written reproducibly and read with suspicion.

A file is ``<u64 header length><JSON header><raw little-endian tensors>``, as in
huggingface/safetensors; the header's ``__metadata__`` holds one JSON document under ``tandem``.
Tensors are written in name order without gaps, so the same arrays give the same bytes. Reading
checks every size before it allocates and never executes anything: a hostile file can be refused,
not run.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
import struct
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tandem_router.predictor.errors import ArtifactError

#: Raised when the meaning of metadata or tensors changes; a reader takes its own version only.
FORMAT_VERSION = 4
#: A predictor for 7,000 rows takes about 2 MB; ten times that is a mistake or an attack.
MAX_BYTES = 20_000_000
MAX_HEADER_BYTES = 2_000_000
MAX_TENSORS = 512
#: Larger weights mean nothing, and their products could overflow to NaN while a prompt is scored.
MAX_WEIGHT = 1e12

_DTYPES: dict[str, np.dtype[Any]] = {
    "U8": np.dtype("<u1"),
    "U16": np.dtype("<u2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}

Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Artifact:
    """What a file holds: metadata (JSON), tensors, and the digest of its bytes."""

    meta: dict[str, Any]
    arrays: Arrays
    digest: str


def dumps(meta: Mapping[str, Any], arrays: Mapping[str, npt.NDArray[Any]]) -> bytes:
    """The bytes of an artifact; the same input gives the same bytes on every machine."""
    header: dict[str, Any] = {
        "__metadata__": {"tandem": json.dumps(meta, sort_keys=True, allow_nan=False)}
    }
    blobs: list[bytes] = []
    offset = 0
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        array = array.astype(array.dtype.newbyteorder("<"), copy=False)
        blob = array.tobytes()
        header[name] = {
            "dtype": _CODES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + len(blob)],
        }
        blobs.append(blob)
        offset += len(blob)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    data = struct.pack("<Q", len(text)) + text + b"".join(blobs)
    if len(data) > MAX_BYTES or len(text) > MAX_HEADER_BYTES:
        raise ArtifactError(
            f"the artifact would take {len(data):,} bytes with a header of {len(text):,}; the "
            f"limits are {MAX_BYTES:,} and {MAX_HEADER_BYTES:,}: train with a smaller --max-bytes, "
            "or on fewer tiers"
        )
    return data


def save(path: Path, data: bytes) -> None:
    """Writes atomically: readers see the old file or the new one, never a part."""
    temporary: Path | None = None
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        temporary = Path(name)
        with os.fdopen(handle, "wb") as out:
            out.write(data)
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise ArtifactError(f"cannot write {path}: {error.strerror}; name another file") from error


def read(path: Path) -> Artifact:
    """The checked contents of the file at `path`."""
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise ArtifactError(
                f"{path} is a directory; name the artifact file that `tandem train -o` wrote"
            )
        if not stat.S_ISREG(status.st_mode):  # a pipe may never end, nor may a device
            raise ArtifactError(
                f"{path} is not a regular file; name the file that `tandem train -o` wrote"
            )
        if status.st_size > MAX_BYTES:
            raise ArtifactError(
                f"{path} has {status.st_size:,} bytes, more than the {MAX_BYTES:,} a predictor may "
                "take; is it really an artifact of `tandem train`?"
            )
        with path.open("rb") as stream:
            data = stream.read(status.st_size)
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} does not exist; make it with `tandem train`") from error
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror}") from error
    try:
        return loads(data)
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from error


def loads(data: bytes) -> Artifact:
    """The contents of an artifact's bytes, every size, type and offset checked."""
    if len(data) > MAX_BYTES:
        raise ArtifactError(f"{len(data):,} bytes are more than the {MAX_BYTES:,} allowed")
    if len(data) < 8:
        raise ArtifactError(f"truncated: {len(data)} bytes cannot hold a header; copy it again")
    (header_bytes,) = struct.unpack_from("<Q", data)
    if header_bytes > MAX_HEADER_BYTES:
        raise ArtifactError(
            f"not an artifact: it announces a header of {header_bytes:,} bytes (at most "
            f"{MAX_HEADER_BYTES:,}); make one with `tandem train`"
        )
    if 8 + header_bytes > len(data):
        raise ArtifactError(
            f"truncated: the header needs {8 + header_bytes:,} bytes, the file has "
            f"{len(data):,}; copy it again"
        )
    header = _parse_json(data[8 : 8 + header_bytes], "header")
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict) or not isinstance(metadata.get("tandem"), str):
        raise ArtifactError(
            "not an artifact of `tandem train`: its header has no `tandem` metadata"
        )
    meta = _parse_json(metadata["tandem"].encode(), "metadata")
    version = meta.get("format_version")
    if version != FORMAT_VERSION:
        raise ArtifactError(
            f"format_version={version!r} was written by another version of Tandem; this one reads "
            f"{FORMAT_VERSION}: train again with `tandem train`"
        )
    if len(header) > MAX_TENSORS:
        raise ArtifactError(f"{len(header)} tensors are more than the {MAX_TENSORS} allowed")
    return Artifact(
        meta,
        _tensors(header, data, 8 + header_bytes),
        hashlib.sha256(data).hexdigest(),
    )


def _tensors(header: dict[str, Any], data: bytes, start: int) -> Arrays:
    body = len(data) - start
    arrays: Arrays = {}
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: _offsets(*item)):
        first, last = _offsets(name, entry)
        dtype = _DTYPES.get(str(entry.get("dtype")))
        shape = entry.get("shape")
        if dtype is None:
            kind = str(entry.get("dtype"))[:40]
            raise ArtifactError(f"tensor {name[:80]!r} has the unknown type {kind!r}: damaged")
        if (
            not isinstance(shape, list)
            or len(shape) > 3
            or not all(isinstance(n, int) and 0 <= n <= MAX_BYTES for n in shape)
        ):
            raise ArtifactError(f"tensor {name[:80]!r} has the shape {str(shape)[:80]}; damaged")
        if first != end or last - first != math.prod(shape) * dtype.itemsize or last > body:
            raise ArtifactError(
                f"tensor {name[:80]!r} does not fit the file (bytes {first}..{last} of {body}): "
                "truncated or damaged; copy it again"
            )
        array = np.frombuffer(
            data, dtype=dtype, count=math.prod(shape), offset=start + first
        ).reshape(shape)
        _check_numbers(name, array)
        arrays[name] = array.astype(array.dtype.newbyteorder("="), copy=False)
        end = last
    if end != body:
        raise ArtifactError(f"{body - end} bytes belong to no tensor: damaged; copy it again")
    return arrays


def _check_numbers(name: str, array: npt.NDArray[Any]) -> None:
    if array.dtype.kind != "f" or array.size == 0:
        return
    if not np.isfinite(array).all():
        raise ArtifactError(f"tensor {name[:80]!r} holds NaN or infinity; train again")
    if max(float(array.max()), -float(array.min())) > MAX_WEIGHT:
        raise ArtifactError(
            f"tensor {name[:80]!r} holds numbers beyond {MAX_WEIGHT:g}: damaged; copy it again"
        )


def _offsets(name: str, entry: Any) -> tuple[int, int]:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(isinstance(n, int) and not isinstance(n, bool) for n in offsets)
        or not 0 <= offsets[0] <= offsets[1] <= MAX_BYTES
    ):
        raise ArtifactError(f"tensor {name[:80]!r} has no usable data_offsets: damaged")
    return offsets[0], offsets[1]


def _parse_json(raw: bytes, what: str) -> dict[str, Any]:
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"its {what} is not JSON: damaged, or not an artifact") from error
    if not isinstance(value, dict):
        raise ArtifactError(f"its {what} is not a JSON object: damaged, or not an artifact")
    try:
        # Half a surrogate pair is JSON, and no text that could be hashed, shown or sent.
        json.dumps(value, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError) as error:
        raise ArtifactError(f"its {what} holds text that is none: damaged") from error
    return value
