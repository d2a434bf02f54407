"""Grouped GEMM against float64: groups of every size, absent ones, gathered rows."""

import pytest
import torch

import harness
from tandem_kernels import grouped_gemm
from tandem_kernels.grouped_gemm import ROWS_PER_TILE, grouped_gemm_reference, rows_per_tile


def check(sizes, n, k, dtype, *, gathered=True):
    m = sum(sizes)
    starts = torch.tensor([0, *sizes]).cumsum(0).int().to(harness.DEVICE)
    weight = harness.randn(len(sizes), n, k, dtype=dtype, seed=1)
    rows = None
    x = harness.randn(m, k, dtype=dtype)
    if gathered:
        x = harness.randn(max(m // 2, 1), k, dtype=dtype)
        rows = torch.randint(0, len(x), (m,), generator=torch.Generator().manual_seed(2))
        rows = rows.to(harness.DEVICE)
    out = grouped_gemm(x, weight, starts, rows=rows)

    cpu = {"rows": None if rows is None else rows.cpu()}
    exact = grouped_gemm_reference(harness.wide(x), harness.wide(weight), starts.cpu(), **cpu)
    torchs = grouped_gemm_reference(x.cpu(), weight.cpu(), starts.cpu(), compute_dtype=dtype, **cpu)
    floor = 1e-6 * k**0.5 if dtype == torch.float32 else None
    harness.assert_as_exact_as_torch(out, exact, torchs, floor=floor)


@pytest.mark.parametrize("dtype", harness.DTYPES, ids=str)
@pytest.mark.parametrize("gathered", [True, False])
def check_ragged_groups(dtype, gathered):
    check((0, 1, 17, 0, 63, 64, 65, 0), 70, 100, dtype, gathered=gathered)


@pytest.mark.parametrize(
    ("sizes", "n", "k"),
    [((1,), 1, 1), ((0, 300), 130, 64), ((2, 0, 0, 0, 0, 0, 0, 1), 64, 300), ((0, 0), 17, 63)],
)
def check_awkward_sizes(sizes, n, k):
    check(sizes, n, k, torch.float32)


def check_more_groups_than_one_planning_chunk():
    check([int(i % 3 == 0) for i in range(200)], 20, 32, torch.float32)


def check_every_number_of_rows_per_tile_is_one_that_is_compiled():
    found = {rows_per_tile(m, groups) for m in range(1, 3000, 7) for groups in (1, 2, 8, 60, 128)}

    assert found == set(ROWS_PER_TILE)
