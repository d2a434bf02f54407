"""A body's bytes as one JSON object, whatever a client sends: depth and number are bounded."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from tandem_router.errors import ApiError, bad_request

_HALF_PAIR = re.compile(rb"\\u[dD][89a-fA-F]")
# Objects and lists in one body: a conversation of 2,048 messages with parts has some 10,000.
MAX_CONTAINERS = 65_536


def parse_json(body: bytes, max_depth: int) -> dict[str, Any]:
    """The body as an object. Raises ApiError: not JSON, not an object, nested too deep."""
    try:
        data = msgspec.json.decode(body)
    except RecursionError:
        raise _too_deep(max_depth) from None
    except msgspec.MsgspecError as error:
        why = str(error)
        if "UTF-8" in why:
            raise bad_request("the request body is not UTF-8") from error
        if _HALF_PAIR.search(body):
            why = "an escape \\uD800 to \\uDFFF without its other half"
        raise bad_request(f"the request body is not valid JSON: {why}") from error
    if not isinstance(data, dict):
        raise bad_request("the request body must be a JSON object")
    if _has_many(body, max_depth):
        _check_shape(data, max_depth)
    return data


def _has_many(body: bytes, most: int) -> bool:
    """Whether more than `most` objects and lists may begin in it; a short look for a short body."""
    num = body.count(b"{")
    return num > most or num + body.count(b"[") > most


def _too_deep(max_depth: int) -> ApiError:
    return bad_request(f"the request body is nested deeper than {max_depth} levels")


def _check_shape(data: dict[str, Any], max_depth: int) -> None:
    """Raises ApiError: too deep, or too many values inside each other; stops as soon as it is."""
    depth, num_containers = 0, 0
    level: list[Any] = [data]
    while level:
        depth += 1
        num_containers += len(level)
        if depth > max_depth:
            raise _too_deep(max_depth)
        if num_containers > MAX_CONTAINERS:
            raise bad_request(f"the request body has more than {MAX_CONTAINERS} objects and lists")
        below: list[Any] = []
        for value in level:
            inside = value.values() if isinstance(value, dict) else value
            below.extend(each for each in inside if isinstance(each, dict | list))
        level = below
