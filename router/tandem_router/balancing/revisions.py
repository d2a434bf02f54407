"""Which decode and prefill workers may work together while a rollout replaces one revision."""

from __future__ import annotations

from tandem_router.balancing.worker import Worker


def _revision(worker: Worker) -> str | None:
    """What the worker said of its revision; None: it has none; "": it has said nothing yet."""
    return "" if worker.load is None else worker.load.revision


def with_prefill(decodes: list[Worker], prefills: list[Worker]) -> list[Worker]:
    """Decode workers whose revision has a prefill worker, too; all where none has.

    So a rollout sends nothing to a revision until each of its roles has a ready worker.
    """
    revisions = {_revision(prefill) for prefill in prefills}
    if None in revisions:
        return decodes
    paired = [
        decode
        for decode in decodes
        if decode.role != "decode" or (own := _revision(decode)) is None or own in revisions
    ]
    return paired or decodes


def same_revision(decode: Worker, prefill: Worker) -> bool:
    """KV layouts may differ between revisions: never pair two different ones.

    A worker that has said nothing yet is new, so it may be of any revision.
    """
    left, right = _revision(decode), _revision(prefill)
    return left is None or right is None or left == right
