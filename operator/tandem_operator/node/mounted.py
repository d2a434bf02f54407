"""Runs a command that sees its volumes at their real paths: `mounted.py BINDS -- COMMAND...`.

BINDS is a JSON list of [source, target, read_only]. The command gets a mount namespace of its own
(needs root, or a user namespace) and a root folder in memory that shows the machine's folders
again; only folders on the way to a missing mount point are rebuilt, so nothing is left behind on
the machine. The process keeps its id: signals and exit status are the command's own.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import tempfile

CLONE_NEWNS = 0x00020000
MS_RDONLY, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 32, 4096, 16384, 1 << 18


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _mount(libc: ctypes.CDLL, source: str, target: str, kind: str | None, flags: int) -> None:
    encoded = None if kind is None else kind.encode()
    result = libc.mount(source.encode(), target.encode(), encoded, flags, None)
    _check(result, f"mounting {source} at {target}")


def folders_to_rebuild(targets: list[str]) -> set[str]:
    """Folders that must become writable copies so that every target can exist."""
    rebuild: set[str] = set()
    for target in targets:
        parent = target
        while not os.path.lexists(parent):
            parent = os.path.dirname(parent)
        if parent == target:
            continue
        while True:
            rebuild.add(parent)
            if parent == "/":
                break
            parent = os.path.dirname(parent)
    return rebuild


def _show(libc: ctypes.CDLL, folder: str, root: str, rebuild: set[str], staging: str) -> None:
    """Make `root + folder` show what `folder` holds."""
    for entry in sorted(os.scandir(folder), key=lambda e: e.name):
        if entry.path == staging:
            continue
        here = root + entry.path
        if entry.is_symlink():
            os.symlink(os.readlink(entry.path), here)
        elif entry.is_dir():
            os.mkdir(here, entry.stat().st_mode & 0o7777)
            if entry.path in rebuild:
                _show(libc, entry.path, root, rebuild, staging)
            else:
                _mount(libc, entry.path, here, None, MS_BIND | MS_REC)
        else:
            os.close(os.open(here, os.O_CREAT | os.O_WRONLY, 0o600))
            _mount(libc, entry.path, here, None, MS_BIND)


def enter(binds: list[tuple[str, str, bool]]) -> None:
    """Give this process its own view of the file system, with the sources at the targets.

    Raises:
        OSError: a mount was refused; the message names it.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    cwd = os.getcwd()
    _check(libc.unshare(CLONE_NEWNS), "unshare")
    _mount(libc, "none", "/", None, MS_REC | MS_PRIVATE)
    resolved = [(source, os.path.realpath(target), ro) for source, target, ro in binds]
    # A volume over the folder of this interpreter or of the pod (/tmp, say) would hide them.
    needed = [os.path.realpath(path) + "/" for path in (cwd, sys.prefix, __file__)]
    real = [b for b in resolved if not any(path.startswith(b[1] + "/") for path in needed)]
    rebuild = folders_to_rebuild([target for _, target, _ in real])
    if rebuild:
        staging = tempfile.mkdtemp(prefix="root-", dir=cwd)
        _mount(libc, "tmpfs", staging, "tmpfs", 0)
        _show(libc, "/", staging, rebuild, staging)
    else:
        staging = ""
    for source, target, _ in sorted(real, key=lambda bind: bind[1].count("/")):
        here = staging + target
        if os.path.isdir(source):
            os.makedirs(here, exist_ok=True)
        elif not os.path.exists(here):
            os.makedirs(os.path.dirname(here), exist_ok=True)
            os.close(os.open(here, os.O_CREAT | os.O_WRONLY, 0o600))
        _mount(libc, source, here, None, MS_BIND | MS_REC)
    for _, target, read_only in real:
        if read_only:
            here = staging + target
            flags = MS_REMOUNT | MS_BIND | MS_RDONLY
            _mount(libc, "none", here, None, flags)
    if staging:
        os.chroot(staging)
    os.chdir(cwd)


def main(arguments: list[str]) -> None:
    binds = [(str(s), str(t), bool(ro)) for s, t, ro in json.loads(arguments[0])]
    command = arguments[2:]
    try:
        enter(binds)
        os.execvp(command[0], command)
    except OSError as error:
        sys.stderr.write(f"node: {error}\n")
        sys.exit(126)


if __name__ == "__main__":
    main(sys.argv[1:])
