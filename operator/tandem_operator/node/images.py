"""What an image name means on a node without images: the command of a local process."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


class UnknownImageError(Exception):
    """No local command stands for an image."""


def _entrypoints() -> dict[str, tuple[str, ...]]:
    python = sys.executable
    return {
        "tandem/worker": (python, "-m", "tandem_worker"),
        "tandem/router": (python, "-m", "tandem_router"),
        "tandem/operator": (python, "-m", "tandem_operator"),
    }


def local_commands() -> dict[str, tuple[str, ...]]:
    """What first words of a container's command stand for on this machine."""
    python = sys.executable
    return {
        "python": (python,),
        "python3": (python,),
        "tandem": (python, "-m", "tandem_operator.cli"),
        "tandem-worker": (python, "-m", "tandem_worker"),
        "tandem-router": (python, "-m", "tandem_router"),
    }


@dataclass(frozen=True)
class ImageTable:
    """Maps image names (without registry host, tag and digest) to entrypoint commands.

    commands replaces the first word of an explicit container command in the same way.
    folders: what the images hold at a path, as a folder of this machine.
    """

    entrypoints: Mapping[str, Sequence[str]] = field(default_factory=_entrypoints)
    commands: Mapping[str, Sequence[str]] = field(default_factory=local_commands)
    folders: Mapping[str, str] = field(default_factory=dict)

    def binds(self) -> list[tuple[str, str, bool]]:
        """(path on this machine, path in the container, read-only) of each folder."""
        return [(source, target, True) for target, source in self.folders.items()]

    def command(self, image: str, command: Sequence[str], args: Sequence[str]) -> list[str]:
        """The local argv of a container.

        Raises UnknownImageError when the container has no command and its image is not listed.
        """
        if command:
            head = self.commands.get(command[0])
            if head is None and "/" not in command[0] and shutil.which(command[0]) is None:
                raise UnknownImageError(
                    f"{command[0]!r}, which image {image!r} would run, is not on this machine; "
                    f"install it, or say where it is: --image {command[0]}=/path/to/{command[0]}"
                )
            head = head or [command[0]]
            return [*head, *command[1:], *args]
        name = image.split("@")[0]
        if ":" in name.rsplit("/", 1)[-1]:
            name = name.rsplit(":", 1)[0]
        parts = name.split("/")
        for start in range(len(parts)):
            entry = self.entrypoints.get("/".join(parts[start:]))
            if entry is not None:
                return [*entry, *args]
        known = ", ".join(sorted(self.entrypoints))
        raise UnknownImageError(
            f"image {image!r} has no local command; use one of {known} or give the container a "
            "command"
        )
