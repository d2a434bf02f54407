"""The identity of a model's files: one digest of their content, the same wherever they lie.

Two workers compute the same thing if and only if their digests are equal; prefill and decode
workers compare them before any KV block travels. A download leaves a manifest beside the files, so
that a start needs no second reading of what was verified once; without one the files are hashed.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem_worker.errors import ModelError
from tandem_worker.models.files import MAX_INDEX_BYTES, loaded_files, locate, read_json

MANIFEST = ".tandem-weights.json"


@dataclass(frozen=True)
class FileIdentity:
    """One file as it was when it was verified."""

    size: int
    mtime_ns: int
    sha256: str

    def is_current(self, path: Path) -> bool:
        """Whether the file still has the size and time of that moment."""
        try:
            status = path.stat()
        except OSError:
            return False
        return status.st_size == self.size and status.st_mtime_ns == self.mtime_ns


@dataclass(frozen=True)
class WeightsIdentity:
    """Attributes:
    digest: 64 hex digits, SHA-256 over names and SHA-256s of the files that a worker reads.
    source: Where they were downloaded from, or empty.
    commit: The hub's commit they were resolved to, or empty.
    """

    digest: str
    source: str = ""
    commit: str = ""

    def as_dict(self) -> dict[str, str]:
        """The non-empty parts, for JSON."""
        parts = {"digest": self.digest, "source": self.source, "commit": self.commit}
        return {key: value for key, value in parts.items() if value}


@dataclass(frozen=True)
class Manifest:
    """What a finished download says of its files."""

    source: str
    commit: str
    files: Mapping[str, FileIdentity]

    @property
    def identity(self) -> WeightsIdentity:
        """The identity of these files."""
        digests = {name: file.sha256 for name, file in self.files.items()}
        return WeightsIdentity(digest_of(digests), self.source, self.commit)

    def is_current(self, directory: Path) -> bool:
        """Whether every file is there as it was verified, and no other one would be read."""
        try:
            wanted = loaded_files(directory)
        except ModelError:
            return False
        return set(wanted) == set(self.files) and all(
            file.is_current(directory / name) for name, file in self.files.items()
        )


def digest_of(sha256_of: Mapping[str, str]) -> str:
    """SHA-256 over the names and SHA-256s of files, in the order of names."""
    whole = hashlib.sha256()
    for name in sorted(sha256_of):
        whole.update(f"{name}\0{sha256_of[name]}\n".encode())
    return whole.hexdigest()


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def measure(path: Path) -> FileIdentity:
    """Hash a file; its size and time are those before the reading."""
    status = path.stat()
    return FileIdentity(status.st_size, status.st_mtime_ns, sha256_of_file(path))


def identify(directory: Path) -> WeightsIdentity:
    """The identity of a model directory: from its manifest where that is current, else by hashing.

    Raises:
        ModelError: a file cannot be read.
    """
    manifest = read_manifest(directory)
    if manifest is not None and manifest.is_current(directory):
        return manifest.identity
    names = loaded_files(directory)
    try:
        with ThreadPoolExecutor(max_workers=4) as pool:  # hashing leaves the interpreter's lock
            digests = dict(
                zip(
                    names,
                    pool.map(lambda name: sha256_of_file(directory / name), names),
                    strict=True,
                )
            )
    except OSError as error:
        raise ModelError(f"{directory} cannot be read: {error}") from error
    return WeightsIdentity(digest_of(digests))


def read_manifest(directory: Path) -> Manifest | None:
    """The manifest of a finished download; None where there is none that can be used."""
    try:
        if (path := locate(directory, MANIFEST)) is None:
            return None
        data = read_json(path, MAX_INDEX_BYTES)
        files = {str(name): _file(entry) for name, entry in data["files"].items()}
        return Manifest(str(data["source"]), str(data["commit"]), files)
    except (ModelError, KeyError, TypeError, ValueError, AttributeError):
        return None  # unreadable is as good as absent: the files are hashed, or fetched again


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write it in one step, as the last act of a download."""
    data = {
        "source": manifest.source,
        "commit": manifest.commit,
        "files": {
            name: {"size": file.size, "mtime_ns": file.mtime_ns, "sha256": file.sha256}
            for name, file in sorted(manifest.files.items())
        },
    }
    handle, name = tempfile.mkstemp(prefix=MANIFEST, dir=directory)
    with os.fdopen(handle, "w", encoding="utf-8") as out:
        json.dump(data, out, indent=1)
    os.chmod(name, 0o644)
    os.replace(name, directory / MANIFEST)


def _file(entry: Any) -> FileIdentity:
    sha256 = str(entry["sha256"])
    if len(sha256) != 64 or len(bytes.fromhex(sha256)) != 32:
        raise ValueError("sha256 must be 64 hex digits")
    return FileIdentity(int(entry["size"]), int(entry["mtime_ns"]), sha256)
