"""What reads somebody else's bytes: `servers` and `workers` over a connection, `files`.

Each target is a context that gives a function of bytes and its seeds. The function may refuse the
bytes with the errors of what it calls; any other exception is a finding.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]

Target = Callable[[bytes], None]


class Finding(Exception):
    """What no input may do."""
