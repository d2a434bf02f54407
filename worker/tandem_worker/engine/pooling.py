"""One vector from a prompt's hidden states: the last token's, the first's, or the mean."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tandem_worker.engine.drawn import Failed, Pooled
from tandem_worker.models.embedding_settings import PoolingKind


@dataclass(slots=True)
class Pooling:
    """The pooling of one sequence, chunk by chunk; in float32."""

    kind: PoolingKind
    total: torch.Tensor | None = None
    num_tokens: int = 0

    def restart(self) -> None:
        """Forget what was added: the sequence begins again."""
        self.total, self.num_tokens = None, 0

    def add(self, hidden: torch.Tensor) -> None:
        """Take a chunk's hidden states, ``(num_tokens, hidden_size)``."""
        if self.kind == "last":
            self.total, self.num_tokens = hidden[-1].float(), 1
            return
        if self.kind == "cls":
            if self.total is None:
                self.total, self.num_tokens = hidden[0].float(), 1
            return
        part = hidden.float().sum(0)
        self.total = part if self.total is None else self.total + part
        self.num_tokens += hidden.shape[0]

    def finish(self) -> Pooled | Failed:
        """The vector, not normalised."""
        assert self.total is not None
        vector = self.total / self.num_tokens
        if not bool(torch.isfinite(vector).all()):
            return Failed(
                "the model's hidden states are not finite; the input may overflow this dtype, or "
                "the weights are broken",
                code="logits_not_finite",
            )
        return Pooled(tuple(vector.tolist()))
