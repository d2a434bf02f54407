"""Changes the token of a namespace while everybody uses it: added, then sent, then alone.

Routers and workers read the Secret as a file whose first line they send and whose every line they
accept. Between two steps passes the time in which every kubelet has brought the file up to date,
so that at no moment anybody sends what another one refuses; no pod restarts.
"""

from __future__ import annotations

import base64
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tandem_operator.plan.objects import PEER_SECRET
from tandem_operator.reconcile.cluster_api import ClusterApi
from tandem_operator.resources.timestamps import seconds_since_epoch, timestamp

# A person asks for a rotation by writing anything new here.
ASKED = "tandem.dev/rotate"
DONE = "tandem.dev/rotated"
STEP = "tandem.dev/rotation-step"
SINCE = "tandem.dev/rotation-since"

# A kubelet looks once a minute, behind a cache of a minute or two.
STEP_S = 180.0
LOOK_S = 60.0


@dataclass(frozen=True)
class Looked:
    """What a look at the Secret found.

    again_s: until the next look that is needed; None when no rotation is under way.
    """

    again_s: float | None = None
    is_missing: bool = False


@dataclass(frozen=True)
class Step:
    """What the Secret shall hold next; None in annotations removes one."""

    tokens: tuple[str, ...]
    annotations: Mapping[str, str | None]


def next_step(
    tokens: Sequence[str], annotations: Mapping[str, str], now_s: float, new_token: str
) -> Step | None:
    """The step that is due, None while nothing is.

    tokens: lines of the Secret, the first of which is sent. new_token: used when one begins.
    """
    asked, step = annotations.get(ASKED, ""), annotations.get(STEP, "")
    began = {SINCE: timestamp(now_s)}
    if not step:
        if not asked or asked == annotations.get(DONE) or not tokens:
            return None
        return Step((tokens[0], new_token), {STEP: "accepted", **began})
    if now_s - _seconds(annotations.get(SINCE, "")) < STEP_S or len(tokens) < 2:
        # Somebody may have written the token by hand meanwhile: then that is the rotation.
        return None if len(tokens) >= 2 else _over(tokens, asked)
    if step == "accepted":
        return Step((tokens[1], tokens[0]), {STEP: "sent", **began})
    return _over(tokens, asked)


def _over(tokens: Sequence[str], asked: str) -> Step:
    return Step(tuple(tokens[:1]), {STEP: None, SINCE: None, DONE: asked})


def _seconds(text: str) -> float:
    try:
        return seconds_since_epoch(text)
    except ValueError:
        return 0.0


class TokenRotation:
    """Looks at a namespace's token once a minute and takes the step that is due.

    clock: seconds since the epoch.
    """

    def __init__(self, api: ClusterApi, clock: Callable[[], float]) -> None:
        self._api = api
        self._clock = clock
        self._looked: dict[str, float] = {}

    async def step(self, namespace: str) -> Looked:
        """Take the step that is due, and say what was seen.

        Raises ApiError when the cluster fails a call.
        """
        now = self._clock()
        if abs(now - self._looked.get(namespace, -LOOK_S)) < LOOK_S:
            return Looked()
        secret = await self._api.get("Secret", namespace, PEER_SECRET)
        self._looked = {k: at for k, at in self._looked.items() if abs(now - at) < LOOK_S}
        if secret is None:
            return Looked(is_missing=True)  # the next pass looks again
        self._looked[namespace] = now
        annotations = secret["metadata"].get("annotations") or {}
        text = base64.b64decode((secret.get("data") or {}).get("token", "")).decode()
        step = next_step(text.split(), annotations, now, secrets.token_urlsafe(32))
        if step is None:
            return Looked(LOOK_S if STEP in annotations else None)
        encoded = base64.b64encode("\n".join(step.tokens).encode()).decode()
        version = secret["metadata"]["resourceVersion"]
        metadata = {"annotations": dict(step.annotations), "resourceVersion": version}
        body = {"metadata": metadata, "data": {"token": encoded}}
        await self._api.patch_secret(namespace, PEER_SECRET, body)
        return Looked(LOOK_S if step.annotations.get(STEP) else None)
