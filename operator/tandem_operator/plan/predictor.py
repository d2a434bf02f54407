"""Where a router pod finds its predictor: a volume, the image, or a step that trains one first."""

from __future__ import annotations

from tandem_operator.plan.objects import SCRATCH_DIR, Settings, security_context
from tandem_operator.plan.predictor_copy import copied_source, copy_path, copy_volume
from tandem_operator.plan.router_store import STORE_DIR, store_of
from tandem_operator.resources import Router
from tandem_operator.resources.base import Object

PREDICTOR_DIR = "/var/lib/tandem/predictor"
EMBEDDING_DIR = "/var/lib/tandem/embedding"
TRAINING_DIR = "/var/lib/tandem/training"


def _source(uri: str, name: str) -> tuple[Object, str]:
    """The volume that shows a URI, and the path of the thing inside the volume."""
    scheme, _, rest = uri.partition("://")
    if scheme == "configmap":
        config, _, key = rest.partition("/")
        return {"name": name, "configMap": {"name": config}}, key
    if scheme == "pvc":
        claim, _, sub = rest.partition("/")
        return {"name": name, "persistentVolumeClaim": {"claimName": claim}}, sub
    return {"name": name, "hostPath": {"path": rest}}, ""


def embedding_volume(uri: str) -> tuple[Object | None, str]:
    """The volume that shows an embedding's directory, if one is needed, and its path in a pod."""
    scheme, _, rest = uri.partition("://")
    if scheme == "image":
        return None, rest
    volume, inside = _source(uri, "embedding")
    return volume, f"{EMBEDDING_DIR}/{inside}".rstrip("/")


def artifact_path(router: Router) -> str | None:
    """Where a router pod finds the artifact of its predictor; None where it has none."""
    predictor = router.spec.predictor
    if predictor.ranks_by != "Learned":
        return None
    if predictor.artifact is None:
        return f"{PREDICTOR_DIR}/artifact"
    if predictor.artifact.startswith("image://"):
        return predictor.artifact.removeprefix("image://")
    if (copied := copied_source(router)) is not None:
        return copy_path(copied[1])
    return f"{PREDICTOR_DIR}/{_source(predictor.artifact, 'predictor')[1]}".rstrip("/")


def retraining_dir(router: Router, settings: Settings) -> str:
    """Where retrained predictors are: beside the store's file, else gone with the pod."""
    store = store_of(router, settings)
    kept = store is not None and store.sqlite is not None
    return f"{STORE_DIR if kept else SCRATCH_DIR}/predictors"


def training_data(router: Router) -> tuple[str, Object | None, list[Object]]:
    """Where a pod finds the training data: path, volume (none for the image's), mounts."""
    training = router.spec.predictor.training
    assert training is not None
    scheme, _, rest = training.data.partition("://")
    if scheme == "image":
        return rest, None, []
    if scheme == "file":
        folder, _, inside = rest.rpartition("/")
        volume: Object = {"name": "training", "hostPath": {"path": folder or "/"}}
    else:
        volume, inside = _source(training.data, "training")
    mount = {"name": "training", "mountPath": TRAINING_DIR, "readOnly": True}
    return f"{TRAINING_DIR}/{inside}".rstrip("/"), volume, [mount]


def add_predictor(
    router: Router,
    image: str,
    args: list[str],
    mounts: list[Object],
    volumes: list[Object],
    init: list[Object],
    settings: Settings,
) -> None:
    """Add the trained predictor, or the step that trains one, to a router pod."""
    predictor = router.spec.predictor
    copied, shown_at = copy_volume(router)
    volumes.append(copied)
    mounts.append(shown_at)
    if predictor.kind != "Learned":
        return
    if predictor.embedding is not None:
        volume, _ = embedding_volume(predictor.embedding)
        if volume is not None:
            volumes.append(volume)
            mounts.append({"name": "embedding", "mountPath": EMBEDDING_DIR, "readOnly": True})
    if predictor.artifact is not None:
        if not predictor.artifact.startswith(("image://", "configmap://")):
            volumes.append(_source(predictor.artifact, "predictor")[0])
            mounts.append({"name": "predictor", "mountPath": PREDICTOR_DIR, "readOnly": True})
        return
    if predictor.training is None:
        return
    data, shown, training_mounts = training_data(router)
    volumes += [shown] if shown is not None else []
    known = settings.data_digests.get(predictor.training.data)
    store: Object = {"name": "predictor", "emptyDir": {}}
    if settings.predictor_cache and known:
        path = f"{settings.predictor_cache}/{known}"
        store = {"name": "predictor", "hostPath": {"path": path, "type": "DirectoryOrCreate"}}
    volumes.append(store)
    mounts.append({"name": "predictor", "mountPath": PREDICTOR_DIR, "readOnly": True})
    if predictor.training.from_labels:
        args += ["--retraining-dir", retraining_dir(router, settings), "--training-data", data]
        mounts += training_mounts
    init.append(
        {
            "name": "train-predictor",
            "image": image,
            "imagePullPolicy": settings.image_pull_policy,
            "command": ["python", "-m", "tandem_router.predictor.training_job"],
            "args": [data, PREDICTOR_DIR],
            "env": [{"name": "TMPDIR", "value": SCRATCH_DIR}],
            "terminationMessagePolicy": "FallbackToLogsOnError",
            "securityContext": security_context(),
            "volumeMounts": [
                *training_mounts,
                {"name": "predictor", "mountPath": PREDICTOR_DIR},
                {"name": "scratch", "mountPath": SCRATCH_DIR},
            ],
        }
    )
