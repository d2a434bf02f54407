"""Which requests may share an answer: exact match of everything that shapes it, per tenant."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

# Fields that change how an answer travels or is billed, not what it says.
_TRANSPORT = frozenset({"stream", "stream_options", "user", "metadata", "store", "tandem"})


def cache_key(salt: bytes, tenant: str, body: Mapping[str, Any]) -> bytes | None:
    """Key of a request's answer, 32 bytes; None when its answer must not be reused.

    Reused is what would come out the same again: temperature 0, or a given seed, and one choice.
    The salt is the router's secret and the tenant is part of the hash, so that one tenant can
    neither hit nor probe (by timing) what another asked.

    Args:
        salt: secret bytes, at least 16.
        tenant: tenant name; "" where there are none.
        body: the parsed OpenAI request.

    Raises:
        ValueError: the salt is too short.
    """
    if len(salt) < 16:
        raise ValueError(f"the cache salt has {len(salt)} bytes; give at least 16 random ones")
    temperature, seed = body.get("temperature"), body.get("seed")
    if (temperature is None or temperature != 0) and seed is None:
        return None
    if body.get("n") not in (None, 1):
        return None
    shaping = {name: value for name, value in body.items() if name not in _TRANSPORT}
    try:
        text = json.dumps([tenant, shaping], sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError):
        return None
    key = hashlib.sha256(salt).digest()
    return hashlib.blake2b(text.encode("utf-8", "replace"), key=key, digest_size=32).digest()
