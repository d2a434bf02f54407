"""Brings remote files into a folder: resumed where they broke off, verified before they count.

A file is written under a name of its own that says which content it is to become, so that a part
of other content is never continued, and renamed when its size and hash are right. Whoever calls
holds the folder's lock (:func:`only_writer`): there is one writer, on shared storage too.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from tandem_worker.errors import WorkerError

ATTEMPTS = 5
LOCK = ".tandem-lock"
PARALLEL_FILES = 4
_LOCK_PERIOD_S = 2.0
_SAY_EVERY_S = 30.0

Say = Callable[[str], None]
Sleep = Callable[[float], None]
HashKind = Literal["sha256", "git", "md5"]


class WeightsError(WorkerError):
    """The weights cannot be had; the message says what to do."""


class BrokenTransferError(Exception):
    """A transfer ended early or was refused for now; another attempt may do better."""


@dataclass(frozen=True)
class RemoteFile:
    """One file of a source.

    Attributes:
        name: Plain file name.
        size: Bytes.
        kind: How ``hash`` was made; ``git`` is git's blob SHA-1.
        hash: Hex digits, or empty where the source gives none that can be checked.
        version: What tells two contents of one name apart; goes into the part file's name.
    """

    name: str
    size: int
    kind: HashKind = "sha256"
    hash: str = ""
    version: str = ""


class Source(Protocol):
    """Where files come from."""

    def open(
        self, file: RemoteFile, offset: int
    ) -> AbstractContextManager[tuple[int, Iterator[bytes]]]:
        """Bytes of the file from some position on, at most ``offset``; that position comes first.

        Raises BrokenTransferError where another attempt may help, WeightsError where none will.
        """
        ...


@contextlib.contextmanager
def only_writer(folder: Path, say: Say, sleep: Sleep = time.sleep) -> Iterator[None]:
    """Hold the folder's lock; waits, saying so, while another pod holds it.

    Raises:
        WeightsError: the folder cannot be written, or its file system has no locks.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("a")
    except OSError as error:
        raise WeightsError(f"{folder} cannot be written: {error.strerror}") from error
    with lock:
        waited = 0.0
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if waited % _SAY_EVERY_S == 0:
                    say("another pod is writing these weights; waiting for it")
                sleep(_LOCK_PERIOD_S)
                waited += _LOCK_PERIOD_S
            except OSError as error:
                raise WeightsError(
                    f"the file system of {folder} has no file locks ({error.strerror}), so two "
                    "pods could write one file; choose another storage class or leave "
                    "weights.cache out"
                ) from error
        yield


def fetch_all(
    source: Source, files: Sequence[RemoteFile], folder: Path, say: Say, sleep: Sleep = time.sleep
) -> None:
    """Bring the files into the folder, a few at a time.

    Raises:
        WeightsError: one of them cannot be had whole and unchanged.
    """
    missing = sum(file.size for file in files)
    free = shutil.disk_usage(folder).free
    if missing > free + sum(_part(folder, file).stat().st_size for file in _begun(folder, files)):
        raise WeightsError(
            f"{folder} has {free / 1e9:.1f} GB free, the weights need {missing / 1e9:.1f} GB; "
            "enlarge weights.cache.size or the node's disk"
        )
    with ThreadPoolExecutor(max_workers=PARALLEL_FILES) as pool:
        running = [pool.submit(fetch_file, source, file, folder, say, sleep) for file in files]
        try:
            for one in running:
                one.result()
        except BaseException:
            for one in running:
                one.cancel()
            raise


def fetch_file(
    source: Source, file: RemoteFile, folder: Path, say: Say, sleep: Sleep = time.sleep
) -> None:
    """Bring one file into the folder.

    Raises:
        WeightsError: it still fails after several attempts without progress.
    """
    part = _part(folder, file)
    failures = 0
    while True:
        before = _size(part)
        try:
            _continue(source, file, part)
            _verify(file, part)
            target = folder / file.name
            target.parent.mkdir(exist_ok=True)
            part.replace(target)
            say(f"{file.name}: {file.size / 1e6:.1f} MB")
            return
        except BrokenTransferError as error:
            failures = 1 if _size(part) > before else failures + 1
            if failures >= ATTEMPTS:
                raise WeightsError(f"{file.name}: {error}; gave up after {failures}") from error
            say(f"{file.name}: {error}; trying again")
            sleep(float(2**failures))
        except OSError as error:
            hint = "enlarge weights.cache.size" if error.errno == errno.ENOSPC else "check the disk"
            raise WeightsError(f"{part} cannot be written: {error.strerror}; {hint}") from error


def hash_of(path: Path, kind: HashKind) -> str:
    """The hash of a file's content, in hex."""
    digest = hashlib.new("sha1" if kind == "git" else kind, usedforsecurity=False)
    if kind == "git":
        digest.update(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as content:
        while chunk := content.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def _continue(source: Source, file: RemoteFile, part: Path) -> None:
    """Read on from where the part file ends."""
    offset = _size(part)
    if offset > file.size:
        part.unlink()
        offset = 0
    if offset == file.size and part.exists():
        return
    with source.open(file, offset) as (begins, chunks), part.open("ab") as out:
        if begins != offset:  # the server knows no ranges
            out.truncate(begins)
        size = begins
        for chunk in chunks:
            size += len(chunk)
            if size > file.size:
                out.truncate(0)
                raise BrokenTransferError(f"more than the announced {file.size} bytes arrived")
            out.write(chunk)
    if size != file.size:
        raise BrokenTransferError(f"{size} bytes arrived instead of {file.size}")


def _verify(file: RemoteFile, part: Path) -> None:
    if file.hash and (actual := hash_of(part, file.kind)) != file.hash:
        part.unlink()
        raise BrokenTransferError(
            f"what arrived has {file.kind} hash {actual[:16]} instead of {file.hash[:16]}"
        )


def _begun(folder: Path, files: Sequence[RemoteFile]) -> list[RemoteFile]:
    return [file for file in files if _part(folder, file).exists()]


def _part(folder: Path, file: RemoteFile) -> Path:
    content = f"{file.size} {file.kind} {file.hash} {file.version}"
    name = file.name.replace("/", "--")
    return folder / f".{name}.{hashlib.sha256(content.encode()).hexdigest()[:16]}.part"


def _size(path: Path) -> int:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return 0
