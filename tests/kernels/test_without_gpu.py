"""What must work where there is no GPU, or no Triton at all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*command, **environment):
    return subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_references_work_without_triton():
    """sys.modules[...] = None makes the import fail, as on a machine without triton."""
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, tandem_kernels\n"
        "print(tandem_kernels.swiglu(torch.ones(1, 4)).shape)"
    )

    done = run("-c", program)

    assert done.stdout.strip() == "torch.Size([1, 2])", done.stderr


def test_the_benchmark_runs_at_toy_size(tmp_path):
    pytest.importorskip("triton", reason="toy runs use Triton's interpreter")

    """Every family, in the patched interpreter; the file has a row for each printed one."""
    program = (
        "import runpy, sys; sys.path.insert(0, 'tests/kernels/interpreted')\n"
        "import harness; harness.patch_interpreter()\n"
        "sys.argv = ['kernels.py', '--toy', '--results', sys.argv[1]]\n"
        "runpy.run_path('benchmarks/kernels.py', run_name='__main__')"
    )

    done = run("-c", program, str(tmp_path), TRITON_INTERPRET="1")

    assert done.returncode == 0, done.stderr
    [path] = tmp_path.glob("kernels-interpreter-*.json")
    report = json.loads(path.read_text())
    kernels = {row["kernel"].split()[0] for row in report["rows"]}
    assert kernels == {
        "add_rms_norm", "centroid_weights", "decode", "key_list_attention", "kv_block_copy",
        "kv_block_gather", "kv_block_scatter", "page_list_attention", "page_scores", "prefill",
        "qk_norm_rope_write", "sample", "skinny_gemm", "snapkv_votes", "swiglu",
    }  # fmt: skip
    assert all(row["kernel"] in done.stdout for row in report["rows"])
    assert all(row["fraction_of_ceiling"] > 0 for row in report["rows"])
    assert "say nothing about the kernels" in done.stdout


def test_the_benchmark_names_an_unknown_family():
    done = run("benchmarks/kernels.py", "--toy", "--only", "decode,guess")

    assert done.returncode == 2
    assert "--only names ['guess']; families are decode, prefill" in done.stderr
