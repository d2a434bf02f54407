"""Where the workers are: a table of base URLs per tier and role, from a file that is watched.

The file is JSON, `{"tiers": {"<tier>": {"<role>": ["http://host:port", ...]}}}`; a tier without a
worker is scaled to zero, and one that is not named is gone. A broken or
half-written file keeps the last good table: losing every worker to a typo would be worse.
`kubernetes_discovery.py` fills the same table from Kubernetes.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, get_args
from urllib.parse import urlsplit

from tandem_router.errors import ConfigError

logger = logging.getLogger("tandem.router")

Role = Literal["unified", "prefill", "decode"]
ROLES: tuple[Role, ...] = get_args(Role)
EndpointTable = Mapping[str, Mapping[Role, tuple[str, ...]]]

MAX_FILE_BYTES = 4 * 2**20


def parse_endpoints(text: bytes, source: str = "endpoints") -> EndpointTable:
    """Parse and check the file's text. Raises ConfigError that names the entry."""
    if len(text) > MAX_FILE_BYTES:
        raise ConfigError(f"{source}: larger than {MAX_FILE_BYTES} bytes")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{source} is not JSON: {error}") from error
    tiers = data.get("tiers") if isinstance(data, dict) else None
    if not isinstance(tiers, dict):
        raise ConfigError(f'{source}: expected {{"tiers": {{...}}}}')
    table: dict[str, dict[Role, tuple[str, ...]]] = {}
    for tier, roles in tiers.items():
        if not isinstance(roles, dict):
            raise ConfigError(f"{source}: tiers.{tier} is not an object of roles")
        table[tier] = {}
        for role, urls in roles.items():
            if role not in ROLES:
                raise ConfigError(
                    f"{source}: tiers.{tier}.{role} is not a role; use {', '.join(ROLES)}"
                )
            if not isinstance(urls, list):
                raise ConfigError(f"{source}: tiers.{tier}.{role} is not a list of URLs")
            table[tier][role] = tuple(dict.fromkeys(_checked(url, source) for url in urls))
    return table


def _checked(url: object, source: str) -> str:
    text = url.rstrip("/") if isinstance(url, str) else ""
    try:
        parts = urlsplit(text)
        good = parts.scheme in ("http", "https") and parts.hostname and not parts.path
        _ = parts.port
    except ValueError:
        good = False
    if not good:
        raise ConfigError(f"{source}: {url!r} is not a base URL like http://10.0.0.5:8100")
    return text


Stamp = tuple[int, int, int]


def _read_if_changed(path: Path, seen: Stamp | None) -> tuple[Stamp, bytes] | None:
    stat = path.stat()
    stamp = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
    return None if stamp == seen else (stamp, path.read_bytes())


async def watch_file(path: Path, poll_s: float, on_table: Callable[[EndpointTable], None]) -> None:
    """Hand over the table at the start and after every change of the file; runs until cancelled."""
    seen: Stamp | None = None
    complained = ""
    while True:
        try:
            changed = _read_if_changed(path, seen)
            if changed is not None:
                seen, text = changed
                table = parse_endpoints(text, str(path))
                complained = ""
                on_table(table)
        except (OSError, ConfigError) as error:
            # Said once per cause: a file that appears after the router does is normal.
            if str(error) != complained:
                complained = str(error)
                logger.warning("endpoints not updated: %s", error)
        await asyncio.sleep(poll_s)
