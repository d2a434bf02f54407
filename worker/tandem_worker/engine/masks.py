"""The rows of a step that cannot be drawn freely: masks computed beside the forward pass.

Masks need only tokens that are known before the step, so they are computed in other threads while
the model runs, and meet the logits afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from tandem_worker.engine.constraints import GrammarError
from tandem_worker.engine.drawn import Failed
from tandem_worker.engine.requests import Work

_NUM_THREADS = 2


class MaskBuilder:
    """Starts the masks of each step.

    Args:
        device: Where logits are.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._threads: ThreadPoolExecutor | None = None

    def begin(self, work: Sequence[Work]) -> PendingMasks:
        """Start computing the masks of the sequences that draw in this step."""
        drawing = [item.request for item in work if item.draws]
        pending: dict[int, Future[bytes]] = {}
        for row, request in enumerate(drawing):
            if request.constraint is None:
                continue
            if self._threads is None:
                self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="masks")
            sequence = request.sequence
            pending[row] = self._threads.submit(
                request.constraint.mask, sequence.token_ids, sequence.num_prompt_tokens
            )
        return PendingMasks(pending, self._device)


class PendingMasks:
    """The masks of one step."""

    def __init__(self, pending: dict[int, Future[bytes]], device: torch.device) -> None:
        self._pending = pending
        self._device = device

    def finish(self, logits: torch.Tensor) -> tuple[torch.Tensor | None, dict[int, Failed]]:
        """The tokens allowed, ``(rows, vocab)`` bool or None for all, and rows without any.

        A row whose logits are not finite has no token either.
        """
        # The maximum of a row with a NaN is NaN.
        peaks = torch.isfinite(logits.amax(-1)).tolist()
        failures = {
            row: Failed(
                "the model's logits are not finite; the prompt may overflow this dtype, or the "
                "weights are broken",
                code="logits_not_finite",
            )
            for row, is_finite in enumerate(peaks)
            if not is_finite
        }
        masks: dict[int, bytes] = {}
        for row, future in self._pending.items():
            try:
                masks[row] = future.result()
            except GrammarError as error:
                failures[row] = Failed(
                    "the format that this request asks for (response_format, guided fields or "
                    f"tools) cannot be gone on with: {error}; simplify its schema or grammar",
                    code="grammar_dead_end",
                    status=400,
                )
        if not masks:
            return None, failures
        num_rows, vocab = logits.shape
        packed = np.full((num_rows, len(next(iter(masks.values())))), 0xFF, dtype=np.uint8)
        for row, mask in masks.items():
            packed[row] = np.frombuffer(mask, dtype=np.uint8)
        allowed = torch.from_numpy(np.unpackbits(packed, axis=1, bitorder="little")[:, :vocab])
        return allowed.to(self._device).bool(), failures
