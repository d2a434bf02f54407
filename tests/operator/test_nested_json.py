"""What an apiserver takes and Python does not ends no list and no watch."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem_operator.kube.nested_json import (
    MOST_LEVELS,
    ReadableLines,
    flattened,
    read_json,
    readable,
)
from tandem_operator.plan.decode import parse
from tandem_operator.plan.objects import Problem

DEEP = b'{"a":' * 9000 + b"1" + b"}" * 9000
MODEL = b'{"kind": "Model", "metadata": {"name": "m", "namespace": "t", "uid": "u"}, "spec": %s}'
SPEC = b'{"weights": {"source": "hf://a/b"}, "unified": {"podPatch": {"spec": %s}}}'
VALUES = st.recursive(
    st.none() | st.integers() | st.text(alphabet='[]{}"\\\\é', max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=20,
)


@given(VALUES)
def test_what_is_real_is_read_as_it_is(value: Any) -> None:
    data = json.dumps(value).encode()

    assert flattened(data) == readable(data) == data
    assert read_json(data) == value


@given(VALUES, st.integers(MOST_LEVELS + 1, 3000))
def test_what_lies_too_deep_is_null_and_what_stands_beside_it_stays(
    value: Any, levels: int
) -> None:
    deep = b"[" * levels + json.dumps(value).encode() + b"]" * levels
    data = b'{"items": [%s, %s]}' % (deep, json.dumps(value).encode())

    items = json.loads(flattened(data))["items"]

    assert items[1] == value
    inner = items[0]
    while isinstance(inner, list) and len(inner) == 1:
        inner = inner[0]
    assert inner is None


@pytest.mark.parametrize("levels", [70, 250, 900, 9000])
def test_a_resource_of_it_is_refused_in_a_sentence(levels: int) -> None:
    patch = b'{"a":' * levels + b"1" + b"}" * levels

    refused = parse(read_json(MODEL % (SPEC % patch)))

    assert isinstance(refused, Problem)
    assert refused.message == "spec.unified.podPatch: nested deeper than 64 levels; flatten it"


async def test_a_watch_goes_on_after_it_however_its_bytes_come() -> None:
    lines = b'{"n": 1}\n' + DEEP + b'\n{"n": 2}\nnot JSON\n{"n": 3}\n'
    for size in (7, 1000, len(lines)):
        content = asyncio.StreamReader()
        content.iter_chunked = lambda n, content=content: pieces(content, n)  # type: ignore[attr-defined]
        content.feed_data(lines)
        content.feed_eof()

        read: Any = ReadableLines(content)  # type: ignore[arg-type]
        found = b"".join([part async for part in read.iter_chunked(size)]).split(b"\n")

        assert [found[0], found[2], found[3], found[4]] == [
            b'{"n": 1}', b'{"n": 2}', b"not JSON", b'{"n": 3}'
        ]  # fmt: skip
        assert json.loads(found[1])["a"]["a"] is not None
        assert read.at_eof()


async def pieces(content: asyncio.StreamReader, size: int) -> Any:
    while part := await content.read(size):
        yield part
