"""Writes Events so that what happens again is counted on the Event that told of it before."""

from __future__ import annotations

import hashlib
import re
import secrets
from collections import OrderedDict
from dataclasses import dataclass

from tandem_operator.reconcile.cluster_api import ClusterApi
from tandem_operator.reconcile.events import News, event
from tandem_operator.resources.base import Object

# Events that are remembered; an apiserver forgets them after an hour by itself.
MAX_REMEMBERED = 4096
# What differs each time and makes no other news.
_COUNTS = re.compile(r"restarted \d+ times|\(restarts: \d+\)|again in [\d.]+ s")

_Told = tuple[str, str, str, str]


@dataclass
class _Written:
    name: str
    count: int


class EventRecorder:
    """Tells news of objects; one instance remembers what it has told."""

    def __init__(self, api: ClusterApi, max_remembered: int = MAX_REMEMBERED) -> None:
        self._api = api
        self._max_remembered = max_remembered
        self._written: OrderedDict[_Told, _Written] = OrderedDict()

    async def tell(self, obj: Object, news: News, now: str) -> None:
        """An Event on the object, or one more on the same one. now: RFC 3339, UTC.

        Raises ApiError when the cluster refuses it.
        """
        metadata = obj["metadata"]
        if news.once:
            told_by = hashlib.sha256(f"{metadata['uid']} {news.message}".encode()).hexdigest()
            await self._api.create(event(obj, news, f"{metadata['name']}.{told_by[:16]}", now))
            return
        said = _COUNTS.sub("", news.message)
        told = (metadata["uid"], news.type, news.reason, said)
        written = self._written.get(told)
        if written is not None:
            count = written.count + 1
            more = {"count": count, "lastTimestamp": now, "message": news.message[:1024]}
            if await self._api.merge("Event", metadata["namespace"], written.name, more):
                written.count = count
                self._written.move_to_end(told)
                return
        name = f"{metadata['name']}.{secrets.token_hex(8)}"
        await self._api.create(event(obj, news, name, now))
        self._written[told] = _Written(name, 1)
        self._written.move_to_end(told)
        while len(self._written) > self._max_remembered:
            self._written.popitem(last=False)
