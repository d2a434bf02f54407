"""How a worker's KV cache tensors look to a transfer: byte views of (layer, block) boxes.

On the CPU a box `(num_kv_heads, block_size, head_dim)` is contiguous, so sockets read from and
write to the cache itself. Neighbouring block ids become one view. On another device the boxes are
staged through host memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from tandem_worker.transfer.errors import BlockConflictError, LayoutMismatchError
from tandem_worker.transfer.layout import DTYPE_CODES, SCALE_BYTES, DTypeName, KVLayout

_TORCH_NAMES: dict[torch.dtype, DTypeName] = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.int8: "int8",
    torch.float8_e4m3fn: "float8_e4m3fn",
}
_TORCH_DTYPES = {name: dtype for dtype, name in _TORCH_NAMES.items()}


def torch_dtype(name: DTypeName) -> torch.dtype:
    """The torch dtype of a layout's dtype name."""
    return _TORCH_DTYPES[name]


@dataclass(frozen=True)
class ScatterTarget:
    """Writable memory for one frame: fill `views` in order, then call `commit`.

    On the CPU the views are the cache itself and `commit` does nothing.
    """

    views: list[memoryview]
    commit: Callable[[], None]


def _contiguous_runs(block_ids: Sequence[int]) -> list[tuple[int, int]]:
    """`[4, 5, 6, 9]` -> `[(4, 7), (9, 10)]`: fewer, longer views."""
    runs: list[tuple[int, int]] = []
    for block in block_ids:
        if runs and runs[-1][1] == block:
            runs[-1] = (runs[-1][0], block + 1)
        else:
            runs.append((block, block + 1))
    return runs


def _byte_view(tensor: torch.Tensor) -> memoryview:
    # numpy has no bfloat16, hence bytes; the view shares memory with the tensor
    return memoryview(tensor.view(torch.uint8).numpy().data).cast("B")


class KVPool:
    """The KV cache of one worker, one `(k_cache, v_cache)` pair per layer.

    Each tensor is contiguous, `(num_blocks, num_kv_heads, block_size, head_dim)`, all of one shape,
    dtype and device; int8 ones have four more bytes a token, for its scale. Raises
    `LayoutMismatchError` otherwise.

    `weights` is the digest of the files that the model computing the blocks was loaded from.
    `staged` sends blocks through host memory; the default does where the host cannot address the
    cache. On CUDA, `gather` copies on the current stream of the calling thread and waits for it:
    compute on the default stream, or synchronise before pushing.
    """

    def __init__(
        self,
        caches: Sequence[tuple[torch.Tensor, torch.Tensor]],
        *,
        weights: str = "",
        staged: bool | None = None,
    ) -> None:
        if not caches:
            raise LayoutMismatchError("a KV pool needs at least one layer, got none")
        first = caches[0][0]
        if first.dim() != 4:
            raise LayoutMismatchError(
                f"KV cache of layer 0 has shape {tuple(first.shape)}; expected "
                "(num_blocks, num_kv_heads, block_size, head_dim)"
            )
        if first.dtype not in _TORCH_NAMES:
            raise LayoutMismatchError(
                f"KV dtype {first.dtype} cannot be transferred; use one of {sorted(DTYPE_CODES)}"
            )
        for layer, pair in enumerate(caches):
            for name, tensor in zip("kv", pair, strict=True):
                same = (tensor.shape, tensor.dtype, tensor.device) == (
                    first.shape,
                    first.dtype,
                    first.device,
                )
                if not same or not tensor.is_contiguous():
                    raise LayoutMismatchError(
                        f"{name}_cache of layer {layer} is {tuple(tensor.shape)} {tensor.dtype} on "
                        f"{tensor.device} (contiguous: {tensor.is_contiguous()}), layer 0 is "
                        f"{tuple(first.shape)} {first.dtype} on {first.device}; all caches must be "
                        "alike and contiguous"
                    )
        self.caches = list(caches)
        self.num_blocks = int(first.shape[0])
        dtype = _TORCH_NAMES[first.dtype]
        self.layout = KVLayout(
            num_layers=len(caches),
            num_kv_heads=int(first.shape[1]),
            block_size=int(first.shape[2]),
            head_dim=int(first.shape[3]) - SCALE_BYTES.get(dtype, 0),
            dtype=dtype,
            weights=weights,
        )
        self.device = first.device
        self._bytes: list[tuple[memoryview, memoryview]] | None = None
        if not (first.device.type != "cpu" if staged is None else staged):
            self._bytes = [(_byte_view(k), _byte_view(v)) for k, v in caches]

    @classmethod
    def allocate(cls, layout: KVLayout, num_blocks: int) -> KVPool:
        """A zeroed pool in host memory."""
        width = layout.head_dim + SCALE_BYTES.get(layout.dtype, 0)
        shape = (num_blocks, layout.num_kv_heads, layout.block_size, width)
        dtype = torch_dtype(layout.dtype)
        return cls(
            [
                (torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype))
                for _ in range(layout.num_layers)
            ],
            weights=layout.weights,
        )

    def check(self, layer: int, block_ids: Sequence[int]) -> None:
        """Raise `BlockConflictError` unless the layer and all blocks lie inside the pool."""
        if not 0 <= layer < self.layout.num_layers:
            raise BlockConflictError(
                f"layer {layer} is outside 0..{self.layout.num_layers - 1} of this KV pool"
            )
        for block in block_ids:
            if not 0 <= block < self.num_blocks:
                raise BlockConflictError(
                    f"block {block} is outside 0..{self.num_blocks - 1} of this KV pool"
                )

    def gather(self, layer: int, block_ids: Sequence[int]) -> list[memoryview]:
        """The bytes of K of all blocks, then V of all blocks, to be read in order.

        CPU: views of the cache itself, so the blocks must not change before the bytes are sent.
        """
        self.check(layer, block_ids)
        if self._bytes is not None:
            return self._views(layer, block_ids)
        index = torch.as_tensor(list(block_ids), dtype=torch.int64, device=self.device)
        # As bytes: torch has no such copies of every type.
        staged = [
            cache.view(torch.uint8).index_select(0, index).cpu() for cache in self.caches[layer]
        ]
        return [_byte_view(tensor) for tensor in staged]

    def scatter(self, layer: int, block_ids: Sequence[int]) -> ScatterTarget:
        """Memory for the bytes of K of all blocks, then V of all blocks."""
        self.check(layer, block_ids)
        if self._bytes is not None:
            return ScatterTarget(self._views(layer, block_ids), _nothing)
        box = self.caches[layer][0].view(torch.uint8).shape[1:]
        staged = [torch.empty((len(block_ids), *box), dtype=torch.uint8) for _ in range(2)]

        def commit() -> None:
            index = torch.as_tensor(list(block_ids), dtype=torch.int64, device=self.device)
            for cache, host in zip(self.caches[layer], staged, strict=True):
                cache.view(torch.uint8).index_copy_(0, index, host.to(self.device))
            if self.device.type == "cuda":
                # the engine's stream reads these blocks as soon as the reservation completes
                torch.cuda.current_stream(self.device).synchronize()

        return ScatterTarget([_byte_view(tensor) for tensor in staged], commit)

    def get_bytes(self, layer: int, block_ids: Sequence[int]) -> bytes:
        """A copy of the blocks' bytes in wire order (K of all blocks, then V of all blocks)."""
        return b"".join(self.gather(layer, block_ids))

    def put_bytes(self, layer: int, block_ids: Sequence[int], data: bytes) -> None:
        """Write bytes in wire order into the blocks."""
        expected = len(block_ids) * self.layout.unit_bytes
        if len(data) != expected:
            raise LayoutMismatchError(
                f"{len(data)} bytes for {len(block_ids)} blocks of layer {layer}; expected "
                f"{expected}"
            )
        target = self.scatter(layer, block_ids)
        offset = 0
        for view in target.views:
            view[:] = data[offset : offset + len(view)]
            offset += len(view)
        target.commit()

    def boxes(self, layer: int) -> tuple[memoryview, memoryview]:
        """All bytes of a layer's K and V in host memory."""
        assert self._bytes is not None
        return self._bytes[layer]

    def _views(self, layer: int, block_ids: Sequence[int]) -> list[memoryview]:
        assert self._bytes is not None
        size = self.layout.box_bytes
        runs = _contiguous_runs(block_ids)
        return [
            cache[start * size : stop * size]
            for cache in self._bytes[layer]
            for start, stop in runs
        ]


def _nothing() -> None:
    return None
