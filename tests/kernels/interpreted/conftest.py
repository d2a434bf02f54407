"""Prepare a process that checks the Triton kernels against float64.

These checks need TRITON_INTERPRET=1 before triton is imported, so ../test_interpreted.py runs them
in processes of their own; their files are called check_*.py to stay out of a plain `pytest`.
On a GPU: TANDEM_KERNELS_DEVICE=cuda pytest -o python_files='check_*.py' tests/kernels/interpreted
"""

import harness

if harness.DEVICE == "cpu":
    harness.patch_interpreter()
