"""Every kernel variant compiles for each GPU we name, and takes what the committed table says."""

import json
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="kernels are compiled only where triton is installed")
import bytes_in_flight as bounds
import compile_target
import triton

COMMITTED = json.loads(compile_target.TABLE.read_text())
# What older compilers spill: registers by triton's minor version, target and kernel.
OLDER_SPILLS = {("3.6", "gfx942"): {"prefill 28/4 d128 fp8 | prefill_kernel": 2}}


@pytest.mark.parametrize("target", compile_target.TARGETS)
def test_compiled_resources_are_those_of_the_committed_table(target):
    table = compile_target.run_in_process(target)

    expected = OLDER_SPILLS.get((triton.__version__.rpartition(".")[0], target), {})
    assert {name: row["spills"] for name, row in table.items() if row["spills"]} == expected, (
        f"kernels spill registers on {target}"
    )
    if triton.__version__ != COMMITTED["triton"]:
        # Another compiler allocates differently; that it compiles without spills is the point.
        assert set(table) == set(COMMITTED[target])
        return
    assert table == COMMITTED[target], (
        "resources changed; if meant, run: python tests/kernels/compiled/compile_target.py --write"
    )


@pytest.mark.parametrize("target", compile_target.TARGETS)
def test_matrix_kernels_use_the_tensor_cores(target):
    matrix = ("decode_kernel", "prefill_kernel", "list_kernel", "weights_kernel", "votes_kernel")

    without = [
        name
        for name, row in COMMITTED[target].items()
        if name.endswith(matrix) or (name.startswith("skinny_gemm") and name.endswith("| kernel"))
        if not row["tensor_core"]
    ]

    assert without == []


@pytest.mark.parametrize("target", compile_target.TARGETS)
def test_two_decode_programs_fit_one_processor(target):
    shared_bytes = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64}[target] * 1024

    row = COMMITTED[target]["decode 28/4 d128 | decode_kernel"]

    assert 2 * row["shared"] <= shared_bytes


@pytest.mark.parametrize("name", sorted(filter(bounds.streams, COMMITTED["sm_90"])))
def test_enough_bytes_are_in_flight_on_an_h200(name):
    """As many as Little's law asks of each processor; the sampler's noise takes registers."""
    row = COMMITTED["sm_90"][name]

    on_their_way = row["in_flight"][1] * bounds.programs(name, row)

    assert on_their_way >= (0.9 if "draw" in name else 1.0) * bounds.NEEDED


@pytest.mark.parametrize(
    "name", [name for name in COMMITTED["sm_90"] if name.startswith(("decode", "skinny_gemm"))]
)
def test_two_programs_of_a_split_kernel_share_a_processor_of_an_h200(name):
    assert bounds.resident_programs(COMMITTED["sm_90"][name]) >= 2


def test_the_documented_bound_is_the_computed_one():
    text = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text()

    assert bounds.document(COMMITTED["sm_90"]) in text, (
        "rewrite the table: python tests/kernels/compiled/compile_target.py --write"
    )
