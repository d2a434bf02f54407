"""The few calls that reconciling needs of a cluster; local mode and Kubernetes answer them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from tandem_operator.resources import API_VERSION
from tandem_operator.resources.base import Object

FIELD_MANAGER = "tandem-operator"
SEED_MANAGER = "tandem-operator-seed"

# Maps that server-side apply replaces as a whole: an entry that somebody added is drift.
ATOMIC_MAPS = frozenset({"selector", "podSelector", "namespaceSelector", "nodeSelector"})


@dataclass(frozen=True)
class KindInfo:
    """Where a kind lives in the API."""

    api_version: str
    plural: str

    @property
    def path(self) -> str:
        """The API root of the group and version."""
        return ("/api/" if "/" not in self.api_version else "/apis/") + self.api_version


KIND_INFO: dict[str, KindInfo] = {
    "Model": KindInfo(API_VERSION, "models"),
    "Router": KindInfo(API_VERSION, "routers"),
    "AutoscalingPolicy": KindInfo(API_VERSION, "autoscalingpolicies"),
    "WorkerPool": KindInfo(API_VERSION, "workerpools"),
    "Deployment": KindInfo("apps/v1", "deployments"),
    "Service": KindInfo("v1", "services"),
    "ConfigMap": KindInfo("v1", "configmaps"),
    "Secret": KindInfo("v1", "secrets"),
    "ServiceAccount": KindInfo("v1", "serviceaccounts"),
    "PersistentVolumeClaim": KindInfo("v1", "persistentvolumeclaims"),
    "Pod": KindInfo("v1", "pods"),
    "Event": KindInfo("v1", "events"),
    "PodDisruptionBudget": KindInfo("policy/v1", "poddisruptionbudgets"),
    "NetworkPolicy": KindInfo("networking.k8s.io/v1", "networkpolicies"),
    "Role": KindInfo("rbac.authorization.k8s.io/v1", "roles"),
    "RoleBinding": KindInfo("rbac.authorization.k8s.io/v1", "rolebindings"),
    "Job": KindInfo("batch/v1", "jobs"),
    "Ingress": KindInfo("networking.k8s.io/v1", "ingresses"),
    "HTTPRoute": KindInfo("gateway.networking.k8s.io/v1", "httproutes"),
    "InferencePool": KindInfo("inference.networking.k8s.io/v1", "inferencepools"),
    "Lease": KindInfo("coordination.k8s.io/v1", "leases"),
}


_UNREADABLE = ("failed to create typed patch object", "failed to convert new object")


class ApiError(Exception):
    """The cluster refused or failed a call; status is the HTTP status, 0 without an answer."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status

    @property
    def refuses_body(self) -> bool:
        """Whether it is what was sent, or who sent it, that is refused: trying again is no use.

        A body with a field or value that the schema does not have is answered 500 by server-side
        apply (Kubernetes 1.36).
        """
        text = str(self)
        return self.status in (400, 403, 422) or (
            self.status == 500 and any(cue in text for cue in _UNREADABLE)
        )


@dataclass(frozen=True)
class WatchEvent:
    """A change of one object."""

    type: Literal["ADDED", "MODIFIED", "DELETED"]
    object: Object


class ClusterApi(Protocol):
    """Objects by kind; every method raises ApiError when the cluster says no."""

    async def get(self, kind: str, namespace: str, name: str) -> Object | None:
        """The object, None when there is none."""

    async def named(self, kind: str, namespace: str, name: str) -> Object | None:
        """The object as it is right now, whoever made it; None when there is none."""

    async def version(self, kind: str, namespace: str, name: str) -> str | None:
        """The object's resourceVersion right now, whoever made it; None when there is none."""

    async def secret_labels(self, namespace: str, name: str) -> Mapping[str, str] | None:
        """Labels of a Secret, whose data are not read; None when there is none."""

    async def select(
        self, kind: str, namespace: str | None = None, labels: Mapping[str, str] | None = None
    ) -> list[Object]:
        """All objects of a kind, in one or all namespaces, that carry all the labels."""

    async def apply(self, obj: Object) -> Object:
        """Server-side apply as the operator's field manager.

        With metadata.uid the object must be that one, and conflicting fields are taken over;
        without it the object is new, and ApiError 409 says that somebody has just made it.
        """

    async def create(self, obj: Object) -> Object | None:
        """Create the object; None when it exists already."""

    async def patch_spec(self, kind: str, namespace: str, name: str, spec: Object) -> Object:
        """Merge fields into spec once, without owning them afterwards."""

    async def merge(self, kind: str, namespace: str, name: str, body: Object) -> bool:
        """Merge a body into an object without owning it; False when there is none."""

    async def patch_secret(self, namespace: str, name: str, body: Object) -> None:
        """Merge a body into a Secret; ApiError 409 when it is not of the body's resourceVersion."""

    async def annotate(
        self, kind: str, namespace: str, name: str, annotations: Mapping[str, str]
    ) -> None:
        """Set annotations without owning them; no error when the object is gone."""

    async def apply_status(self, obj: Object) -> Object:
        """Replace the status subresource by obj["status"]."""

    async def delete(self, kind: str, namespace: str, name: str) -> None:
        """Delete an object and what it owns; no error when it is gone."""
