"""Completion of `tandem` in bash, zsh and fish: the line for a shell's profile, and what it asks.

argcomplete reads the parser; here are the names that no parser knows, those of running objects.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

from tandem_operator.cli.errors import CommandError
from tandem_operator.cli.kinds import ALIASES, kinds_of

PROFILES = {
    "bash": "~/.bashrc",
    "zsh": "~/.zshrc",
    "fish": "~/.config/fish/config.fish",
}


def register(subparsers: Any) -> None:
    """Add the command to the parser."""
    text = "print the script that completes commands, kinds, fields and names in your shell"
    lines = "; ".join(f"{s}: add {line_for(s)!r} to {p}" for s, p in PROFILES.items())
    parser = subparsers.add_parser(
        "completion", help=text, description=f"{text[0].upper()}{text[1:]}. {lines}."
    )
    parser.add_argument("shell", nargs="?", choices=list(PROFILES), help="that of $SHELL if absent")
    parser.set_defaults(run=_completion)


def line_for(shell: str) -> str:
    """The line that switches completion on in a shell's profile."""
    if shell == "fish":
        return "tandem completion fish | source"
    return f'eval "$(tandem completion {shell})"'


def _completion(args: argparse.Namespace) -> int:
    shell = args.shell or Path(os.environ.get("SHELL", "bash")).name
    if shell not in PROFILES:
        raise CommandError(f"{shell} is not completed; name one of {', '.join(PROFILES)}")
    if importlib.util.find_spec("argcomplete") is None:
        raise CommandError("completion needs argcomplete; pip install argcomplete")
    from argcomplete.shell_integration import shellcode

    sys.stdout.write(shellcode(["tandem"], shell=shell) + "\n")
    return 0


def complete(parser: argparse.ArgumentParser) -> None:
    """Answer the shell that asks for completions, and exit."""
    import argcomplete

    argcomplete.autocomplete(parser)


def typed_command(line: str) -> str | None:
    """The command in a line that is being typed, once a space stands behind it."""
    words = line.split(" ")
    whole = [w for w in words[1:-1] if w and not w.startswith("-")]
    return whole[0] if whole else None


def kinds(prefix: str, **_: Any) -> list[str]:
    """Kinds, each once, in the plural."""
    plural = {kind: word for word, kind in ALIASES.items() if word.endswith("s")}
    return [*plural.values(), "all"]


def names(prefix: str, parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    """Names of the running cluster's objects of the kind that was typed."""
    return _names(kinds_of(getattr(parsed_args, "kind", "") or "all"), parsed_args.cluster)


def log_names(prefix: str, parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    """What `tandem logs` takes."""
    return _names(["Pod", "WorkerPool", "Model", "Router"], parsed_args.cluster)


def _names(kinds: list[str], cluster: str | None) -> list[str]:
    from tandem_operator.local.control_socket import ControlError, ask
    from tandem_operator.local.state_dir import RunDirError, find_cluster

    try:
        answer = ask(find_cluster(cluster).socket, {"op": "list", "kinds": kinds}, timeout_s=2.0)
    except (RunDirError, ControlError):
        return []
    return [o["metadata"]["name"] for o in answer["objects"]]
