"""What penalties and biases need per row and token, kept on the device from step to step.

Tables of ``(rows, vocab)`` are megabytes; made anew they took longer than the rest of a step's
drawing. As long as the same requests draw, a step adds its new tokens; when some come or go, the
rows of those that stay are copied.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tandem_worker.engine.requests import EngineRequest


class RowTables:
    """The tables of the requests that drew last.

    Args:
        vocab_size: Columns.
        device: Where logits are.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._drew: list[EngineRequest] = []
        self._counted: list[int] = []
        self._prompts, self._counts = self._empty(0, torch.bool), self._empty(0, torch.int32)
        self._biased: list[tuple[EngineRequest, bool]] = []
        self._biases: torch.Tensor | None = None

    def history(self, requests: Sequence[EngineRequest]) -> tuple[torch.Tensor, torch.Tensor]:
        """Which tokens each prompt holds, bool, and how often each answer has them, int32.

        Rows without penalties are zero. The tensors are read until the next call.
        """
        if not _same(self._drew, requests):
            self._exchange(requests)
        rows: list[int] = []
        tokens: list[int] = []
        for row, request in enumerate(requests):
            if not request.sampling.has_penalties:
                continue
            ids, counted = request.sequence.token_ids, self._counted[row]
            if len(ids) > counted:
                tokens += ids[counted:]
                rows += [row] * (len(ids) - counted)
                self._counted[row] = len(ids)
        if tokens:
            at = (self._int64(rows), self._int64(tokens))
            one = torch.ones((), dtype=torch.int32, device=self._device)
            self._counts.index_put_(at, one, accumulate=True)
        return self._prompts, self._counts

    def bias(
        self, requests: Sequence[EngineRequest], end_token_ids: frozenset[int]
    ) -> torch.Tensor | None:
        """What is added to each logit, float32, or None where nothing is; not to be changed.

        No answer may hold one of ``end_token_ids`` before its ``min_tokens``.
        """
        if not any(r.sampling.logit_bias or r.sampling.min_tokens for r in requests):
            return None
        # A row changes only when its answer is long enough to end.
        wanted = [(r, r.num_generated < r.sampling.min_tokens) for r in requests]
        kept = self._biases
        if kept is not None and len(wanted) == len(self._biased):
            pairs = zip(wanted, self._biased, strict=True)
            if all(new[0] is old[0] and new[1] == old[1] for new, old in pairs):
                return kept
        table = self._empty(len(requests), torch.float32)
        for row, (request, too_short) in enumerate(wanted):
            for token, value in request.sampling.logit_bias:
                table[row, token] += value
            if too_short:
                ends = {*request.sampling.stop_token_ids, *end_token_ids}
                table[row, self._int64([t for t in ends if t < self._vocab_size])] = -torch.inf
        self._biased, self._biases = wanted, table
        return table

    def _exchange(self, requests: Sequence[EngineRequest]) -> None:
        before = {id(request): row for row, request in enumerate(self._drew)}
        counted = self._counted
        prompts = self._empty(len(requests), torch.bool)
        counts = self._empty(len(requests), torch.int32)
        self._counted = []
        for row, request in enumerate(requests):
            sequence, old = request.sequence, before.get(id(request))
            if old is not None:
                prompts[row], counts[row] = self._prompts[old], self._counts[old]
                self._counted.append(counted[old])
                continue
            if request.sampling.has_penalties:
                ids = sequence.token_ids[: sequence.num_prompt_tokens]
                prompts[row, self._int64(ids)] = True
            self._counted.append(sequence.num_prompt_tokens)
        self._drew, self._prompts, self._counts = list(requests), prompts, counts

    def _empty(self, rows: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros((rows, self._vocab_size), dtype=dtype, device=self._device)

    def _int64(self, values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)


def _same(left: Sequence[EngineRequest], right: Sequence[EngineRequest]) -> bool:
    return len(left) == len(right) and all(a is b for a, b in zip(left, right, strict=True))
