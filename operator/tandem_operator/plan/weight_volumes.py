"""Where a worker pod finds its weights: a volume, the image, or a step that fetches them first."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tandem_operator.plan.engines import engine_of
from tandem_operator.plan.objects import Settings, child, digest, security_context
from tandem_operator.resources import Model
from tandem_operator.resources.base import Object

WEIGHTS_DIR = "/var/lib/tandem/weights"
PIN_DIR = "/etc/tandem/pin"
PIN_FILE = "weights.json"


def claims(model: Model) -> list[Object]:
    """The claim that keeps downloaded weights, where a Model asks for a cache."""
    cache = model.spec.weights.cache
    if cache is None:
        return []
    spec: Object = {
        "accessModes": [cache.access_mode],
        "resources": {"requests": {"storage": cache.size}},
    }
    if cache.storage_class_name:
        spec["storageClassName"] = cache.storage_class_name
    name = f"{model.metadata.name}-weights"
    claim = child(model, "v1", "PersistentVolumeClaim", name, {"spec": spec})
    if cache.reclaim == "Retain":
        # Nobody's, so that it outlives its Model; by its labels the next one of the name finds it.
        del claim["metadata"]["ownerReferences"]
    return [claim]


def pins(model: Model, served: Mapping[str, Any]) -> list[Object]:
    """What the Model's source was resolved to, for pods that start later; they read it if there.

    A volume and not an argument: pods that run already have what it says and need no rollout.
    served: status.weights, as last written.
    """
    source, commit = served.get("source"), served.get("commit")
    if not commit or source != model.spec.weights.source:
        return []
    text = json.dumps({"source": source, "commit": commit}) + "\n"
    return [child(model, "v1", "ConfigMap", _pin_name(model), {"data": {PIN_FILE: text}})]


def _pin_name(model: Model) -> str:
    return f"{model.metadata.name}-weights"


def fetching_image(model: Model, settings: Settings) -> str:
    """The image that downloads: Tandem's own, whatever serves the model afterwards."""
    ours = model.spec.image if engine_of(model).reads_config else None
    return ours or settings.worker_image


def _fetch(model: Model, settings: Settings, command: list[str], args: list[str]) -> Object:
    return {
        "name": "fetch-weights",
        "image": fetching_image(model, settings),
        "imagePullPolicy": settings.image_pull_policy,
        "command": command,
        "args": args,
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "securityContext": security_context(),
        "volumeMounts": [{"name": "weights", "mountPath": WEIGHTS_DIR}],
    }


def weights_of(model: Model, settings: Settings) -> tuple[str, list[Object], list[Object]]:
    """The --weights argument, the volumes needed and the containers that fetch first.

    The first volume, where there is one, holds the weights.
    """
    weights = model.spec.weights
    scheme, _, rest = weights.source.partition("://")
    if scheme == "image":
        if engine_of(model).reads_config:
            return rest, [], []
        # Another engine's image does not hold what ours does: it is copied out of ours.
        copied = f"{WEIGHTS_DIR}/{digest(weights.source)}"
        copy = _fetch(model, settings, ["cp", "-rL", rest, copied], [])
        return copied, [{"name": "weights", "emptyDir": {}}], [copy]
    if scheme == "file":
        volume: Object = {"name": "weights", "hostPath": {"path": rest, "type": "Directory"}}
        return WEIGHTS_DIR, [volume], []
    if scheme == "pvc":
        claim, _, sub = rest.partition("/")
        source = {"claimName": claim, "readOnly": True}
        volume = {"name": "weights", "persistentVolumeClaim": source}
        return f"{WEIGHTS_DIR}/{sub}".rstrip("/"), [volume], []
    if weights.cache is None:
        volume = {"name": "weights", "emptyDir": {}}
    else:
        claim = f"{model.metadata.name}-weights"
        volume = {"name": "weights", "persistentVolumeClaim": {"claimName": claim}}
    folder = f"{WEIGHTS_DIR}/{digest(weights.source)}"
    download = ["python", "-m", "tandem_worker.models.download"]
    fetch = _fetch(model, settings, download, [weights.source, folder])
    if weights.secret_ref:
        fetch["envFrom"] = [{"secretRef": {"name": weights.secret_ref.name}}]
    if scheme != "hf":
        return folder, [volume], [fetch]
    fetch["args"] += ["--pin", f"{PIN_DIR}/{PIN_FILE}"]
    fetch["volumeMounts"].append({"name": "pin", "mountPath": PIN_DIR, "readOnly": True})
    pin: Object = {"name": "pin", "configMap": {"name": _pin_name(model), "optional": True}}
    return folder, [volume, pin], [fetch]
