"""Reads the apiserver's audit log: what a ServiceAccount asked for and what it was told."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

READS = ("get", "list", "watch")


@dataclass(frozen=True)
class Request:
    """One request; resource holds the subresource after a slash, name is "" for a collection."""

    user: str
    verb: str
    group: str
    resource: str
    name: str
    namespace: str
    uri: str
    status: int
    manager: str

    @property
    def writes(self) -> bool:
        return self.verb not in READS

    def verbs(self) -> tuple[str, ...]:
        """The verbs that it takes: a server-side apply that makes an object needs create too."""
        created = self.verb == "patch" and self.status == 201
        return (self.verb, "create") if created else (self.verb,)


def requests(run_dir: Path, namespace: str, account: str) -> list[Request]:
    """The finished requests of a ServiceAccount so far, in order."""
    user = f"system:serviceaccount:{namespace}:{account}"
    return [r for r in _events(run_dir / "audit.log") if r.user == user]


def _events(log: Path) -> Iterator[Request]:
    for line in log.read_text().splitlines():
        event = json.loads(line)
        about = event.get("objectRef")
        if about is None or event["stage"] not in ("ResponseComplete", "ResponseStarted"):
            continue
        if event["stage"] == "ResponseStarted" and event["verb"] != "watch":
            continue
        sub = about.get("subresource")
        yield Request(
            user=event["user"]["username"],
            verb=event["verb"],
            group=about.get("apiGroup", ""),
            resource=about["resource"] + (f"/{sub}" if sub else ""),
            name=about.get("name", ""),
            namespace=about.get("namespace", ""),
            uri=event["requestURI"],
            status=event["responseStatus"]["code"],
            manager=event.get("userAgent", ""),
        )
