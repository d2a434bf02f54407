"""What a user said of an answer becomes a label: of whose request, of which tier, how good.

Who votes is nobody's random choice, so a verdict has no known probability; the estimate
(`quality/estimate.py`) gives it little weight, and says so. Pure.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from tandem_router.errors import ApiError, bad_request, overloaded
from tandem_router.store.records import Label

VERDICTS = {"good": 1.0, "bad": 0.0}
# A person may think again; a script that flips a verdict for ever may not fill the store.
MOST_CHANGES = 8
MOST_REMEMBERED = 10_000


def parse(body: Mapping[str, Any]) -> tuple[str, float]:
    """(request id, quality 0 to 1) of `{"request_id", "verdict"}` or `{"request_id", "score"}`.

    Raises ApiError (400) that names what is wrong.
    """
    unknown = sorted(body.keys() - {"request_id", "verdict", "score"})
    if unknown:
        raise bad_request(
            f"unknown field {unknown[0][:40]!r}; feedback has request_id and verdict or score",
            unknown[0][:40],
        )
    request_id = body.get("request_id")
    if not isinstance(request_id, str) or not 1 <= len(request_id) <= 64:
        raise bad_request(
            "`request_id` must be the x-request-id of the answer, a text of at most 64 characters",
            "request_id",
        )
    if ("verdict" in body) == ("score" in body):
        raise bad_request('give either `verdict`, "good" or "bad", or `score`, 0 to 1', "verdict")
    if "verdict" in body:
        verdict = body["verdict"]
        if not isinstance(verdict, str) or verdict not in VERDICTS:
            raise bad_request('`verdict` must be "good" or "bad"', "verdict")
        return request_id, VERDICTS[verdict]
    score = body["score"]
    if isinstance(score, bool) or not isinstance(score, int | float) or not 0.0 <= score <= 1.0:
        raise bad_request("`score` must be a number from 0 (bad) to 1 (good)", "score")
    return request_id, float(score)


class Verdicts:
    """What users said last, so that repeating it is harmless and changing it for ever is not."""

    def __init__(self) -> None:
        self._last: OrderedDict[str, tuple[float, int]] = OrderedDict()

    def label(
        self,
        decision: Mapping[str, Any] | None,
        tenant: str,
        request_id: str,
        score: float,
        at: float,
    ) -> Label | None:
        """The label to keep; None where the same was said before.

        decision: the request's record, None where none is kept. Raises ApiError: 404 where the
        tenant has no such request, 409 while it runs or where it had no answer.
        """
        if decision is None or decision["tenant"] != tenant:
            raise ApiError(
                404,
                f"there is no request {request_id!r} of yours among those that are kept; "
                "`request_id` is the x-request-id of its answer",
                param="request_id",
                code="unknown_request",
            )
        if decision["status"] is None:
            raise ApiError(
                409,
                f"request {request_id!r} is still being answered; say it once it has ended",
                param="request_id",
                code="request_running",
                retry=True,
                retry_after_s=1.0,
            )
        if decision["status"] != 200:
            raise ApiError(
                409,
                f"request {request_id!r} had no answer (status {decision['status']})",
                param="request_id",
                code="no_answer",
            )
        before, num_changes = self._last.get(request_id, (None, 0))
        if before == score:
            return None
        if num_changes > MOST_CHANGES:
            raise overloaded(
                f"the verdict on request {request_id!r} was changed {MOST_CHANGES} times; the last "
                "one stands",
                code="feedback_changed",
                retry_after_s=3600.0,
            )
        self._last[request_id] = (score, num_changes + 1)
        self._last.move_to_end(request_id)
        if len(self._last) > MOST_REMEMBERED:
            self._last.popitem(last=False)
        tier = decision["tier"]
        predicted = {name: min(1.0, max(0.0, q)) for name, q in decision["quality"].items()}
        return Label(
            request_id, "feedback", at, tenant, tier, 1.0, {tier: score}, predicted=predicted
        )
