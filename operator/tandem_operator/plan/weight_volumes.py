"""Where a worker pod finds its weights: a volume, the image, or a step that fetches them first."""

from __future__ import annotations

from tandem_operator.plan.objects import Settings, child, digest, security_context
from tandem_operator.resources import Model
from tandem_operator.resources.base import Object

WEIGHTS_DIR = "/var/lib/tandem/weights"


def claims(model: Model) -> list[Object]:
    """The claim that keeps downloaded weights, where a Model asks for a cache."""
    cache = model.spec.weights.cache
    if cache is None:
        return []
    spec: Object = {
        "accessModes": ["ReadWriteMany"],
        "resources": {"requests": {"storage": cache.size}},
    }
    if cache.storage_class_name:
        spec["storageClassName"] = cache.storage_class_name
    name = f"{model.metadata.name}-weights"
    return [child(model, "v1", "PersistentVolumeClaim", name, {"spec": spec})]


def weights_of(model: Model, settings: Settings) -> tuple[str, Object | None, list[Object]]:
    """The --weights argument, the volume if one is needed and the containers that fetch first."""
    weights = model.spec.weights
    scheme, _, rest = weights.source.partition("://")
    if scheme == "image":
        return rest, None, []
    if scheme == "file":
        volume: Object | None = {"name": "weights", "hostPath": {"path": rest, "type": "Directory"}}
        return WEIGHTS_DIR, volume, []
    if scheme == "pvc":
        claim, _, sub = rest.partition("/")
        volume = {"name": "weights", "persistentVolumeClaim": {"claimName": claim}}
        return f"{WEIGHTS_DIR}/{sub}".rstrip("/"), volume, []
    if weights.cache is None:
        volume = {"name": "weights", "emptyDir": {}}
    else:
        claim = f"{model.metadata.name}-weights"
        volume = {"name": "weights", "persistentVolumeClaim": {"claimName": claim}}
    folder = f"{WEIGHTS_DIR}/{digest(weights.source)}"
    fetch: Object = {
        "name": "fetch-weights",
        "image": model.spec.image or settings.worker_image,
        "imagePullPolicy": settings.image_pull_policy,
        "command": ["python", "-m", "tandem_worker.models.download"],
        "args": [weights.source, folder],
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "securityContext": security_context(),
        "volumeMounts": [{"name": "weights", "mountPath": WEIGHTS_DIR}],
    }
    if weights.secret_ref:
        fetch["envFrom"] = [{"secretRef": {"name": weights.secret_ref.name}}]
    return folder, volume, [fetch]
