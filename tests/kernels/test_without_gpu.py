"""What must work where there is no GPU, or no Triton at all."""

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


def test_the_benchmark_runs_at_toy_size():
    pytest.importorskip("triton", reason="toy runs use Triton's interpreter")

    done = run("benchmarks/kernels.py", "--toy", "--only", "elementwise,gemm,blocks")

    assert done.returncode == 0, done.stderr
    for kernel in ("add_rms_norm", "swiglu", "qk_norm_rope_write", "skinny_gemm int4"):
        assert kernel in done.stdout
    assert "say nothing about the kernels" in done.stdout


def test_the_benchmark_names_an_unknown_family():
    done = run("benchmarks/kernels.py", "--toy", "--only", "decode,guess")

    assert done.returncode == 2
    assert "--only names ['guess']; families are decode, prefill" in done.stderr
