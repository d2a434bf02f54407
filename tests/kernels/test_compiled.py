"""Every kernel variant compiles for each GPU we name, and takes what the committed table says."""

import importlib.util
import json
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="kernels are compiled only where triton is installed")
import triton

_path = Path(__file__).parent / "compiled" / "compile_target.py"
_spec = importlib.util.spec_from_file_location("compile_target", _path)
compile_target = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(compile_target)

COMMITTED = json.loads(compile_target.TABLE.read_text())


@pytest.mark.parametrize("target", compile_target.TARGETS)
def test_compiled_resources_are_those_of_the_committed_table(target):
    table = compile_target.run_in_process(target)

    assert {name: row["spills"] for name, row in table.items() if row["spills"]} == {}, (
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
