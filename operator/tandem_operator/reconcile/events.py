"""Which changes of a status people are told of, as Events on the object."""

from __future__ import annotations

from typing import NamedTuple

from tandem_operator.plan.router_status import BUILT_IN_VALUES_HOLD
from tandem_operator.reconcile.cluster_api import FIELD_MANAGER
from tandem_operator.resources.base import Object


class News(NamedTuple):
    """What an Event says."""

    type: str  # Normal | Warning
    reason: str
    message: str
    #: It happens at most once, and its message says when: told again it is the same Event.
    once: bool = False


# Conditions whose turn from good to bad, or back, is news besides that of Ready.
_TOLD = ("KVLinkReady", "SLOMet", "WithinBudget", "Durable")


def news_in(obj: Object, status: Object) -> list[News]:
    """What a new status tells that the object's old one did not.

    A pool whose count changed; Ready with another reason; a condition of `_TOLD` that turned; a
    rollout that began to wait for room; what a loop that only advises would do; a predictor that
    was trained, promoted or taken back.
    """
    old = obj.get("status") or {}
    if obj["kind"] == "WorkerPool":
        ready, *_ = status["conditions"]
        if ready["reason"] == "MadeByHand" and not old.get("conditions"):
            return [News("Warning", ready["reason"], ready["message"])]
        last = status.get("lastScale")
        if not last or last == old.get("lastScale"):
            return []
        text = f"{last['before']} to {last['after']} workers: {last['reason']}"
        return [News("Normal", "Scaled", text)]
    if obj["kind"] not in ("Model", "Router"):
        return []
    before = {c["type"]: c for c in old.get("conditions") or []}
    found: list[News] = _advice(obj, old, status)
    for after in status.get("conditions") or []:
        known = before.get(after["type"], {})
        turned = {known.get("status"), after["status"]} == {"True", "False"}
        other = any(known.get(k) != after.get(k) for k in ("status", "reason"))
        waits = after["reason"] == "WaitingForRoom" and other
        if (after["type"] == "Ready" and other) or (after["type"] in _TOLD and turned) or waits:
            good = (after["status"] == "True" or after["reason"] == "Starting") and not waits
            good = good and after["reason"] not in BUILT_IN_VALUES_HOLD
            news = News("Normal" if good else "Warning", after["reason"], after["message"])
            found += [news] if news not in found else []
    told = (old.get("predictor") or {}).get("changes") or []
    for changed in (status.get("predictor") or {}).get("changes") or []:
        if changed not in told:
            bad = any(f" {kind} " in changed for kind in ("failed", "rolled back"))
            news = News("Warning" if bad else "Normal", "PredictorChanged", changed, once=True)
            found.append(news)
    return found


def _advice(obj: Object, old: Object, status: Object) -> list[News]:
    """What the control loop of a Router in mode Advise would do now and did not say before."""
    spec = obj.get("spec") or {}
    if (spec.get("scaling") or {}).get("mode") != "Advise":
        return []
    known = old.get("decisions") or []
    new = [d for d in status.get("decisions") or [] if d not in known and d["pool"] != "all"]
    return [
        News("Normal", "ScalingAdvised", "{pool} {before} to {after}: {reason}".format(**decision))
        for decision in new
    ]


def event(obj: Object, news: News, name: str, now: str) -> Object:
    """The Event that tells people of an object's news. now: RFC 3339, UTC."""
    metadata = obj["metadata"]
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": name, "namespace": metadata["namespace"]},
        "type": news.type,
        "reason": news.reason,
        "message": news.message[:1024],
        "involvedObject": {
            "apiVersion": obj["apiVersion"],
            "kind": obj["kind"],
            "name": metadata["name"],
            "namespace": metadata["namespace"],
            "uid": metadata["uid"],
        },
        "source": {"component": FIELD_MANAGER},
        "firstTimestamp": now,
        "lastTimestamp": now,
        "count": 1,
    }
