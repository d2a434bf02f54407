"""Says what an image installs, as a CycloneDX 1.6 bill of materials in JSON.

usage: sbom.py [operator|router|worker ...]    writes dist/tandem-IMAGE.cdx.json for each

Read from the image's lock (docker/IMAGE.txt), so it holds what is installed by hash and nothing
that happens to be on this machine.
"""

from __future__ import annotations

import json
import re
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
IMAGES = ("operator", "router", "worker")
ENTRY = re.compile(
    r"^([A-Za-z0-9._-]+)==(\S+)(?: ;\s*([^\\]*?))?\s*((?:\\\n\s+--hash=\S+\s*)+)", re.M
)


def components(lock: str) -> list[dict[str, Any]]:
    """Every package of a lock with its hashes, and where it is installed at all."""
    found = []
    for name, version, marker, hashes in ENTRY.findall(lock):
        purl = f"pkg:pypi/{name.lower().replace('_', '-')}@{version}"
        entry: dict[str, Any] = {
            "type": "library",
            "bom-ref": purl,
            "name": name,
            "version": version,
            "purl": purl,
            # One for each file of the release; the platform decides which is installed.
            "hashes": [
                {"alg": "SHA-256", "content": digest}
                for digest in re.findall(r"sha256:([0-9a-f]{64})", hashes)
            ],
        }
        if marker:
            entry["properties"] = [{"name": "tandem:marker", "value": marker.strip()}]
        found.append(entry)
    return found


def bill(image: str) -> dict[str, Any]:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    name = f"tandem/{image}"
    subject = {"type": "container", "bom-ref": name, "name": name, "version": version}
    parts = components((ROOT / "docker" / f"{image}.txt").read_text())
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": subject},
        "components": parts,
        "dependencies": [{"ref": name, "dependsOn": [part["bom-ref"] for part in parts]}],
    }


def main(images: Sequence[str]) -> int:
    for image in images or IMAGES:
        if image not in IMAGES:
            print(f"sbom: {image!r} is no image; use {', '.join(IMAGES)}", file=sys.stderr)
            return 2
        path = ROOT / "dist" / f"tandem-{image}.cdx.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(bill(image), indent=1) + "\n")
        print(path.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
