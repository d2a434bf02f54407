"""What a step costs on this machine, fitted from the steps that ran.

    prefill step = a + b * sum(L) + c * sum(L^2)
    decode step  = a + b * context tokens + c * sequences

L counts a prompt's tokens; a chunk after ``start`` tokens has (start + L)^2 - start^2 for L^2.

The same three numbers per kind feed the choice between local and remote prefill, the router's
latency predictions (GET /v1/load) and the simulator.
"""

from __future__ import annotations

from collections.abc import Sequence

from tandem_worker.scheduling.tenants import StepCosts

_NOMINAL_TOKEN_S = 1e-3


class Fit3:
    """Least squares of ``y = a + b u + c v`` with forgetting, coefficients kept non-negative.

    Args:
        memory: Observations after which old ones have lost most of their weight.
    """

    def __init__(self, memory: int = 500) -> None:
        self._keep = 1.0 - 1.0 / memory
        self._xtx = [[0.0] * 3 for _ in range(3)]
        self._xty = [0.0] * 3
        self.count = 0
        self._fitted = (0.0, 0.0, 0.0)
        self._fitted_at = 0

    def observe(self, u: float, v: float, y: float) -> None:
        """Add one observation."""
        x = (1.0, u, v)
        for i in range(3):
            self._xty[i] = self._keep * self._xty[i] + x[i] * y
            for j in range(3):
                self._xtx[i][j] = self._keep * self._xtx[i][j] + x[i] * x[j]
        self.count += 1

    def coefficients(self) -> tuple[float, float, float]:
        """The fit, at most one part in sixteen of the observations old."""
        if self.count - self._fitted_at > self._fitted_at // 16:
            self._fitted, self._fitted_at = self._fit(), self.count
        return self._fitted

    def _fit(self) -> tuple[float, float, float]:
        """Coordinate descent on the normal equations; converges as the problem is convex."""
        xtx, xty = self._xtx, self._xty
        scale = [max(xtx[i][i], 1e-30) ** 0.5 for i in range(3)]
        w = [0.0, 0.0, 0.0]
        for _ in range(200):
            for i in range(3):
                others = sum(xtx[i][j] * w[j] for j in range(3) if j != i)
                # A ridge far below the data's scale picks one answer where features are collinear.
                w[i] = max(0.0, (xty[i] - others) / (scale[i] * scale[i] * (1 + 1e-6) + 1e-30))
        return w[0], w[1], w[2]


class StepProfile:
    """Fits of prefill-only and decode-only steps; mixed steps are not used."""

    MIN_OBSERVATIONS = 8

    def __init__(self) -> None:
        self._prefill = Fit3()
        self._decode = Fit3()

    def observe(
        self,
        elapsed_s: float,
        *,
        decode_contexts: Sequence[int],
        prefills: Sequence[tuple[int, int]],
    ) -> None:
        """Record a step: contexts of decoding sequences, (start, tokens) of prefill chunks."""
        if prefills and not decode_contexts:
            tokens = sum(count for _, count in prefills)
            squares = sum((start + count) ** 2 - start**2 for start, count in prefills)
            self._prefill.observe(tokens, squares, elapsed_s)
        elif decode_contexts and not prefills:
            self._decode.observe(sum(decode_contexts), len(decode_contexts), elapsed_s)

    def as_dict(self) -> dict[str, list[float] | None] | None:
        """The fits as ``[a, b, c]`` in seconds, None where too few steps of a kind were seen.

        A prefill worker never decodes, so one half may stay None; None in all before either.
        """
        fits = {
            kind: list(fit.coefficients()) if fit.count >= self.MIN_OBSERVATIONS else None
            for kind, fit in (("prefill", self._prefill), ("decode", self._decode))
        }
        return fits if any(fits.values()) else None

    def prefill_time_s(self, start: int, num_tokens: int) -> float | None:
        """Predicted time of prefilling ``num_tokens`` after ``start`` cached ones."""
        if self._prefill.count < self.MIN_OBSERVATIONS:
            return None
        a, b, c = self._prefill.coefficients()
        return a + b * num_tokens + c * ((start + num_tokens) ** 2 - start**2)

    def step_costs(self) -> StepCosts | None:
        """What a step of mixed chunks costs, or None before it is known; one kind stands for both
        until the other has been seen."""
        is_prefill = self._prefill.count >= self.MIN_OBSERVATIONS
        is_decode = self._decode.count >= self.MIN_OBSERVATIONS
        if not is_prefill and not is_decode:
            return None
        a, b, c = (self._prefill if is_prefill else self._decode).coefficients()
        base_s, token_s, square_s = (a, b, c) if is_prefill else (a, c, 0.0)
        if not is_decode:
            return StepCosts(base_s, token_s, square_s, token_s, 0.0)
        a, b, c = self._decode.coefficients()
        return StepCosts(a, token_s, square_s, c, b)

    def service_time_s(self, start: int, num_prompt: int, num_output: int) -> float:
        """Predicted time of one sequence by itself; a millisecond per token before it is known."""
        prefill_s = self.prefill_time_s(start, num_prompt)
        if prefill_s is None:
            prefill_s = _NOMINAL_TOKEN_S * num_prompt
        if self._decode.count < self.MIN_OBSERVATIONS:
            return prefill_s + _NOMINAL_TOKEN_S * num_output
        a, b, c = self._decode.coefficients()
        context = start + num_prompt + num_output / 2
        return prefill_s + num_output * (a + b * context + c)
