"""How often a key was asked for lately, for many more keys than fit into the cache."""

from __future__ import annotations

import numpy as np


class FrequencySketch:
    """Count-min sketch with ageing (as TinyLFU, Einziger et al. 2017), bounded memory.

    Args:
        width: counters per row, a power of two; 4 rows of them, 4 bytes each.
        window: after this many counts all counters are halved, so that old fame fades.
    """

    def __init__(self, width: int = 2**14, window: int = 100_000) -> None:
        if width < 16 or width & (width - 1) or width > 2**16:
            raise ValueError(f"width={width} is not a power of two between 16 and 65536")
        if window < 1:
            raise ValueError(f"window={window} must be at least 1 request")
        self.window = window
        self._mask = width - 1
        self._counters = np.zeros((4, width), dtype=np.float32)
        self._counted = 0.0

    def count(self, key: bytes) -> None:
        """Count one request for a key (a hash of at least 8 bytes)."""
        for row, column in enumerate(self._columns(key)):
            self._counters[row, column] += 1.0
        self._counted += 1.0
        if self._counted >= self.window:
            self._counters *= 0.5
            self._counted *= 0.5

    def estimate(self, key: bytes) -> float:
        """Recent requests for a key; never too low, too high by collisions."""
        return float(min(self._counters[row, c] for row, c in enumerate(self._columns(key))))

    def _columns(self, key: bytes) -> tuple[int, int, int, int]:
        a, b, c, d = (int.from_bytes(key[i : i + 2], "little") for i in (0, 2, 4, 6))
        return a & self._mask, b & self._mask, c & self._mask, d & self._mask
