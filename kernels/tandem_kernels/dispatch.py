"""Where an operation runs: CUDA and ROCm tensors on Triton, CPU tensors on the torch reference.

Triton is optional: without it (macOS, a slim CPU image) the modules import and the references
work. With TRITON_INTERPRET=1 in the environment before the first import of triton, CPU tensors go
through the Triton kernels in its interpreter; that is how the tests run without a GPU.
"""

from __future__ import annotations

import os
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch

from .checks import KernelArgumentError


def _without_triton(function: Any = None, **options: Any) -> Any:
    """Stand in for triton.jit, so that the modules import; the result is never launched."""
    del options
    return (lambda inner: inner) if function is None else function


try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:  # pragma: no cover - triton is a dependency wherever a GPU is
    HAS_TRITON = False
    triton = SimpleNamespace(jit=_without_triton)
    tl = SimpleNamespace(constexpr=object)

__all__ = ["HAS_TRITON", "architecture", "num_processors", "runs_on_triton", "tl", "triton"]


def interpreting() -> bool:
    """True when Triton kernels run in the interpreter, on CPU tensors."""
    return HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"


def runs_on_triton(tensor: torch.Tensor) -> bool:
    """True when an operation on `tensor` is a Triton launch, False for the torch reference."""
    if tensor.is_cuda:
        if not HAS_TRITON:
            raise KernelArgumentError(
                f"tensor is on {tensor.device} but triton is not installed; "
                "install triton 3.6 or later, or move the tensors to the CPU"
            )
        return True
    if tensor.device.type == "cpu":
        return interpreting() and tensor.dtype != torch.float64
    raise KernelArgumentError(f"device {tensor.device} has no kernels; use cpu or cuda")


@lru_cache(maxsize=16)
def _facts_of(index: int) -> tuple[str, int]:
    properties: Any = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        name = str(properties.gcnArchName).split(":")[0]
    else:
        name = f"sm_{properties.major}{properties.minor}"
    return name, int(properties.multi_processor_count)


def device_facts(tensor: torch.Tensor) -> tuple[str, int]:
    """(key of the tuning tables, processors); the interpreter passes for a very small GPU."""
    return _facts_of(tensor.device.index or 0) if tensor.is_cuda else ("interpreter", 4)


def architecture(tensor: torch.Tensor) -> str:
    """Key of the tuning tables: "sm_90", "gfx942", or "interpreter" for a CPU tensor."""
    return device_facts(tensor)[0]


def num_processors(tensor: torch.Tensor) -> int:
    """Streaming multiprocessors (compute units) of the tensor's device; 4 in the interpreter."""
    return device_facts(tensor)[1]
