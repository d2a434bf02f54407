"""Talks to router pods: what they measured, and settings that changed since they started."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from typing import Any

from tandem_operator.plan.objects import REVISION_LABEL, Object, Settings
from tandem_operator.plan.pods import is_ready
from tandem_operator.plan.router_facts import TrafficFacts
from tandem_operator.reconcile.cluster_api import ClusterApi
from tandem_operator.reconcile.pod_client import ask_json, identity, peer_token, router_traffic
from tandem_router.config.live import live_digest

logger = logging.getLogger("tandem.operator")

PUSH_TIMEOUT_S = 2.0
MOST_REMEMBERED = 10_000


class RouterPods:
    """Remembers which settings each pod has taken, so that each is pushed once."""

    def __init__(
        self,
        api: ClusterApi,
        settings: Settings,
        as_seen: Callable[[Object, str], str] = lambda pod, text: text,
    ) -> None:
        """as_seen: a text with the paths at which a pod finds what it mounts."""
        self._api = api
        self._settings = settings
        self._as_seen = as_seen
        self._taken: dict[str, str] = {}

    async def traffic(self, pods: list[Object]) -> TrafficFacts | None:
        """What the ready pods measured; None when none answers."""
        ready = [pod for pod in pods if is_ready(pod)]
        if not ready:
            return None
        token = await peer_token(self._api, ready[0]["metadata"]["namespace"])
        return await router_traffic(ready, self._settings.router_port, token)

    async def push(
        self, pods: list[Object], revision: str, live: dict[str, Any]
    ) -> tuple[list[str], bool]:
        """Put settings in force in the ready pods of a revision that do not have them yet.

        Returns what changed, in words, and whether every pod has them now. Pods that start later
        read the same from their file; those of another revision are about to go.
        """
        digest = live_digest(live)
        behind = [
            pod
            for pod in pods
            if is_ready(pod)
            and pod["metadata"]["labels"].get(REVISION_LABEL) == revision
            and self._taken.get(identity(pod)) != digest
        ]
        if not behind:
            return [], True
        token = await peer_token(self._api, behind[0]["metadata"]["namespace"])
        answers = await asyncio.gather(*(self._put(pod, live, token) for pod in behind))
        if len(self._taken) > MOST_REMEMBERED:
            self._taken.clear()  # pods long gone; those that run are asked once more
        changed: dict[str, None] = {}
        for pod, said in zip(behind, answers, strict=True):
            if said is not None:
                self._taken[identity(pod)] = digest
                changed.update(dict.fromkeys(said))
        return list(changed), all(said is not None for said in answers)

    async def _put(self, pod: Object, live: dict[str, Any], token: str) -> list[str] | None:
        """What one pod says it changed; None where it did not take the settings."""
        name = pod["metadata"]["name"]
        live = json.loads(self._as_seen(pod, json.dumps(live)))
        try:
            status, body = await ask_json(
                pod["status"]["podIP"],
                self._settings.router_port,
                "/admin/settings",
                live,
                token,
                PUSH_TIMEOUT_S,
                "PUT",
            )
        except (OSError, TimeoutError, ValueError) as error:
            logger.warning("router pod %s did not take its settings: %r", name, error)
            return None
        if status != 200 or not isinstance(body, dict):
            said = f"{status} {str(body)[:300]}"
            logger.warning("router pod %s refused its settings: %s", name, said)
            return None
        return [str(each) for each in body.get("changed") or []]
