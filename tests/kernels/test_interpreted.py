"""The Triton kernels, in Triton's interpreter, against float64: each check file in a process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="kernels are interpreted only where triton is installed")

# numpy computes for the interpreter, and warns of infinities and NaN as no GPU does.
NO_NUMPY_WARNING = "ignore::RuntimeWarning"
FOLDER = Path(__file__).parent / "interpreted"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("check_*.py")), ids=lambda path: path.stem)
def test_kernels_agree_with_float64_in_the_interpreter(path):
    """TRITON_INTERPRET must be set before triton is imported, hence the process."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_ADDOPTS"):
        environment.pop(name, None)

    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-x", "--import-mode=importlib", "--no-header",
            "-p", "no:cacheprovider", "-W", NO_NUMPY_WARNING, "-p", "no:xdist", "-o", "addopts=",
            "-o", "python_files=check_*.py", "-o", "python_functions=check_*", str(path),
        ],
        env=environment, capture_output=True, text=True, timeout=600,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip

    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
