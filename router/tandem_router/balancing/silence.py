"""Which worker hangs although its load reports are fine: one that answers nobody for too long.

A whole reply shows nothing before its end, so that one request is silent says little. A worker
that is silent to everybody, for longer than the longest answer in its hands may take, gives none.
How long that is follows from the speeds that it reports, with room; where it reports none, from
the time that a stream may be silent and the time that a token may take. Pure.
"""

from __future__ import annotations

from tandem_router.balancing.worker import Load, Worker
from tandem_router.config import FailoverConfig

# A worker may take so many times what its speeds predict: they are fitted, and others come.
SLOWER = 3.0


def longest_silence_s(worker: Worker, num_prompt_tokens: float, failover: FailoverConfig) -> float:
    """Seconds after which a worker that has answered nobody hangs.

    num_prompt_tokens: of the request that waits.
    """
    answer_s = failover.answer_s_per_token * worker.longest_answer
    load = worker.load
    if load is None:
        return failover.stall_timeout_s + answer_s
    least_s = failover.wait_s / 2.0 + answer_s
    if not load.ready and not load.draining:
        return least_s  # it says itself that it is not well
    predicted_s = _predicted_s(worker, load, num_prompt_tokens)
    if predicted_s is None:
        return failover.stall_timeout_s + answer_s
    return max(least_s, SLOWER * predicted_s)


def _predicted_s(worker: Worker, load: Load, num_prompt_tokens: float) -> float | None:
    """Until the longest answer is complete, behind all prefill; None where no speed is known."""
    if load.prefill_profile is None or load.decode_profile is None:
        return None
    num_tokens = worker.longest_answer
    batch = max(worker.num_inflight, load.num_requests)
    fixed_s, token_s, square_s = load.prefill_profile
    prefill_s = fixed_s + token_s * (worker.pending() + num_prompt_tokens)
    prefill_s += square_s * num_prompt_tokens**2
    fixed_s, token_s, row_s = load.decode_profile
    step_s = fixed_s + token_s * batch * (num_prompt_tokens + num_tokens) + row_s * batch
    return prefill_s + max(step_s, load.step_time_s or 0.0) * num_tokens
