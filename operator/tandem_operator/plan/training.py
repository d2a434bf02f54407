"""The Job that trains a predictor from labels, in the routers' image and away from requests.

Routers that share a PostgreSQL store ask for one (`retraining.run` of their state); it is there for
as long as they do. A SQLite file is one router's alone, which trains in a child process instead.
"""

from __future__ import annotations

from tandem_operator.plan.network import closed_policy
from tandem_operator.plan.objects import (
    SCRATCH_DIR,
    Settings,
    child,
    digest,
    merge_patch,
    pod_security_context,
    security_context,
)
from tandem_operator.plan.predictor import training_data
from tandem_operator.plan.router_store import add_store, store_of
from tandem_operator.resources import Router
from tandem_operator.resources.base import Object

TRAINING_LABEL = "tandem.dev/training"
LIMIT_S = 3600
#: What a podPatch says of where pods run holds for a training too; the rest is of routers.
PLACEMENT = ("nodeSelector", "tolerations", "affinity", "imagePullSecrets", "priorityClassName")


def trains_by_job(router: Router, settings: Settings) -> bool:
    """Whether a Job of the cluster trains for this Router."""
    training, store = router.spec.predictor.training, store_of(router, settings)
    asked = training is not None and training.from_labels
    return asked and store is not None and store.postgres is not None and _in_cluster(settings)


def _in_cluster(settings: Settings) -> bool:
    return settings.endpoints == "endpointslice"


def training_objects(router: Router, settings: Settings, name: str, run: str) -> list[Object]:
    """The policy of training pods, and the Job of the run that is asked for, if one is.

    name: of the Router's children. A pod that changes makes another Job: what is there of one
    cannot be changed.
    """
    if not trains_by_job(router, settings):
        return []
    found = []
    labels = {TRAINING_LABEL: router.metadata.name}
    if settings.network.enabled:
        found.append(closed_policy(router, f"{name}-training", labels, settings))
    if run:
        spec = _job(router, settings, name, run)
        found.append(child(router, "batch/v1", "Job", f"{name}-train-{digest([spec])}", spec))
    return found


def _job(router: Router, settings: Settings, name: str, run: str) -> Object:
    args: list[str] = []
    mounts: list[Object] = [{"name": "scratch", "mountPath": SCRATCH_DIR}]
    volumes: list[Object] = [{"name": "scratch", "emptyDir": {}}]
    add_store(router, settings, args, mounts, volumes)
    data, volume, data_mounts = training_data(router)
    volumes += [volume] if volume is not None else []
    container: Object = {
        "name": "train",
        "image": router.spec.image or settings.router_image,
        "imagePullPolicy": settings.image_pull_policy,
        "command": ["python", "-m", "tandem_router.quality.retraining.job"],
        "args": [*args, "--run", run, "--training-data", data],
        "env": [{"name": "TMPDIR", "value": SCRATCH_DIR}],
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "securityContext": security_context(),
        "volumeMounts": [*mounts, *data_mounts],
    }
    if router.spec.resources.cpu:
        container["resources"] = {"requests": {"cpu": router.spec.resources.cpu}}
    pod: Object = {
        "serviceAccountName": name,
        "automountServiceAccountToken": False,
        "restartPolicy": "Never",
        "securityContext": pod_security_context(),
        "containers": [container],
        "volumes": volumes,
    }
    for patch in (*settings.pods.under("router"), router.spec.pod_patch):
        own = (patch or {}).get("spec") or {}
        pod = merge_patch(pod, {key: own[key] for key in PLACEMENT if key in own})
    labels = {TRAINING_LABEL: router.metadata.name, "app.kubernetes.io/name": "tandem-training"}
    return {
        "spec": {
            "backoffLimit": 1,
            "activeDeadlineSeconds": LIMIT_S,
            "template": {"metadata": {"labels": labels}, "spec": pod},
        }
    }


def failed_training(children: list[Object]) -> str:
    """What to say of a training Job that ended without success; empty where none did."""
    for job in children:
        if job["kind"] != "Job":
            continue
        for condition in (job.get("status") or {}).get("conditions") or []:
            if condition["type"] == "Failed" and condition["status"] == "True":
                name, why = job["metadata"]["name"], condition.get("reason", "")
                return f"training failed: {why}; see `kubectl logs job/{name}`"
    return ""
