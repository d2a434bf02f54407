"""What both workers of a transfer must agree on: the KV cache's shape and what computed it.

No torch here: frames and reservations are checked against a layout without touching a tensor.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from tandem_worker.transfer.errors import LayoutMismatchError

DTypeName = Literal["float32", "float16", "bfloat16", "int8", "float8_e4m3fn"]

DTYPE_CODES: dict[DTypeName, int] = {
    "float32": 1,
    "float16": 2,
    "bfloat16": 3,
    "int8": 4,
    "float8_e4m3fn": 5,
}
DTYPE_BYTES: dict[DTypeName, int] = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int8": 1,
    "float8_e4m3fn": 1,
}
SCALE_BYTES: dict[DTypeName, int] = {"int8": 4}
"""What a token of a KV head has beside its values: an int8 block's codes, then 64 scales."""
DTYPE_NAMES: dict[int, DTypeName] = {code: name for name, code in DTYPE_CODES.items()}

_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class KVLayout:
    """One layer's K (and V) cache is `(num_blocks, num_kv_heads, block_size, head_dim)`.

    Of int8, a (block, head) is block_size * head_dim codes, then block_size float32 scales.

    `num_blocks` is no part of it: the two workers of a transfer may hold pools of any size.
    `weights` is the digest of the model's files (64 hex digits): blocks that other weights computed
    fit in every other respect and make wrong answers. Empty where nobody said.
    """

    num_layers: int
    num_kv_heads: int
    block_size: int
    head_dim: int
    dtype: DTypeName
    weights: str = ""

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_kv_heads", "block_size", "head_dim"):
            value = getattr(self, name)
            if not 1 <= value <= 0xFFFF:
                raise LayoutMismatchError(
                    f"KV layout {name}={value} is outside 1..65535; check the model's config.json"
                )
        if self.dtype not in DTYPE_CODES:
            raise LayoutMismatchError(
                f"KV dtype {self.dtype!r} cannot be transferred; use one of {sorted(DTYPE_CODES)}"
            )
        if self.weights and not _DIGEST.fullmatch(self.weights):
            raise LayoutMismatchError(f"weights={self.weights!r} must be 64 hex digits")

    @property
    def box_bytes(self) -> int:
        """Bytes of one block of one layer's K (the same for V)."""
        token = self.head_dim * DTYPE_BYTES[self.dtype] + SCALE_BYTES.get(self.dtype, 0)
        return self.num_kv_heads * self.block_size * token

    @property
    def unit_bytes(self) -> int:
        """Bytes of one block of one layer, K and V: the smallest thing that is pushed."""
        return 2 * self.box_bytes

    def require_equal(self, other: KVLayout, what: str) -> None:
        """Raise `LayoutMismatchError` naming the first field in which `other` differs."""
        for name in ("num_layers", "num_kv_heads", "block_size", "head_dim", "dtype"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise LayoutMismatchError(
                    f"{what} has KV {name}={theirs}, this worker has {mine}; prefill and decode "
                    "workers must serve the same model with the same dtype, kv_cache_dtype and "
                    "block size"
                )
        if self.weights != other.weights:
            raise LayoutMismatchError(
                f"{what} has the weights {_short(other.weights)}, this worker "
                f"{_short(self.weights)}; prefill and decode workers must load the same files: "
                "compare weights in their GET /v1/load and restart the older one"
            )


def _short(digest: str) -> str:
    return digest[:16] or "(unknown)"
