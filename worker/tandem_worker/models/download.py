"""Downloads a model's files into a folder: `python -m tandem_worker.models.download URI FOLDER`.

hf://org/name[@revision] comes from the Hugging Face hub (HF_TOKEN, HF_ENDPOINT), s3://bucket/prefix
from an S3 service (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_REGION,
AWS_ENDPOINT_URL, or the pod's own identity). What a reference names is resolved once: a folder that
holds a finished download of the same source is kept as it is, whatever the source has become since,
so every pod on a shared claim, and every restart, runs the same weights. `--pin FILE` does the same
for pods without a shared claim: a JSON file {"source", "commit"} that another pod resolved before.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from tandem_worker.errors import ModelError, WorkerError
from tandem_worker.models.fetching import (
    RemoteFile,
    Say,
    Sleep,
    Source,
    WeightsError,
    fetch_all,
    hash_of,
    only_writer,
)
from tandem_worker.models.files import (
    INDEX,
    POOLING,
    TEXT_FILES,
    check_formats,
    loaded_files,
    weight_files,
)
from tandem_worker.models.identity import (
    Manifest,
    WeightsIdentity,
    measure,
    read_manifest,
    write_manifest,
)
from tandem_worker.models.spec import ModelSpec

USAGE = "usage: python -m tandem_worker.models.download URI FOLDER [--pin FILE]\n"


class Repository(Source, Protocol):
    """A source that can be listed."""

    @property
    def commit(self) -> str:
        """The commit that was resolved, or empty."""
        ...

    def close(self) -> None:
        """Close the connections."""
        ...

    def resolve(self, commit: str = "") -> None:
        """Fix what is going to be read."""
        ...

    def listing(self) -> dict[str, RemoteFile]:
        """The files at the root, by name."""
        ...


def download(
    uri: str,
    folder: Path,
    env: Mapping[str, str],
    say: Say,
    *,
    pinned_commit: str = "",
    sleep: Sleep = time.sleep,
) -> WeightsIdentity:
    """Bring what a worker reads of the source into the folder; the identity of what is there then.

    Raises:
        WeightsError: the files cannot be had.
        ModelError: they are of a kind that no worker runs; little has been downloaded then.
    """
    repository = open_source(uri, env)
    with contextlib.closing(repository), only_writer(folder, say, sleep):
        _keep_inside(folder)
        done = read_manifest(folder)
        same = done is not None and done.source == uri and pinned_commit in ("", done.commit)
        if done is not None and same and done.is_current(folder):
            say(f"there already: {describe(done.identity)}")
            return done.identity
        repository.resolve(pinned_commit)
        listing = repository.listing()
        check_formats(listing, uri)
        texts = [listing[name] for name in (*TEXT_FILES, INDEX) if name in listing]
        _bring(repository, texts, folder, say, sleep)
        _drop_others(folder, {file.name for file in texts})
        ModelSpec.load(folder)  # refused here before the large files
        missing = [name for name in weight_files(folder) if name not in listing]
        if missing:
            raise WeightsError(f"{uri}: {INDEX} names {missing[0]}, which is not there")
        _bring(repository, [listing[n] for n in weight_files(folder)], folder, say, sleep)
        files = {name: measure(folder / name) for name in loaded_files(folder)}
        manifest = Manifest(uri, repository.commit, files)
        write_manifest(folder, manifest)
        say(f"complete: {describe(manifest.identity)}")
        return manifest.identity


def open_source(uri: str, env: Mapping[str, str]) -> Repository:
    """The source that a URI names.

    Raises:
        WeightsError: it is neither hf:// nor s3://.
    """
    scheme, _, reference = uri.partition("://")
    if scheme == "hf":
        from tandem_worker.models.hub import Hub

        return Hub(reference, env)
    if scheme == "s3":
        from tandem_worker.models.s3 import S3

        return S3(reference, env)
    raise WeightsError(f"{uri}: cannot be downloaded; use hf:// or s3://")


def describe(identity: WeightsIdentity) -> str:
    """One line about an identity."""
    commit = f", commit {identity.commit}" if identity.commit else ""
    return f"weights {identity.digest[:16]}{commit}"


def _bring(
    repository: Repository, files: list[RemoteFile], folder: Path, say: Say, sleep: Sleep
) -> None:
    """Fetch those that are not there with the content that the source vouches for."""
    vouch: Callable[[RemoteFile], RemoteFile] = getattr(repository, "verified_by", lambda f: f)
    wanted = []
    for file in map(vouch, files):
        if _is_there(file, folder / file.name):
            say(f"{file.name}: there already")
            continue
        if not file.hash:
            say(f"{file.name}: the source keeps no hash of it; its size alone is checked")
        wanted.append(file)
    fetch_all(repository, wanted, folder, say, sleep)


def _is_there(file: RemoteFile, target: Path) -> bool:
    """Whether the target holds what the source vouches for."""
    return (
        bool(file.hash)
        and target.is_file()
        and target.stat().st_size == file.size
        and hash_of(target, file.kind) == file.hash
    )


def _keep_inside(folder: Path) -> None:
    """Nothing is written or deleted through a link that somebody left in the place of a folder."""
    nested = (folder / POOLING).parent
    if nested.is_symlink() or nested.is_file():
        nested.unlink()


def _drop_others(folder: Path, names: set[str]) -> None:
    """Files of an earlier source that this one does not have must not be read with it."""
    for name in (*TEXT_FILES, INDEX):
        if name not in names:
            (folder / name).unlink(missing_ok=True)


def read_pin(path: Path, uri: str) -> str:
    """The commit that another pod resolved this source to; empty without a usable pin."""
    try:
        pin = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""  # the first pod of a Model has none
    if not isinstance(pin, dict) or pin.get("source") != uri:
        return ""
    commit = pin.get("commit")
    return commit if isinstance(commit, str) else ""


def main(argv: Sequence[str] | None = None) -> int:
    """Fetch URI into FOLDER; the exit status."""
    args = list(sys.argv[1:] if argv is None else argv)
    pin: Path | None = None
    if len(args) == 4 and args[2] == "--pin":
        pin = Path(args[3])
        del args[2:]
    if len(args) != 2:
        sys.stderr.write(USAGE)
        return 2
    uri, folder = args[0], Path(args[1])
    # Libraries may want to write beside the home directory, which is read-only in a pod.
    os.environ.setdefault("HF_HOME", tempfile.gettempdir())
    try:
        commit = read_pin(pin, uri) if pin is not None else ""
        download(uri, folder, os.environ, lambda t: print(t, flush=True), pinned_commit=commit)
    except (WorkerError, ModelError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except OSError as error:
        sys.stderr.write(f"{folder} cannot be used: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
