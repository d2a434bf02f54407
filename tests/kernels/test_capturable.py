"""Every operation can be captured in a CUDA graph: nothing on its GPU path looks at a value.

The operations run on fake CUDA tensors, which have a shape and no values: a host read (`item`,
`tolist`, a branch on a tensor), or an allocation whose size depends on values, raises. Copies
between host and device, which a capture forbids as well, are refused here.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton", reason="GPU paths launch Triton kernels")

import compile_target

from tandem_kernels import (
    dispatch,
    gumbel_noise,
    kv_block_copy,
    kv_block_scatter,
    pool_votes,
    reset_page_bounds,
    sample,
    select_keys,
    select_pages,
)


class HostCopyError(AssertionError):
    """A tensor crossed between host and device."""


class NoHostCopies(TorchDispatchMode):
    """Refuse operations whose tensors live on more than one device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if torch.is_tensor(leaf)]
        if len({tensor.device.type for tensor in tensors}) > 1:
            raise HostCopyError(f"{func} copies between host and device")
        return out


@pytest.fixture
def launches(monkeypatch):
    """The kernels launched, by name; a GPU is pretended."""
    from triton.runtime.jit import JITFunction

    found = []

    def record(self, *args, grid, warmup, **kwargs):
        assert all(isinstance(size, int) for size in grid)
        found.append(self.__name__)

    monkeypatch.setattr(JITFunction, "run", record)
    monkeypatch.setattr(dispatch, "device_facts", lambda tensor: ("sm_90", 132))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    return found


def on_a_fake_gpu(call):
    with FakeTensorMode(), torch.device("cuda"), NoHostCopies():
        return call()


@pytest.mark.parametrize("name", [name for name, _ in compile_target.calls("sm_90")])
def test_launchers_never_look_at_values(name, launches):
    on_a_fake_gpu(lambda: dict(compile_target.calls("sm_90"))[name]())

    assert launches


def _sampler_with_top_logprobs():
    row = torch.ones(3)
    sample(
        torch.zeros(3, 50), temperature=row, seeds=row.long(), positions=row.long(),
        num_top_logprobs=4,
    )  # fmt: skip


TORCH_PARTS = {
    "select_pages": lambda: select_pages(torch.zeros(3, 2, 9), torch.ones(3).int(), 4),
    "select_keys": lambda: select_keys(
        torch.zeros(3, 2, 5), torch.zeros(2, 40).int(), torch.ones(3).int(), 16, threshold=0.1
    ),
    "reset_page_bounds": lambda: reset_page_bounds(
        torch.zeros(4, 2, 8), torch.zeros(4, 2, 8), torch.arange(2)
    ),
    "pool_votes": lambda: pool_votes(torch.zeros(2, 2, 64)),
    "gumbel_noise": lambda: gumbel_noise(torch.arange(2), torch.arange(2), 10),
    "sample with top log-probabilities": _sampler_with_top_logprobs,
    "kv_block_scatter": lambda: kv_block_scatter(
        torch.zeros(2, 8), torch.zeros(4, 8), torch.arange(2)
    ),
    "kv_block_copy": lambda: kv_block_copy(torch.zeros(4, 8), torch.arange(2), torch.arange(2)),
}


@pytest.mark.parametrize("name", TORCH_PARTS)
def test_the_parts_in_torch_never_look_at_values(name, launches):
    on_a_fake_gpu(TORCH_PARTS[name])


@pytest.mark.parametrize(
    "look",
    [
        lambda x: x[0].item(),
        lambda x: x.tolist(),
        lambda x: bool(x[0] > 0),
        lambda x: int(x.max()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.cpu(),
        lambda x: torch.empty(2, device="cpu").copy_(x[:2]),
        lambda x: x.copy_(torch.zeros(4, device="cpu")),
    ],
)
def test_the_fake_gpu_refuses_to_be_looked_at(look):
    refused = (DataDependentOutputException, DynamicOutputShapeException, HostCopyError)

    with pytest.raises(refused):
        on_a_fake_gpu(lambda: look(torch.zeros(4)))
