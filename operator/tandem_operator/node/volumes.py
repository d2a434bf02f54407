"""Turns the volumes of a pod into folders and the pod's mount paths into paths on this machine.

Without mount namespaces a container cannot see its volumes at the paths that its manifest names.
So wherever the manifest states such a path (arguments, environment, text of ConfigMaps) the real
one is put in; Mounts.rewrite does that in one pass, so a real path is never rewritten again.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import shutil
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Lookup = Callable[[str, str, str], Awaitable[dict[str, Any] | None]]
"""(kind, namespace, name) -> the ConfigMap or Secret, or None."""


class MountError(Exception):
    """A volume cannot be provided yet; the pod waits and the node tries again."""


@dataclass(frozen=True)
class Mounts:
    """Mount path in the container -> path on this machine."""

    paths: Mapping[str, str]

    def rewrite(self, text: str) -> str:
        """Replace each mount path that stands in text as a whole path or as its beginning."""
        if not self.paths:
            return text
        ordered = sorted(self.paths, key=len, reverse=True)
        pattern = "|".join(re.escape(p.rstrip("/")) for p in ordered)
        real = {p.rstrip("/"): v for p, v in self.paths.items()}
        return re.sub(rf"(?<![\w./-])({pattern})(?=$|[/\s:,;\"'\]\}}])", lambda m: real[m[1]], text)


class PodVolumes:
    """The volumes of one pod below one folder."""

    def __init__(
        self,
        pod: Mapping[str, Any],
        folder: Path,
        claims: Path,
        lookup: Lookup,
        *,
        rewrite: bool = True,
    ) -> None:
        self._rewrite = rewrite
        self._pod = pod
        self._namespace = str(pod["metadata"].get("namespace", "default"))
        self._folder = folder
        self._claims = claims
        self._lookup = lookup
        self._paths: dict[str, Path] = {}

    def uses(self, kind: str, name: str) -> bool:
        """Whether a volume shows the ConfigMap or Secret of that name."""
        key, field = ("configMap", "name") if kind == "ConfigMap" else ("secret", "secretName")
        return any(v.get(key, {}).get(field) == name for v in self._volumes())

    async def prepare(self) -> None:
        """Create or bring up to date all volumes.

        Raises MountError for a missing ConfigMap, Secret or host folder.
        """
        self._paths = {v["name"]: self._path(v) for v in self._volumes()}
        for volume in self._volumes():
            await self._prepare(volume, self._paths[volume["name"]])

    def mounts(self, container: Mapping[str, Any]) -> Mounts:
        """The mount paths of one container."""
        paths = {}
        for mount in container.get("volumeMounts", []):
            base = self._paths[mount["name"]]
            sub = mount.get("subPath")
            paths[mount["mountPath"]] = str(base / sub) if sub else str(base)
        return Mounts(paths)

    def binds(self, container: Mapping[str, Any]) -> list[tuple[str, str, bool]]:
        """(path on this machine, path in the container, read-only) of each mount."""
        paths = self.mounts(container).paths
        return [
            (paths[mount["mountPath"]], str(mount["mountPath"]), bool(mount.get("readOnly")))
            for mount in container.get("volumeMounts", [])
        ]

    def as_seen(self, text: str) -> str:
        """A text with the paths at which the pod's processes find its volumes."""
        return self._all_mounts().rewrite(text)

    def remove(self) -> None:
        """Delete what belongs to the pod alone."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _volumes(self) -> list[dict[str, Any]]:
        volumes: list[dict[str, Any]] = self._pod["spec"].get("volumes") or []
        return volumes

    def _path(self, volume: Mapping[str, Any]) -> Path:
        if (host := volume.get("hostPath")) is not None:
            return Path(host["path"])
        if (claim := volume.get("persistentVolumeClaim")) is not None:
            return self._claims / self._namespace / str(claim["claimName"])
        return self._folder / str(volume["name"])

    async def _prepare(self, volume: Mapping[str, Any], path: Path) -> None:
        if (config := volume.get("configMap")) is not None:
            await self._files("ConfigMap", config["name"], config, path)
        elif (secret := volume.get("secret")) is not None:
            await self._files("Secret", secret["secretName"], secret, path)
        elif (projected := volume.get("projected")) is not None:
            await self._project(projected.get("sources") or [], path)
        elif (host := volume.get("hostPath")) is not None:
            _check_host_path(path, host.get("type", ""))
        else:
            _make(path)

    async def _files(self, kind: str, name: str, source: Mapping[str, Any], folder: Path) -> None:
        obj = await self._lookup(kind, self._namespace, name)
        if obj is None:
            if not source.get("optional"):
                raise MountError(f"{kind} {name!r} does not exist")
            _make(folder)
            return
        files = contents(obj)
        if kind == "ConfigMap":
            mounts = self._all_mounts()
            for key, value in (obj.get("data") or {}).items():
                files[key] = mounts.rewrite(value).encode()
        write_files(folder, files, source.get("items"), secret=kind == "Secret")

    async def _project(self, sources: list[Mapping[str, Any]], folder: Path) -> None:
        """Several sources in one folder: tokens, ConfigMaps, Secrets, the pod's own fields."""
        metadata = self._pod["metadata"]
        files: dict[str, bytes] = {}
        for source in sources:
            if (token := source.get("serviceAccountToken")) is not None:
                account = self._pod["spec"].get("serviceAccountName", "default")
                bound = f"{account}/{metadata['name']}"
                found = await self._lookup("ServiceAccountToken", self._namespace, bound)
                if found is None:
                    raise MountError(f"no token can be had for ServiceAccount {account!r}")
                files[token["path"]] = str(found["data"]["token"]).encode()
            for key, kind in (("configMap", "ConfigMap"), ("secret", "Secret")):
                if (named := source.get(key)) is not None:
                    obj = await self._lookup(kind, self._namespace, named["name"])
                    if obj is None and not named.get("optional"):
                        raise MountError(f"{kind} {named['name']!r} does not exist")
                    entries = contents(obj or {})
                    items = named.get("items") or [{"key": k, "path": k} for k in entries]
                    files |= {i["path"]: entries[i["key"]] for i in items if i["key"] in entries}
            for item in (source.get("downwardAPI") or {}).get("items") or []:
                name = str(item["fieldRef"]["fieldPath"]).removeprefix("metadata.")
                files[item["path"]] = str(metadata.get(name, "")).encode()
        write_files(folder, files, None, secret=True)

    def _all_mounts(self) -> Mounts:
        if not self._rewrite:
            return Mounts({})
        paths: dict[str, str] = {}
        spec = self._pod["spec"]
        for container in [*spec.get("initContainers", []), *spec.get("containers", [])]:
            paths.update(self.mounts(container).paths)
        return Mounts(paths)


def _check_host_path(path: Path, kind: str) -> None:
    if kind == "DirectoryOrCreate":
        path.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        raise MountError(f"{path} does not exist on this machine; create it or correct it")
    if kind == "Directory" and not path.is_dir():
        raise MountError(f"{path} is not a folder; name the folder that holds the files")


def _make(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)


def contents(obj: Mapping[str, Any]) -> dict[str, bytes]:
    """The entries of a ConfigMap or Secret as bytes."""
    found: dict[str, bytes] = {}
    for key, value in (obj.get("data") or {}).items():
        found[key] = base64.b64decode(value) if obj.get("kind") == "Secret" else str(value).encode()
    for key, value in (obj.get("binaryData") or {}).items():
        found[key] = base64.b64decode(value)
    for key, value in (obj.get("stringData") or {}).items():
        found[key] = str(value).encode()
    return found


def write_files(
    folder: Path, files: Mapping[str, bytes], items: list[dict[str, Any]] | None, *, secret: bool
) -> None:
    """Make a folder hold exactly these files; each changes in one step (rename)."""
    folder.mkdir(parents=True, exist_ok=True)
    if items is not None:
        files = {i["path"]: files[i["key"]] for i in items if i["key"] in files}
    for name, value in files.items():
        target = folder / name
        with contextlib.suppress(OSError):
            if target.read_bytes() == value:
                continue
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.new")
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600 if secret else 0o644)
        with os.fdopen(fd, "wb") as f:
            f.write(value)
        temporary.replace(target)
    for path in folder.rglob("*"):
        if path.is_file() and str(path.relative_to(folder)) not in files:
            path.unlink(missing_ok=True)


def mounted_command(binds: list[tuple[str, str, bool]]) -> list[str]:
    """The words before a command that make it see its volumes at their real paths."""
    return [
        sys.executable,
        "-I",
        "-S",
        str(Path(__file__).parent / "mounted.py"),
        json.dumps(binds),
        "--",
    ]
