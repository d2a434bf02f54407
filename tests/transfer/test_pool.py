"""A KV pool's byte views, and the caches it refuses."""

from __future__ import annotations

import pytest
import torch

from tandem_worker.transfer import KVPool
from tandem_worker.transfer.errors import BlockConflictError, LayoutMismatchError
from transfer_kit import LAYOUT, random_pool

K = torch.zeros(4, 2, 64, 8)


@pytest.mark.parametrize("staged", [False, True])
def test_bytes_read_are_the_bytes_written_in_wire_order(staged: bool) -> None:
    k, v = torch.randn(6, 2, 64, 8), torch.randn(6, 2, 64, 8)
    pool = KVPool([(k, v)], staged=staged)

    data = pool.get_bytes(0, [4, 5, 1])

    expected = torch.cat([k[[4, 5, 1]].flatten(), v[[4, 5, 1]].flatten()])
    assert data == expected.numpy().tobytes()
    pool.put_bytes(0, [0, 2, 3], data)
    assert torch.equal(k[[0, 2, 3]], k[[4, 5, 1]])
    assert torch.equal(v[[0, 2, 3]], v[[4, 5, 1]])


def test_neighbouring_blocks_share_a_view_and_the_view_is_the_cache() -> None:
    k, v = torch.zeros(6, 2, 64, 8), torch.zeros(6, 2, 64, 8)
    pool = KVPool([(k, v)])

    views = pool.gather(0, [1, 2, 3, 5])
    k[2] = 1

    assert [len(view) // pool.layout.box_bytes for view in views] == [3, 1, 3, 1]
    assert 1.0 in views[0].cast("f")


@pytest.mark.parametrize(
    ("caches", "text"),
    [
        ([], "at least one layer"),
        ([(torch.zeros(4, 8), torch.zeros(4, 8))], "expected .num_blocks"),
        ([(K.long(), K.long())], "int64"),
        ([(K, K[:2])], "v_cache of layer 0"),
        ([(K, K), (K, K.half())], "v_cache of layer 1"),
        ([(K, K.transpose(1, 2))], "v_cache of layer 0"),
        ([(K.expand(4, 2, 64, 8)[:, :, ::2], K[:, :, ::2])], "contiguous: False"),
    ],
)
def test_caches_that_cannot_be_transferred_are_refused_and_named(
    caches: list[tuple[torch.Tensor, torch.Tensor]], text: str
) -> None:
    with pytest.raises(LayoutMismatchError, match=text):
        KVPool(caches)


def test_blocks_and_layers_outside_the_pool_are_named() -> None:
    pool = random_pool(3)

    with pytest.raises(BlockConflictError, match=r"block 3 is outside 0\.\.2"):
        pool.gather(0, [1, 3])
    with pytest.raises(BlockConflictError, match=r"layer 3 is outside 0\.\.2"):
        pool.scatter(3, [1])
    with pytest.raises(LayoutMismatchError, match=f"expected {LAYOUT.unit_bytes}"):
        pool.put_bytes(0, [1], b"short")
