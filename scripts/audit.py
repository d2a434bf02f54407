"""Looks the images' packages up among known vulnerabilities (pip-audit); fails where one is known.

usage: audit.py [--required]

The advisories are on a network service. Where it cannot be reached, nothing was audited: that is
said, and is no failure, so that the other checks can be run anywhere; with --required it is one
(`make lint AUDIT=--required`, for a release). One package is asked for
first, so that an unreachable service costs one look-up.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LOCKS = ("operator", "router", "worker", "build")
VERSION = "2.10.1"


class NotAudited(Exception):
    """Why nothing could be looked up."""


def tool() -> Path:
    """pip-audit in an environment of its own. Raises NotAudited."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    home = Path(cache) / "tandem" / f"pip-audit-{VERSION}"
    command = home / "bin" / "pip-audit"
    if not command.exists():
        pip = [str(home / "bin" / "python"), "-m", "pip", "install", "-q"]
        try:
            subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
            subprocess.run([*pip, f"pip-audit=={VERSION}"], check=True, timeout=300)
        except (subprocess.SubprocessError, OSError) as error:
            raise NotAudited(f"pip-audit cannot be installed: {error}") from error
    return command


def looked_up(command: Path, requirements: list[str]) -> list[dict[str, Any]]:
    """What the service says of each package. Raises NotAudited."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(requirements) + "\n")
        file.flush()
        options = ["--no-deps", "--disable-pip", "--progress-spinner", "off", "-f", "json"]
        try:
            done = subprocess.run(
                [str(command), *options, "-r", file.name],
                capture_output=True,
                text=True,
                timeout=300,
            )
            found: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
        except subprocess.TimeoutExpired as error:
            raise NotAudited("the advisory service does not answer") from error
        except (ValueError, KeyError) as error:
            last = done.stderr.strip().splitlines()[-1:] or ["no reason"]
            raise NotAudited(f"the advisory service cannot be asked: {last[0]}") from error
    return found


def audit() -> list[str]:
    """Packages with known vulnerabilities, as sentences. Raises NotAudited."""
    locked: set[str] = set()
    for name in LOCKS:
        for line in (ROOT / "docker" / f"{name}.txt").read_text().splitlines():
            if "==" in line:
                locked.add(line.partition(";")[0].strip(" \\"))
    command = tool()
    (probe,) = looked_up(command, ["pip==26.3"])
    if "skip_reason" in probe:
        raise NotAudited("the advisory service knows not even pip here")
    found = looked_up(command, sorted(locked))
    skipped = [each["name"] for each in found if "skip_reason" in each]
    if skipped:
        print(f"audit: not audited: {', '.join(skipped)}", file=sys.stderr)
    return [
        f"{each['name']} {each['version']}: {flaw['id']}, fixed in "
        f"{', '.join(flaw['fix_versions']) or 'no release yet'}"
        for each in found
        for flaw in each.get("vulns", ())
    ]


def main(options: Sequence[str]) -> int:
    if unknown := [each for each in options if each != "--required"]:
        print(f"audit: {unknown[0]!r} is no option; use --required or nothing", file=sys.stderr)
        return 2
    try:
        flaws = audit()
    except NotAudited as why:
        print(f"audit: NOTHING WAS AUDITED: {why}", file=sys.stderr)
        return 1 if options else 0
    for flaw in flaws:
        print(f"audit: {flaw}", file=sys.stderr)
    return 1 if flaws else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
